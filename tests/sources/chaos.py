"""A source that misbehaves on demand: what a task's input names, at the moment that it names.

1. In the handler, at once or when the test says go.
2. While the answer is being sent, from a thread.
3. While the worker is idle, from a thread that the handler has left behind.
4. In @init: a file in $CHAOS_DIR/init names the fault, and one worker takes it.

A test hears of it by files in $CHAOS_DIR: `ADDRESS.acting`, then the fault, then `ADDRESS.acted` if
there is anybody left to say so; `ADDRESS.go` is the test's. `hits` lists the pids that are at fault
for more than their own task.
"""

import fcntl
import os
import sys
import termios
import threading
import time
from collections.abc import Callable

from chaos_faults import FAULTS, PLACE, hit, sockets
from pydantic import BaseModel

import ogpu.service
from ogpu.service.errors import NoCurrentTaskError


class Input(BaseModel):
    text: str = ""
    fault: str = "nothing"
    moment: str = "in_handler"
    size_bytes: int = 0


class Output(BaseModel):
    text: str = ""
    padding: str = ""


@ogpu.service.init()
def load() -> None:
    for wish in (PLACE / "init").iterdir():
        mine = PLACE / f"init.{os.getpid()}"
        try:
            wish.rename(mine)  # only one of several can do that
        except FileNotFoundError:
            continue
        perform(wish.name, "init")
        return


@ogpu.service.expose(timeout=6)
def echo(data: Input) -> Output:
    return Output(text=data.text)


@ogpu.service.expose(timeout=6)
def act(data: Input) -> Output:
    return misbehave(data)


@ogpu.service.expose(timeout=0.5)
def hang(data: Input) -> Output:
    return misbehave(data)


def misbehave(data: Input) -> Output:
    address = ogpu.service.current_task().address
    answer = Output(text=data.text, padding="x" * data.size_bytes)
    if data.moment == "in_handler":
        perform(data.fault, address)
    elif data.moment == "when_told":
        wait_for_go(address)
        perform(data.fault, address)
    else:
        until = {"while_answering": wait_until_answering, "idle": wait_for_go}[data.moment]
        arguments = (until, data.fault, address)
        threading.Thread(target=perform_later, args=arguments, daemon=True).start()
        if data.moment == "while_answering":
            wait_for_go(address)
    return answer


# --- when


def perform(fault: str, address: str) -> None:
    (PLACE / f"{address}.acting").write_text(str(os.getpid()))
    try:
        wait_for_go(address) if fault == "waits" else FAULTS[fault]()
    finally:
        (PLACE / f"{address}.acted").touch()


def perform_later(until: Callable[[str], bool], fault: str, address: str) -> None:
    if not until(address):
        return
    hit(os.getpid())  # by now another task may run here
    try:
        perform(fault, address)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this thread alone
        sys.stderr.write(f"{fault} was raised in a thread\n")


def wait_for_go(address: str) -> bool:
    (PLACE / f"{address}.waiting").touch()
    while not (PLACE / f"{address}.go").exists():
        time.sleep(0.002)
    return True


def wait_until_answering(address: str) -> bool:
    """Return False where nothing of an answer was seen: it was too quick."""
    limit = time.monotonic() + 5
    while time.monotonic() < limit and running_address() in (None, address):
        if main_is_sending() and any(map(bytes_on_the_way, sockets())):
            return True
        time.sleep(0.0005)
    return False


def running_address() -> str | None:
    """Return whose handler runs; the answer that is sent after it may be that of the next task."""
    try:
        return ogpu.service.current_task().address
    except NoCurrentTaskError:
        return None


def main_is_sending() -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "send" and frame.f_code.co_filename.endswith("channel.py"):
            return True
        frame = frame.f_back
    return False


def bytes_on_the_way(descriptor: int) -> bool:
    return any(fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0"))


ogpu.service.start()
