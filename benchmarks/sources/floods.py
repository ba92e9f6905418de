"""A handler that writes to stdout for a while, as fast as it can, and one that answers."""

import os
import time

from pydantic import BaseModel

import ogpu.service

_BLOCK_BYTES = 64 * 1024


def _repeated(line: bytes) -> bytes:
    return line * (_BLOCK_BYTES // len(line))


BLOCKS = {
    "nothing": b"",
    "newlines": _repeated(b"\n"),
    "lines": _repeated(b"y" * 79 + b"\n"),
    "no newline": _repeated(b"x"),
    "records": _repeated(b'\x1e[20, "' + b"y" * 60 + b'"]\n'),
    "records of newlines": _repeated(b'\x1e[30, "' + b"\\n" * 8_000 + b'"]\n'),
    "binary": _repeated(bytes(range(256))),
}


class Flood(BaseModel):
    kind: str
    seconds: float


class Text(BaseModel):
    text: str


@ogpu.service.expose()
def flood(data: Flood) -> Text:
    """Answer how many bytes were written."""
    block, written, limit = BLOCKS[data.kind], 0, time.monotonic() + data.seconds
    while time.monotonic() < limit:
        if block:
            written += os.write(1, block)
        else:
            time.sleep(0.01)
    return Text(text=str(written))


@ogpu.service.expose()
def echo(data: Text) -> Text:
    return data


if __name__ == "__main__":
    ogpu.service.start()
