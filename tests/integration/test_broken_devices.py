"""GPU errors that a worker does not get over, with a stand-in for PyTorch in the source."""

from __future__ import annotations

import pytest

from conftest import StartServer
from support.server import Server
from support.waiting import wait_until

SOURCE = """
import sys, types, weakref
class OutOfMemoryError(RuntimeError): pass
sticky = None
cached = 0
def synchronize(device=None):
    if sticky is not None:
        raise RuntimeError(sticky)
def empty_cache():
    global cached
    cached = len(alive)  # what is in use cannot be given back
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(
    is_initialized=lambda: True, current_device=lambda: 0, device_count=lambda: 1,
    memory_reserved=lambda device: cached, synchronize=synchronize, empty_cache=empty_cache,
    OutOfMemoryError=OutOfMemoryError)
sys.modules["torch"] = torch

import ogpu.service
from pydantic import BaseModel
class Model(BaseModel):
    text: str = ""
    number: int = 0
class Tensor: pass
alive = weakref.WeakSet()
@ogpu.service.expose()
def breaks_the_context(data: Model) -> Model:
    global sticky
    sticky = data.text
    raise RuntimeError(data.text)
@ogpu.service.expose()
def runs_out_of_memory(data: Model) -> Model:
    global cached
    cached = 4096
    tensor = Tensor()
    alive.add(tensor)
    tensor.itself = tensor  # a cycle, as models have them
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
@ogpu.service.expose()
def fails(data: Model) -> Model:
    raise ValueError("nothing to do with the GPU")
@ogpu.service.expose()
def memory(data: Model) -> Model:
    return Model(number=cached)
ogpu.service.start()
"""


def replaced_for(server: Server, pid: int) -> str:
    """Return why the worker of that pid was replaced."""
    wait_until(
        lambda: server.slot()["state"] == "ready" and server.slot()["pid"] != pid, "it is replaced"
    )
    return str(server.slot()["last_exit"]["reason"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CUDA error: device-side assert triggered", "device_error"),
        ("CUDA error: no CUDA-capable device is detected", "device_lost"),
    ],
)
def test_a_broken_context_costs_the_worker(
    start_server: StartServer, text: str, reason: str
) -> None:
    """The task has failed with its own exception; the next one meets a worker that works."""
    server = start_server(SOURCE)
    task = server.run("breaks_the_context", "t", {"text": text})
    assert (task["state"], task["error"]["reason"]) == ("failed", "exception")
    assert task["error"]["message"] == text
    assert replaced_for(server, task["worker"]["pid"]) == reason
    assert server.run("fails", "next")["error"]["message"] == "nothing to do with the GPU"
    assert server.slot()["generation"] == 2


def test_a_lack_of_memory_keeps_the_worker(start_server: StartServer) -> None:
    """What the failed task held is given back before the next one, cycles included."""
    server = start_server(SOURCE)
    task = server.run("runs_out_of_memory", "t")
    assert task["error"]["exception"] == "OutOfMemoryError"
    after = server.run("memory", "m")
    assert after["result"]["number"] == 0
    assert after["worker"] == task["worker"]


def test_another_failure_keeps_worker_and_cache(start_server: StartServer) -> None:
    server = start_server(SOURCE.replace("cached = 0", "cached = 4096", 1))
    task = server.run("fails", "t")
    after = server.run("memory", "m")
    assert after["result"]["number"] == 4096
    assert after["worker"] == task["worker"]
