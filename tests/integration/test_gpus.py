"""GPUs of a real server: which worker sees which, how full they are, when the next worker begins.

There is no GPU here: NVML is a stand-in that reads a file (``support/gpus.py``). The real ones are
in tests/gpu.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import StartServer
from support.gpus import GIB, StandInGpus
from support.server import Server
from support.waiting import wait_until

# At @init each worker writes down how full NVML says that its GPU is.
SOURCE = """
import json
import os
import sys
import time
import ogpu.service
from pydantic import BaseModel
class Names(BaseModel):
    names: list[str] = []
class Values(BaseModel):
    values: dict[str, str | None]
at_init = {}
@ogpu.service.init()
def load() -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        at_init[name] = os.environ.get(name)
    if "STAND_IN_NVML" in os.environ:
        with open(os.environ["STAND_IN_NVML"]) as file, open("used.txt", "a") as found:
            print(json.load(file)["gpus"][0]["used"], file=found, flush=True)
@ogpu.service.expose()
def environment(data: Names) -> Values:
    return Values(values={name: os.environ.get(name) for name in data.names})
@ogpu.service.expose()
def init_environment(data: Names) -> Values:
    return Values(values=at_init)
@ogpu.service.expose()
def modules(data: Names) -> Values:
    return Values(values={name: str(name in sys.modules) for name in data.names})
@ogpu.service.expose(timeout=0.1)
def hangs(data: Names) -> Values:
    time.sleep(60)
