"""GPU errors of the real kind: PyTorch on a CUDA device."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from conftest import StartServer
from support.waiting import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),  # PyTorch is imported by each worker, and makes a context
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None or not Path("/dev/nvidiactl").exists(),
        reason="there is no NVIDIA GPU here, or no PyTorch",
    ),
]

SOURCE = """
import os
import time
import torch
import ogpu.service
from pydantic import BaseModel
class Model(BaseModel):
    number: float = 0
    pid: int = 0
@ogpu.service.init()
def load() -> None:
    global weights
    weights = torch.ones(10, 10, device="cuda")
@ogpu.service.expose()
def works(data: Model) -> Model:
    return Model(number=float((weights @ weights).sum()), pid=os.getpid())
@ogpu.service.expose()
def asserts_on_the_device(data: Model) -> Model:
    return Model(number=float(weights[torch.tensor([99], device="cuda")].sum()))
@ogpu.service.expose()
def runs_out_of_memory(data: Model) -> Model:
    kept = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    return Model(number=float(torch.empty(1 << 50, dtype=torch.uint8, device="cuda")[0] + kept[0]))
@ogpu.service.expose()
def reserved(data: Model) -> Model:
    return Model(number=torch.cuda.memory_reserved(), pid=os.getpid())
@ogpu.service.expose(timeout=1, grace=60)
def is_stopped(data: Model) -> Model:
    big = torch.ones(4096, 4096, device="cuda")
    while True:
        big = torch.relu(big @ big)
        torch.cuda.synchronize()
ogpu.service.start()
"""


def test_an_assertion_in_a_kernel_costs_the_worker(start_server: StartServer) -> None:
    """An index out of range: the task fails, and the next one runs in a worker that works."""
    server = start_server(SOURCE, wait=False).wait_ready(timeout_s=120)
    task = server.run("asserts_on_the_device", "t")
    assert task["state"] == "failed"
    assert "device-side assert" in task["error"]["message"]
    wait_until(lambda: server.slot()["generation"] == 2, "the worker is replaced")
    assert server.slot()["last_exit"]["reason"] == "device_error"
    assert server.run("works", "next", wait_s=60)["result"]["number"] == 1000


def test_a_lack_of_memory_keeps_the_worker(start_server: StartServer) -> None:
    """The same process goes on, with the memory that the failed task held."""
    server = start_server(SOURCE, wait=False).wait_ready(timeout_s=120)
    pid = server.run("works", "before")["result"]["pid"]
    task = server.run("runs_out_of_memory", "t")
    assert task["error"]["exception"] == "OutOfMemoryError"
    after = server.run("reserved", "r")["result"]
    assert after["pid"] == pid
    assert after["number"] < 1 << 30
    assert server.run("works", "after")["result"] == {"number": 1000, "pid": pid}


def test_a_handler_that_uses_the_gpu_is_stopped(start_server: StartServer) -> None:
    """Within the grace, between two kernels; its worker goes on."""
    server = start_server(SOURCE, wait=False).wait_ready(timeout_s=120)
    task = server.run("is_stopped", "t")
    assert (task["state"], task["error"]["exception"]) == ("timed_out", "TaskTimeout")
    assert server.run("works", "after")["result"]["pid"] == task["worker"]["pid"]
