"""A source whose handlers print far too much, or do odd things to where they print to."""

import contextlib
import fcntl
import io
import os
import signal
import subprocess
import sys
import threading
import time

from pydantic import BaseModel

import ogpu.service
from ogpu.service import wire


class Input(BaseModel):
    text: str = ""
    number: float = 0


class Output(BaseModel):
    text: str = ""


BLOCKS = {
    "empty lines": b"\n" * 65_536,
    "lines": (b"y" * 79 + b"\n") * 819,
    "no end of a line": b"x" * 65_536,
    "records of many lines": (wire.encode_log(30, "\n" * 8000).encode() + b"\n") * 4,
    "brackets": b"\x1e" + b"[" * 65_000 + b"\n",
    "binary": bytes(range(256)) * 256,
}


class TooMuchError(Exception):
    pass


def wait_for_file(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.01)


@ogpu.service.expose()
def echo(data: Input) -> Output:
    return Output(text=data.text)


@ogpu.service.expose(timeout=30)
def floods(data: Input) -> Output:
    """Write for ``number`` seconds, then a last line, and fail."""
    limit = time.monotonic() + data.number
    while time.monotonic() < limit:
        os.write(1, BLOCKS[data.text])
    os.write(2, b"\nthe end")
    raise TooMuchError


@ogpu.service.expose(timeout=30)
def floods_and_dies(data: Input) -> Output:
    for _ in range(200):
        os.write(1, BLOCKS["lines"])
    os.write(1, b"last words\n")
    os.kill(os.getpid(), signal.SIGKILL)
    return Output()


@ogpu.service.expose(timeout=30)
def enlarges_the_pipe(data: Input) -> Output:
    """Leave a whole MiB in the pipe, and fail at once."""
    fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 2**20)
    os.write(1, (BLOCKS["lines"] * 16)[: 2**20 - 9] + b"\nthe end\n")
    raise TooMuchError


@ogpu.service.expose(timeout=30)
def makes_it_nonblocking(data: Input) -> Output:
    """Write until it would have to wait, a hundred times, and fail."""
    os.set_blocking(1, False)
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(1, BLOCKS["lines"])
        time.sleep(0.001)
    os.set_blocking(1, True)
    print("the end")
    raise TooMuchError


@ogpu.service.expose(timeout=30)
def closes_both(data: Input) -> Output:
    """Close 1 and 2, and print all the same."""
    os.closerange(1, 3)
    for _ in range(1000):
        with contextlib.suppress(OSError):
            print("to nowhere")
    return Output(text="done")


@ogpu.service.expose(timeout=30)
def replaces_stdout(data: Input) -> Output:
    """Put a text in the place of stdout; what others print is shown as ever."""
    sys.stdout = io.StringIO()
    print("only here")
    subprocess.run(["echo", "from a subprocess"], check=True)
    raise TooMuchError


@ogpu.service.expose(timeout=30)
def leaves_threads(data: Input) -> Output:
    """Leave four threads behind that print for ``number`` seconds."""
    limit = time.monotonic() + data.number

    def go_on() -> None:
        while time.monotonic() < limit:
            os.write(1, BLOCKS["lines"])

    for _ in range(4):
        threading.Thread(target=go_on, daemon=True).start()
    return Output(text="done")


@ogpu.service.expose(timeout=30)
def leaves_a_child(data: Input) -> Output:
    """Leave a child in a session of its own, which prints for ever, or sleeps with the pipe."""
    child = subprocess.Popen(data.text.split(), start_new_session=True)
    return Output(text=str(child.pid))


@ogpu.service.expose(timeout=0.5)
def hangs(data: Input) -> Output:
    time.sleep(60)
    return Output()


@ogpu.service.expose(timeout=30)
def prints_when_told(data: Input) -> Output:
    """Wait for ``text``, then print 10 MB and a last line."""
    wait_for_file(data.text)
    with open(data.text + ".begun", "w"):
        pass
    for _ in range(160):
        os.write(1, BLOCKS["lines"])
    print("the end")
    raise TooMuchError


ogpu.service.start()
