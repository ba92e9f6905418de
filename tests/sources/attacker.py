"""A source whose handlers take hold of their worker's channel to the front, and abuse it."""

import fcntl
import json
import os
import socket
import stat
import struct
import sys
import time

from pydantic import BaseModel

import ogpu.service
from ogpu.service import wire


class Input(BaseModel):
    how: str = ""
    number: int = 0
    text: str = ""


class Output(BaseModel):
    text: str = ""


def channel() -> socket.socket:
    """Find the worker's channel: its only stream socket."""
    for name in os.listdir("/proc/self/fd"):
        try:
            is_socket = stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode)
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
        if is_socket:
            found = socket.socket(fileno=os.dup(int(name)))
            if (found.family, found.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
                return found
            found.close()
    raise LookupError("no channel")


def own_run() -> int:
    """Find the number of the order that runs, which is none of a handler's business."""
    frame = sys._getframe()
    while "order" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["order"].run


def lengths(header: int, payload: int) -> bytes:
    return struct.pack("!II", header, payload)


def raw(header: str) -> bytes:
    return lengths(len(header), 0) + header.encode()


def framed(message: wire.Message, payload: bytes = b"") -> bytes:
    return wire.encode_frame(message, payload)


def answer(text: str = "forged", run: int | None = None) -> bytes:
    result = b'{"text":"%s"}' % text.encode()
    done = wire.Done(own_run() if run is None else run, False, wire.checksum(result))
    return framed(done, result)


def progress(message: str | None = None) -> bytes:
    return framed(wire.Progressed(own_run(), 0.5, message))


def wait_for_file(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.01)


GARBAGE = {
    "4 GiB of payload": lambda: lengths(10, 2**32 - 1),
    "4 GiB of header": lambda: lengths(2**32 - 1, 0),
    "ones": lambda: b"\xff" * 2**20,
    "zeros": lambda: bytes(2**20),
    "text": lambda: b"print to the wrong descriptor\n" * 1000,
    "no message": lambda: raw('["Nothing"]'),
    "wrong type": lambda: raw('["Done", "1", true]'),
    "deep": lambda: raw("[" * 100_000),
    "huge number": lambda: raw('["Done", 1' + "0" * 100_000 + ", true]"),
    "no reason": lambda: framed(wire.Failed(own_run(), "bad luck", "", None, None)),
    "no reason to recycle": lambda: framed(
        wire.Done(own_run(), False, wire.checksum(b"{}"), "tired"), b"{}"
    ),
    "progress without end": lambda: progress() * 1_000_000,
    "answers without end": lambda: answer(run=10**6) * 200_000,
    "failed inits without end": lambda: framed(wire.InitFailed("E", "m", "t" * 10_000)) * 10_000,
    "large headers without end": lambda: progress("x" * (wire.MAX_HEADER_BYTES - 100)) * 200,
    "no fraction": lambda: framed(wire.Progressed(own_run(), float("nan"), None)),
    "launch": lambda: framed(wire.Launch(0, 1, 1, None, None, "INFO", {})),
    "launched": lambda: framed(wire.Launched(0, 1, 1, was_standby=False)),
    "gone": lambda: framed(wire.Gone(0, 1, 0, None)),
    "run": lambda: framed(wire.Run(1, "echo", "a", 1, None, None, False)),
}
ODD = {
    "somebody else's answer": lambda: answer(run=10**6),
    "ready again": lambda: framed(wire.Ready(wire.PROTOCOL_VERSION, [], 0.0)),
    "failed init": lambda: framed(wire.InitFailed("E", "none", "none")),
    "payload of a progress": lambda: framed(wire.Progressed(own_run(), 0.5, None), bytes(10**6)),
}


@ogpu.service.expose()
def echo(data: Input) -> Output:
    return Output(text=data.text)


@ogpu.service.expose()
def names(data: Input) -> Output:
    return Output(text=json.dumps(list({"garbage": GARBAGE, "odd": ODD}[data.how])))


@ogpu.service.expose(timeout=30)
def waits(data: Input) -> Output:
    wait_for_file(data.text)
    return Output(text="undisturbed")


@ogpu.service.expose(timeout=30)
def writes_garbage(data: Input) -> Output:
    """Write it, and wait for what comes of it."""
    channel().sendall(GARBAGE[data.how]())
    time.sleep(60)
    return Output()


@ogpu.service.expose(timeout=30)
def says(data: Input) -> Output:
    """Say what a worker may say, though not now; and go on."""
    channel().sendall(ODD[data.how]())
    return Output(text="own")


@ogpu.service.expose(timeout=30)
def answers_itself(data: Input) -> Output:
    """Answer ``number`` times, byte by byte, and then as everybody does."""
    ours = channel()
    for byte in answer() * data.number:
        ours.sendall(bytes([byte]))
    return Output(text="own")


@ogpu.service.expose(timeout=30)
def dies_in_a_frame(data: Input) -> Output:
    """Die when ``number`` bytes of the answer are written."""
    channel().sendall(answer("x" * 100_000)[: data.number])
    os._exit(3)


@ogpu.service.expose(timeout=1)
def begins_a_frame(data: Input) -> Output:
    """Write most of a frame of ``number`` bytes; the worker's answer becomes a part of it."""
    header = b'["Done",1,false,0,null]' if data.text == "as a result" else b"0123456789"
    channel().sendall(lengths(len(header), data.number) + header + bytes(data.number - 10**6))
    return Output(text="swallowed")


@ogpu.service.expose(timeout=30)
def answers_and_spoils(data: Input) -> Output:
    """Give the answer, and then garbage: the front has sent another order meanwhile."""
    wait_for_file(data.text)
    channel().sendall(answer() + b"\xff" * 100)
    time.sleep(60)
    return Output()


@ogpu.service.expose(timeout=30)
def spoils(data: Input) -> Output:
    """Spoil the channel itself, and return."""
    ours = channel()
    if data.how == "non-blocking":
        fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_NONBLOCK)
    else:
        ours.shutdown({"read": socket.SHUT_RD, "write": socket.SHUT_WR}[data.how])
    return Output(text="own")


@ogpu.service.expose(timeout=30)
def big(data: Input) -> Output:
    return Output(text="x" * data.number)


ogpu.service.start()
