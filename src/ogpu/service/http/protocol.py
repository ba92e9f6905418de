"""uvicorn's HTTP protocol, with one write a response. Runs in the front.

uvicorn writes a response's head and its body one after the other, and each write is a system call
that wakes the client, which is dear on a virtual machine. Here what is written within one step
of the event loop goes out together, when the step is over. Large pieces go out as they come, so
that the limits of the transport's buffer hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, cast

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_COALESCED_BYTES = 16 * 1024


class _CoalescingTransport:
    """A transport that keeps small writes until the loop's step is over."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._kept: list[bytes] = []
        self._is_lost = False

    def write(self, data: bytes) -> None:
        if not self._kept and len(data) <= _COALESCED_BYTES:
            self._loop.call_soon(self._flush)
            self._kept.append(data)
            return
        self._kept.append(data)
        if len(data) > _COALESCED_BYTES:
            self._flush()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def connection_lost(self) -> None:
        """Drop what is written from now on: uvicorn goes on answering pipelined requests."""
        self._is_lost = True

    def write_now(self, parts: list[bytes]) -> None:
        """Write without waiting for the end of the step: it is a whole answer."""
        self._flush()
        if self._is_lost:
            return
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)

    def _flush(self) -> None:
        kept, self._kept = self._kept, []
        if kept and not self._is_lost:
            self._transport.write(kept[0] if len(kept) == 1 else b"".join(kept))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a transport has
        return getattr(self._transport, name)


class OneWriteProtocol(HttpToolsProtocol):
    """uvicorn's protocol on a transport that coalesces."""

    def connection_made(  # type: ignore[override]  # as uvicorn itself declares it
        self, transport: asyncio.Transport
    ) -> None:
        self._coalescing = _CoalescingTransport(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self._coalescing))

    def write_now(self, parts: list[bytes]) -> None:
        """Write a whole answer."""
        self._coalescing.write_now(parts)

    @property
    def is_deaf(self) -> bool:
        """True while the client does not take what is written for it."""
        return bool(self.flow.write_paused)

    def connection_lost(self, exc: Exception | None) -> None:
        self._coalescing.connection_lost()
        super().connection_lost(exc)


# A status, and the JSON that goes with it, which may be in parts: a large one is not copied.
Answer = Response | tuple[int, bytes | list[bytes]]


def encoded(answer: Answer, common_lines: bytes) -> list[bytes]:
    """Return an answer as it goes out; ``common_lines`` are header lines that all answers have."""
    if isinstance(answer, tuple):
        status, body = answer
        parts = [body] if isinstance(body, bytes) else body
        size = sum(map(len, parts))
        own_lines = b"content-type: application/json\r\ncontent-length: %d\r\n" % size
    else:
        status, parts = answer.status_code, [bytes(answer.body)]
        size = len(parts[0])
        own_lines = header_lines(answer.raw_headers)
    head = b"%b%b%b\r\n" % (_STATUS_LINES[status], common_lines, own_lines)
    return [b"".join((head, *parts))] if size <= _COALESCED_BYTES else [head, *parts]


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers as they go out."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}
