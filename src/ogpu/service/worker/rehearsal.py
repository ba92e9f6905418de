"""The rehearsal: a standby that was forked goes from an order to its answer before it has one.

Runs in such a standby. A fork leaves its memory shared: the first write to each page copies it, and
the first look into each page of a library has to find it. From Launch to the first answer that is
some 450 pages, which took 1.5 of 3 ms (AMD EPYC, virtual). Nobody waits for a standby, so it does
then what a worker will do, with a handler of ours. Nothing of the source is run.
"""

from __future__ import annotations

import contextlib
import socket

from pydantic import BaseModel

from .. import wire
from ..handler import Handler
from . import output
from .channel import Channel
from .loop import Worker, become_worker

_LAUNCH = wire.Launch(
    slot=0,
    generation=0,
    max_result_bytes=1024,
    max_rss_bytes=None,
    temp_dir=None,
    log_level=None,
    environment={},
)


class _Line(BaseModel):
    text: str = ""


def _repeat(data: _Line) -> _Line:
    return data


_HANDLER = Handler(_repeat, _Line, _Line)
_ORDER = wire.Run(0, _HANDLER.name, "rehearsal", 1, None, None, may_be_asked=False)


def rehearse() -> None:
    """Do once what a worker does from its Launch to its first answer, but for @init."""
    become_worker(_LAUNCH)
    channel, fronts_end = socket.socketpair()
    with channel, fronts_end, contextlib.closing(output.StandardDescriptors()) as standard:
        fronts_end.sendall(b"\0")  # no orders ahead (``ahead.py``)
        fronts_end.sendall(wire.encode_frame(_ORDER, b'{"text": ""}'))
        fronts_end.shutdown(socket.SHUT_WR)
        worker = Worker(Channel(channel), _LAUNCH, {_HANDLER.name: _HANDLER}, None)
        worker.tell_ready(0.0)
        worker.serve(standard)
