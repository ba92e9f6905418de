"""Handlers that take several tasks at once, and what can go wrong with them.

``text`` of an input says what is to happen to it; every output says how many ran together.
"""

import os
import signal
import time
from pathlib import Path

from pydantic import BaseModel, field_validator

import ogpu.service

GO = Path(os.environ.get("TEST_GO", "/nonexistent"))


class Input(BaseModel):
    text: str = ""

    @field_validator("text")
    @classmethod
    def fits(cls, text: str) -> str:
        if ogpu.service.current_tasks():  # in a worker alone
            if text == "unfit":
                raise KeyError(text)
            if text == "slow":
                time.sleep(3600)
        return text


class Output(BaseModel):
    text: str
    size: int
    pid: int
    addresses: list[str]


class Plain(BaseModel):
    text: str = ""


def report_and_wait() -> None:
    tasks = ogpu.service.current_tasks()
    tasks[0].progress(0.5, f"half of {tasks[0].address}")
    while not GO.exists():
        time.sleep(0.01)


class CostlyError(Exception):
    """Says how often it has been put into words."""

    told = 0

    def __str__(self) -> str:
        self.told += 1
        return f"the batch, {self.told}"


def raise_one() -> None:
    raise CostlyError


def kill_the_front() -> None:
    time.sleep(0.2)  # until the disk knows that it runs
    template = Path(f"/proc/{os.getppid()}/stat").read_text()
    os.kill(int(template.rpartition(")")[2].split()[1]), signal.SIGKILL)
    time.sleep(3600)


# What the text of one input does to the whole batch; what comes of it is returned, if anything.
SPOILS = {
    "progress": report_and_wait,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill_the_front": kill_the_front,
    "raise": raise_one,
    "short": list,
    "number": lambda: 0,
    "current_task": ogpu.service.current_task,
}


@ogpu.service.expose(timeout=20, batch_size=4, batch_window=0.05)
def together(items: list[Input]) -> list[Output]:
    print("together:", *(item.text for item in items))
    for item in items:
        spoilt = SPOILS.get(item.text, lambda: None)()
        if spoilt is not None:
            return spoilt
    return [result(item, len(items)) for item in items]


def result(item: Input, size: int) -> Output | Plain | Exception:
    if item.text == "fail":
        return ValueError("this one")
    if item.text == "wrong":
        return Plain()
    addresses = [task.address for task in ogpu.service.current_tasks()]
    return Output(text=item.text, size=size, pid=os.getpid(), addresses=addresses)


@ogpu.service.expose(timeout=20, batch_size=3, batch_window=30)
async def patient(items: list[Input]) -> list[Output]:
    return [Output(text=i.text, size=len(items), pid=os.getpid(), addresses=[]) for i in items]


@ogpu.service.expose(timeout=0.3, batch_size=4, batch_window=0.05)
def hangs(items: list[Input]) -> list[Output]:
    time.sleep(3600)
    return []


@ogpu.service.expose(timeout=0.3, grace=20, batch_size=4, batch_window=0.05)
def stops(items: list[Input]) -> list[Output]:
    try:
        time.sleep(3600)
    except ogpu.service.TaskTimeout:
        print("stopped")
    return [Output(text=i.text, size=len(items), pid=os.getpid(), addresses=[]) for i in items]


@ogpu.service.expose(timeout=0.3, grace=20, batch_size=4, batch_window=0.05)
def ignores(items: list[Input]) -> list[Output]:
    try:
        time.sleep(3600)
    except ogpu.service.TaskTimeout:
        print("asked")
    time.sleep(3600)
    return []


@ogpu.service.expose()
def plain(item: Plain) -> Plain:
    return item


@ogpu.service.expose()
def blocks(item: Plain) -> Plain:
    while not GO.exists():
        time.sleep(0.01)
    return item


ogpu.service.start()
