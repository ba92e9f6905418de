"""Waiting awake costs next to nothing where there is nothing to be expected at once."""

from __future__ import annotations

import psutil

from conftest import StartServer

LONG_S = 0.6
SOURCE = """
import time
import ogpu.service
from pydantic import BaseModel

class Time(BaseModel):
    seconds: float

@ogpu.service.expose(timeout=30)
def sleep(data: Time) -> Time:
    time.sleep(data.seconds)
    return data

ogpu.service.start()
"""


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_a_long_handler_costs_no_cpu_time(start_server: StartServer) -> None:
    """Short tasks teach the front to wait awake; a long one of that function has it sleep."""
    server = start_server(SOURCE)
    pids = [server.process.pid, server.slot()["pid"]]
    for number in range(20):
        server.run("sleep", f"short-{number}", {"seconds": 0})
    before = [cpu_s(pid) for pid in pids]
    server.run("sleep", "long", {"seconds": LONG_S})
    for pid, used_s in zip(pids, before, strict=True):
        assert cpu_s(pid) - used_s < LONG_S / 4
