"""uvicorn's HTTP protocol, with one write a response. Runs in the front.

uvicorn writes a response's head and its body one after the other, and each write is a system call
that wakes the client, which is dear on a virtual machine. Here what is written within one step
of the event loop goes out together, when the step is over. Large pieces go out as they come, so
that the limits of the transport's buffer hold.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

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

    @property
    def is_deaf(self) -> bool:
        """True while the client does not take what is written for it."""
        return bool(self.flow.write_paused)

    def connection_lost(self, exc: Exception | None) -> None:
        self._coalescing.connection_lost()
        super().connection_lost(exc)
