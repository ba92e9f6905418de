"""A source that tells about the task that runs: current_task(), progress, and much output."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time

from pydantic import BaseModel

import ogpu.service
from ogpu.service.errors import NoCurrentTaskError


class Input(BaseModel):
    text: str = ""
    number: float = 0
    go_on: str = ""  # a file that the handler waits for


class Output(BaseModel):
    text: str = ""
    number: float = 0


def wait_for_file(path: str) -> None:
    while path and not os.path.exists(path):
        time.sleep(0.01)


def ask_outside() -> str:
    try:
        return f"there is one: {ogpu.service.current_task()}"
    except NoCurrentTaskError as error:
        return f"{type(error).__name__}: {error}"


outside = {"import": ask_outside()}


@ogpu.service.init()
def load() -> None:
    outside["init"] = ask_outside()
    outside["address in @init"] = os.environ.get("OGPU_TASK_ADDRESS", "not set")


def facts() -> str:
    task = ogpu.service.current_task()
    child = "import os; print(os.environ.get('OGPU_TASK_ADDRESS'), end='')"
    found = {
        "address": task.address,
        "function": task.function,
        "attempt": task.attempt,
        "deadline": task.deadline and task.deadline.isoformat(),
        "deadline_s": task.deadline and task.deadline.timestamp(),
        "remaining": task.remaining,
        "now_s": time.time(),
        "environment": os.environ["OGPU_TASK_ADDRESS"],
        "subprocess": subprocess.check_output([sys.executable, "-c", child], text=True),
    }
    return json.dumps(found)


@ogpu.service.expose(timeout=30)
def tells(data: Input) -> Output:
    return Output(text=facts())


@ogpu.service.expose(timeout=30)
async def tells_async(data: Input) -> Output:
    await asyncio.sleep(0)
    ogpu.service.current_task().progress(0.5, "in a coroutine")
    return Output(text=await asyncio.to_thread(facts))


@ogpu.service.expose()
def tells_unlimited(data: Input) -> Output:
    wait_for_file(data.go_on)
    return Output(text=facts())


@ogpu.service.expose()
def tells_outside(data: Input) -> Output:
    return Output(text=json.dumps(outside))


@ogpu.service.expose()
def speaks(data: Input) -> Output:
    """Say a line, report, say another one after ``go_on``."""
    print("first line")
    ogpu.service.current_task().progress(0.5, "half")
    wait_for_file(data.go_on)
    print("second line")
    return Output(text="done")


@ogpu.service.expose()
def prints(data: Input) -> Output:
    """Print ``number`` lines, then wait for ``go_on``."""
    for number in range(int(data.number)):
        print(f"line {number}")
    wait_for_file(data.go_on)
    return Output(text="done")


@ogpu.service.expose()
def floods(data: Input) -> Output:
    """Print 900 lines of 8,000 characters a second, for ``number`` seconds."""
    end = time.monotonic() + data.number
    while time.monotonic() < end:
        print(("y" * 8000 + "\n") * 90, end="", flush=True)
        time.sleep(0.1)
    return Output(text="done")


@ogpu.service.expose()
def waits(data: Input) -> Output:
    wait_for_file(data.go_on)
    return Output(text=data.text)


@ogpu.service.expose()
def reports_often(data: Input) -> Output:
    """Report ``number`` times without a pause, 1.0 last, then wait for ``go_on``."""
    count = int(data.number)
    started = time.monotonic()
    for number in range(1, count + 1):
        ogpu.service.current_task().progress(number / count, f"step {number}")
    took = time.monotonic() - started
    print("all reported", flush=True)
    wait_for_file(data.go_on)
    return Output(number=took)


@ogpu.service.expose()
def reports(data: Input) -> Output:
    """Report what ``text`` says (an expression: the arguments), then wait for ``go_on``."""
    try:
        ogpu.service.current_task().progress(*eval(data.text))
        outcome = "accepted"
    except Exception as error:  # noqa: BLE001 - the answer
        outcome = f"{type(error).__name__}: {error}"
    wait_for_file(data.go_on)
    return Output(text=outcome)


@ogpu.service.expose()
def reports_from_a_thread(data: Input) -> Output:
    thread = threading.Thread(target=lambda: ogpu.service.current_task().progress(0.25, "thread"))
    thread.start()
    thread.join()
    wait_for_file(data.go_on)
    return Output()


@ogpu.service.expose()
def reports_from_a_child(data: Input) -> Output:
    """Report once, then fork a child that insists for longer than the pause between reports."""
    task = ogpu.service.current_task()
    task.progress(0.1, "parent")
    child = os.fork()
    if child == 0:
        for _ in range(30):
            task.progress(0.9, "child")
            time.sleep(0.01)
        os._exit(0)
    os.waitpid(child, 0)
    print("the child is gone", flush=True)
    wait_for_file(data.go_on)
    return Output()


@ogpu.service.expose()
def leaves_a_reporter(data: Input) -> Output:
    """Leave a thread behind that reports for ever.

    It makes the file ``text`` when it has reported for half a second while another task ran.
    """
    task = ogpu.service.current_task()

    def report() -> None:
        insisted = 0
        while True:
            task.progress(0.99, "ghost")
            insisted += os.environ.get("OGPU_TASK_ADDRESS", task.address) != task.address
            if insisted == 50:
                open(data.text, "w").close()
            time.sleep(0.01)

    threading.Thread(target=report, daemon=True).start()
    return Output(text="done")


@ogpu.service.expose()
def leaves_a_looker(data: Input) -> Output:
    """Leave a thread behind that makes the file ``text`` when nothing of the task is left."""

    def look() -> None:
        said = ask_outside()
        while said.startswith("there is one") or "OGPU_TASK_ADDRESS" in os.environ:
            time.sleep(0.01)
            said = ask_outside()
        with open(data.text + ".part", "w") as file:
            file.write(said.partition(":")[0])
        os.rename(data.text + ".part", data.text)

    threading.Thread(target=look, daemon=True).start()
    return Output(text="done")


ogpu.service.start()
