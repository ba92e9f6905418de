"""Real GPUs: which worker sees which, and their memory between a kill and the next @init."""

from __future__ import annotations

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import StartServer
from support.server import Server
from support.waiting import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),  # PyTorch is imported by each worker, and makes a context
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "pynvml"))
        or not Path("/dev/nvidiactl").exists(),
        reason="there is no NVIDIA GPU here, or no PyTorch, or no nvidia-ml-py",
    ),
]

MIB = 1 << 20
TAKEN = 2048 * MIB
# Each @init writes down how much was free before it took its own.
SOURCE = f"""
import os
import time
import torch
import ogpu.service
from pydantic import BaseModel
class Model(BaseModel):
    number: float = 0
    pid: int = 0
    devices: int = 0
    visible: str = ""
@ogpu.service.init()
def load() -> None:
    global weights, taken
    weights = torch.ones(10, 10, device="cuda")
    with open("free.txt", "a") as file:
        print(torch.cuda.mem_get_info()[0], file=file, flush=True)
    taken = torch.empty({TAKEN}, dtype=torch.uint8, device="cuda")
@ogpu.service.expose()
def works(data: Model) -> Model:
    time.sleep(data.number)
    return Model(
        number=float((weights @ weights).sum()),
        pid=os.getpid(),
        devices=torch.cuda.device_count(),
        visible=os.environ["CUDA_VISIBLE_DEVICES"],
    )
@ogpu.service.expose(timeout=2)
def never_ends(data: Model) -> Model:
    big = torch.ones(4096, 4096, device="cuda")
    while True:
        big = torch.relu(big @ big)
ogpu.service.start()
"""


def used_bytes(server: Server) -> dict[str, float]:
    """Return how full the device of each slot is, by /metrics."""
    return {
        sample.labels["slot"]: sample.value
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        for sample in family.samples
        if sample.name == "ogpu_device_memory_used_bytes"
    }


def test_memory_is_back_before_the_next_init(start_server: StartServer, tmp_path: Path) -> None:
    """A loop of kernels past its deadline is killed, three times; each @init finds as much free."""
    server = start_server(SOURCE, wait=False, OGPU_GPUS="0").wait_ready(timeout_s=120)
    assert server.slot()["device"].startswith("nvidia:")
    wait_until(lambda: used_bytes(server)["0"] >= TAKEN, "the worker's memory is counted")
    for kill in range(3):
        task = server.run("never_ends", f"t{kill}", wait_s=60)
        ended = time.monotonic()
        assert task["state"] == "timed_out"
        wait_until(
            lambda generation=kill + 2: server.slot()["generation"] == generation,
            "the next worker is launched",
        )
        launched = time.monotonic()
        wait_until(lambda: server.slot()["state"] == "ready", "it is ready", timeout_s=120)
        ready = time.monotonic()
        print(f"kill {kill}: launched after {launched - ended:.3f} s, ready after "
              f"{ready - ended:.3f} s")  # fmt: skip
    assert server.run("works", "after", wait_s=60)["result"]["number"] == 1000
    free = [int(line) for line in (tmp_path / "free.txt").read_text().split()]
    assert len(free) == 4
    assert min(free[1:]) > free[0] - 256 * MIB
    assert "is not back" not in server.log


def test_two_workers_share_a_gpu(start_server: StartServer) -> None:
    """Both see it, and no other; both serve at once."""
    server = start_server(SOURCE, wait=False, OGPU_GPUS="0", OGPU_WORKERS_PER_GPU=2)
    server.wait_ready(timeout_s=120)
    wait_until(lambda: server.slot(1)["state"] == "ready", "the second one", timeout_s=120)
    assert server.slot(0)["device"] == server.slot(1)["device"]
    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(server.run, "works", f"t{i}", {"number": 1}) for i in range(2)]
        results = [call.result()["result"] for call in calls]
    assert len({result["pid"] for result in results}) == 2
    assert {result["devices"] for result in results} == {1}
    assert f"nvidia:{results[0]['visible']}" == server.slot(0)["device"]
    wait_until(lambda: used_bytes(server)["1"] >= 2 * TAKEN, "the memory of both is counted")