ogpu.service.start()
"""
DEVICE_VARIABLES = ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES"]


def environment(server: Server, address: str, *names: str) -> dict[str, str | None]:
    task = server.run("environment", address, {"names": names})
    values: dict[str, str | None] = task["result"]["values"]
    return values


def devices(server: Server) -> list[str | None]:
    return [slot["device"] for slot in server.workers()["workers"]]


def memory(server: Server, what: str) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["slot"], sample.labels["device"]): sample.value
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        for sample in family.samples
        if sample.name == f"ogpu_device_memory_{what}_bytes"
    }


@pytest.fixture
def gpus(tmp_path: Path) -> StandInGpus:
    return StandInGpus(tmp_path, 2)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_worker_sees_one_gpu(
    start_server: StartServer, gpus: StandInGpus, method: str
) -> None:
    """One worker a GPU; before @init, and whatever way workers are made. All of it can be seen."""
    server = start_server(SOURCE, OGPU_START_METHOD=method, **gpus.environment)
    wait_until(lambda: server.slot(1)["state"] == "ready", "the second worker is ready")
    assert devices(server) == ["nvidia:0", "nvidia:1"]
    for index in range(2):
        line = f"Worker {index} sees nvidia:{index} (NVIDIA H100 80GB HBM3, 80 GiB)"
        assert line in server.log
    task = server.run("init_environment", "a")
    slot = task["worker"]["slot"]
    assert task["worker"]["device"] == f"nvidia:{slot}"
    assert task["result"]["values"]["CUDA_VISIBLE_DEVICES"] == str(slot)
    assert int(task["result"]["values"]["OMP_NUM_THREADS"]) >= 1
    if method == "fork":
        loaded = server.run("modules", "m", {"names": ["pynvml", "threadpoolctl"]})
        assert loaded["result"]["values"] == {"pynvml": "False", "threadpoolctl": "False"}
    gpus.change(1, used=3 * GIB)
    wait_until(lambda: memory(server, "used")["1", "nvidia:1"] == 3 * GIB, "it is read again")
    assert memory(server, "used")["0", "nvidia:0"] == GIB
    assert set(memory(server, "total").values()) == {80 * GIB}


def test_what_the_container_shows_is_all_there_is(
    start_server: StartServer, gpus: StandInGpus
) -> None:
    """By UUID: the worker is told what the container was. Two workers share the GPU."""
    server = start_server(
        SOURCE,
        OGPU_WORKERS_PER_GPU=2,
        CUDA_VISIBLE_DEVICES="GPU-1c1,GPU-none",
        CUDA_DEVICE_ORDER="FASTEST_FIRST",
        **gpus.environment,
    )
    assert devices(server) == ["nvidia:GPU-1c1"] * 2
    growth = "TF_FORCE_GPU_ALLOW_GROWTH"
    assert environment(server, "a", *DEVICE_VARIABLES, growth) == {
        "CUDA_VISIBLE_DEVICES": "GPU-1c1",
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
        "HIP_VISIBLE_DEVICES": None,
        growth: "true",
    }
    assert server.log.count(growth) == 1
    assert memory(server, "used")["0", "nvidia:GPU-1c1"] == GIB


def test_slots_are_dealt_round_the_gpus_that_are_wanted(
    start_server: StartServer, tmp_path: Path
) -> None:
    """OGPU_GPUS counts in what is visible; OGPU_WORKERS says how many slots there are."""
    gpus = StandInGpus(tmp_path, 4)
    server = start_server(
        SOURCE,
        OGPU_GPUS="2,0",
        OGPU_WORKERS=3,
        CUDA_VISIBLE_DEVICES="3,2,1",
        OMP_NUM_THREADS=7,
        **gpus.environment,
    )
    assert devices(server) == ["nvidia:1", "nvidia:3", "nvidia:1"]
    assert environment(server, "a", "OMP_NUM_THREADS", "MKL_NUM_THREADS") == {
        "OMP_NUM_THREADS": "7",
        "MKL_NUM_THREADS": None,
    }


def test_a_gpu_that_is_not_there_is_an_invalid_setting(
    start_server: StartServer, gpus: StandInGpus
) -> None:
    server = start_server(SOURCE, wait=False, OGPU_GPUS="0,2", **gpus.environment)
    assert server.wait_exit() == 2
    assert "OGPU_GPUS=0,2: there is no GPU 2" in server.log


def test_no_gpu_is_shown_where_none_is_wanted(start_server: StartServer, gpus: StandInGpus) -> None:
    server = start_server(SOURCE, OGPU_GPUS="none", **gpus.environment)
    assert devices(server) == [None]
    assert environment(server, "a", *DEVICE_VARIABLES) == {
        "CUDA_VISIBLE_DEVICES": "-1",
        "CUDA_DEVICE_ORDER": None,
        "HIP_VISIBLE_DEVICES": "-1",
    }
    assert memory(server, "used") == {}


def test_a_driver_that_does_not_answer_for_nvml(
    start_server: StartServer, gpus: StandInGpus
) -> None:
    """No driver at all: nothing is said, and the variables are left alone."""
    gpus.behave(init_error=9)
    server = start_server(SOURCE, CUDA_VISIBLE_DEVICES="5", **gpus.environment)
    assert devices(server) == [None]
    assert environment(server, "a", *DEVICE_VARIABLES)["CUDA_VISIBLE_DEVICES"] == "5"
    assert "NVML" not in server.log
    assert "Workers see no GPU" in server.log


def test_the_next_worker_waits_for_the_memory_of_the_last(
    start_server: StartServer, gpus: StandInGpus, tmp_path: Path
) -> None:
    """Its @init finds the GPU as empty as the first one did; the log says how long that took."""
    server = start_server(SOURCE, OGPU_WORKERS=1, **gpus.environment)
    gpus.change(0, used=41 * GIB)  # what the worker has taken
    assert server.run("hangs", "t")["state"] == "timed_out"
    wait_until(lambda: server.slot()["last_exit"] is not None, "the worker is gone")
    time.sleep(0.3)  # a claim that nothing happens: without the wait it takes 10 ms
    assert (server.slot()["state"], server.slot()["generation"]) == ("stopping", 1)
    gpus.change(0, used=GIB)
    wait_until(lambda: server.slot()["state"] == "ready", "the next worker is ready")
    assert (tmp_path / "used.txt").read_text().split() == [str(GIB), str(GIB)]
    server.wait_log("The memory of worker 0's device was back after")


def test_the_service_ends_while_a_slot_waits_for_memory(
    start_server: StartServer, gpus: StandInGpus
) -> None:
    server = start_server(SOURCE, OGPU_WORKERS=1, **gpus.environment)
    gpus.change(0, used=41 * GIB)
    assert server.run("hangs", "t")["state"] == "timed_out"
    wait_until(lambda: server.slot()["last_exit"] is not None, "the worker is gone")
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 3


def test_nvml_that_hangs_costs_nothing_but_the_figures(
    start_server: StartServer, gpus: StandInGpus
) -> None:
    """Tasks run, workers are replaced at once, the service ends; the figures go away."""
    server = start_server(SOURCE, OGPU_WORKERS=1, **gpus.environment)
    gpus.behave(hangs=True)
    wait_until(lambda: memory(server, "used") == {}, "the figures are too old", every_s=0.1)
    assert server.run("hangs", "t")["state"] == "timed_out"
    wait_until(lambda: server.slot()["generation"] == 2, "the worker is replaced", timeout_s=2)
    assert environment(server, "a", "CUDA_VISIBLE_DEVICES") == {"CUDA_VISIBLE_DEVICES": "0"}
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 3


def test_a_gpu_that_is_lost_ends_the_service(start_server: StartServer, gpus: StandInGpus) -> None:
    """Off the bus, though its device file is there: not ready, in words, then exit code 4."""
    server = start_server(SOURCE, **gpus.environment)
    gpus.change(1, error=15)
    wait_until(lambda: server.http.get("/readyz").json().get("reason") == "broken", "broken")
    detail = server.http.get("/readyz").json()["detail"]
    assert "GPU nvidia:1 is lost (NVML says: GPU is lost)" in detail
    assert server.wait_exit() == 4
