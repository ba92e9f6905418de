"""A source whose tasks are short as a rule, so that orders are ahead of what its worker runs."""

import array
import contextlib
import fcntl
import os
import socket
import stat
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

import ogpu.service

FOLDER = Path(os.environ["AHEAD_FOLDER"])


class Step(BaseModel):
    do: str = "nothing"


class Told(BaseModel):
    pid: int
    attempt: int
    left_s: float


def _sockets_of_orders() -> Iterator[int]:
    """Give the descriptors of sockets of packets: a worker has one."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed the folder
            descriptor = int(name)
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as one:
                    if one.type == socket.SOCK_SEQPACKET:
                        yield descriptor


def _wait_for_orders() -> None:
    """Say how many bytes of orders are ahead, until the test lets this task go on."""
    (descriptor,) = _sockets_of_orders()
    there = array.array("i", [0])
    while not (FOLDER / "go").exists():
        fcntl.ioctl(descriptor, termios.FIONREAD, there)
        (FOLDER / "ahead.new").write_text(str(there[0]))
        (FOLDER / "ahead.new").rename(FOLDER / "ahead")
        time.sleep(0.002)


@ogpu.service.expose(timeout=2)
def step(data: Step) -> Told:
    task = ogpu.service.current_task()
    told = Told(pid=os.getpid(), attempt=task.attempt, left_s=task.remaining or 0)
    with (FOLDER / "ran").open("a") as ran:
        ran.write(f"{task.address}\n")
    match data.do:
        case "wait":
            _wait_for_orders()
        case "die":
            _wait_for_orders()
            os._exit(3)
        case "fail":
            _wait_for_orders()
            raise ValueError("as it was told to")
        case "leave":
            _wait_for_orders()
            raise ogpu.service.RecycleWorker("as it was told to")
        case "print":
            print(f"this is {task.address}")
        case "close":
            for descriptor in list(_sockets_of_orders()):
                os.close(descriptor)
    return told


ogpu.service.start()
