"""A source that keeps a ledger: each run is written down before the handler does anything else.

What the service says of itself (states, attempts, times) can be compared with the ledger, which a
killed front cannot take back. A line is ``address attempt time``, in one write to a file that is
opened to append, so that lines of several processes neither mix nor get lost.
"""

import hashlib
import os
import signal
import subprocess
import time

from pydantic import BaseModel

import ogpu.service


class Input(BaseModel):
    text: str = ""
    number: float = 0


class Output(BaseModel):
    """What shows that the input came whole, and to the right task."""

    address: str
    function: str
    digest: str
    length: int


@ogpu.service.init()
def load() -> None:
    if awaited := os.environ.get("LEDGER_INIT_WAITS_FOR"):
        while not os.path.exists(awaited):
            time.sleep(0.01)


def note() -> None:
    task = ogpu.service.current_task()
    line = f"{task.address} {task.attempt} {time.time():.6f}\n"
    ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(ledger, line.encode())
    finally:
        os.close(ledger)


def answer(data: Input) -> Output:
    task = ogpu.service.current_task()
    return Output(
        address=task.address,
        function=task.function,
        digest=hashlib.sha256(data.text.encode()).hexdigest(),
        length=len(data.text),
    )


# --- those that succeed


@ogpu.service.expose()
def quick(data: Input) -> Output:
    note()
    return answer(data)


@ogpu.service.expose()
def slow(data: Input) -> Output:
    note()
    time.sleep(data.number)
    return answer(data)


@ogpu.service.expose()
def starts_a_process(data: Input) -> Output:
    """The process is in a session of its own: killed with the worker, or left over."""
    note()
    subprocess.run(["sleep", str(data.number)], check=True, start_new_session=True)
    return answer(data)


@ogpu.service.expose()
def waits_for_file(data: Input) -> Output:
    note()
    while not os.path.exists(data.text):
        time.sleep(0.01)
    return answer(data)


# --- those that do not


@ogpu.service.expose()
def fails(data: Input) -> Output:
    note()
    raise ValueError(f"no: {len(data.text)}")


@ogpu.service.expose(timeout=0.3)
def hangs(data: Input) -> Output:
    """It is killed at its deadline, and the process that it started with it."""
    note()
    subprocess.Popen(["sleep", "3600"], start_new_session=True).wait()
    return answer(data)


@ogpu.service.expose()
def kills_the_front(data: Input) -> Output:
    """What a task can do that takes the machine down with it, or the container."""
    note()
    os.kill(front(), signal.SIGKILL)
    time.sleep(3600)
    return answer(data)


def front() -> int:
    """Return the pid of the template's parent; the template is this worker's."""
    with open(f"/proc/{os.getppid()}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


if __name__ == "__main__":
    ogpu.service.start()
