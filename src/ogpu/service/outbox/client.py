"""An HTTP/1.1 client for callbacks: POST to one receiver, over connections that are kept.

Runs in the front, on its event loop. The front is one busy core, and a general client (aiohttp)
took 65 to 90 µs of it for each callback, as much as all else that is done for its delivery.

1. A connection that is idle takes the request (``connection.py``); the one used last, so that the
   others can end.
2. The receiver had closed it meanwhile: the request goes out again, on a new one. That is safe, as
   a callback may arrive twice anyway.
3. There is none: look up the host, connect to whichever of its addresses answers first, with TLS
   where the URL says so.
4. All of it has to be over in OGPU_CALLBACK_TIMEOUT.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from aiohappyeyeballs import AddrInfoType, start_connection

from ..ending import end_all
from .connection import Answer, ClosedUnansweredError, Connection
from .target import Target

_ADDRESSES_KEPT_S = 10.0
_NEXT_ADDRESS_AFTER_S = 0.25  # RFC 8305 recommends it: an address that is silent costs no more


class Client:
    """Posts to one receiver, as often at once as it is asked to.

    Args:
        url: the address of a task is put behind it.
        timeout_s: how long a POST may take, all in all.

    Raises:
        ValueError: the URL has no host or no port.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._target = Target.parse(url)
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context() if self._target.is_secure else None
        self._idle: list[Connection] = []
        self._addresses = _Addresses(self._target)

    async def post(self, address: str, fields: str, body: bytes) -> Answer:
        """Post once, to ``{url}/{address}``.

        Args:
            address: of a task; all its characters may stand in a URL.
            fields: header fields of this request, each with the end of its line.
            body: what is posted.

        Raises:
            OSError: there is no connection, or no answer; the text says why.
        """
        target = self._target
        until = asyncio.get_running_loop().time() + self._timeout_s
        head = (
            f"POST {target.path}/{address} HTTP/1.1\r\n{target.fields}{fields}"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode()
        if self._idle:
            with contextlib.suppress(ClosedUnansweredError):
                return await self._idle.pop().exchange(head, body, until)
        connection = await self._connect(until)
        return await connection.exchange(head, body, until)

    async def close(self) -> None:
        """Close the connections, which are all idle: nothing is under way any more."""
        await self._addresses.close()
        for connection in list(self._idle):
            connection.abort()

    async def _connect(self, until: float) -> Connection:
        host, port = self._target.host, self._target.port
        try:
            left_s = until - asyncio.get_running_loop().time()
            return await asyncio.wait_for(self._open(), left_s)
        except asyncio.TimeoutError as error:
            raise TimeoutError(f"Cannot connect to {host}:{port} in time") from error
        except OSError as error:
            # start_connection() leaves frames that refer to the error, and the error to them.
            # Without its trace, which nobody reads, they do not keep what callers hold: the body.
            reason = error.with_traceback(None)
            raise ConnectionError(f"Cannot connect to {host}:{port}: {error}") from reason

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        opened = await start_connection(
            await self._addresses.get(), happy_eyeballs_delay=_NEXT_ADDRESS_AFTER_S, loop=loop
        )
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self._idle),
                sock=opened,
                ssl=self._tls,
                server_hostname=self._target.host.rstrip(".") if self._tls else None,
            )
        except BaseException:
            opened.close()
            raise
        return connection


class _Addresses:
    """The addresses of a host, which are kept for a moment; those who ask at once share a look-up.

    A look-up that hangs takes one of the few threads there are for them, and not one for each
    delivery.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._look_up: asyncio.Task[list[AddrInfoType]] | None = None
        self._kept_until = 0.0

    async def get(self) -> list[AddrInfoType]:
        loop = asyncio.get_running_loop()
        look_up = self._look_up
        if look_up is None or (look_up.done() and loop.time() >= self._kept_until):
            self._look_up = look_up = loop.create_task(self._ask())
            look_up.add_done_callback(_note_error)
        await asyncio.wait([look_up])  # who is cancelled here does not cancel it for the others
        return look_up.result()

    async def close(self) -> None:
        if self._look_up is not None:
            await end_all([self._look_up])

    async def _ask(self) -> list[AddrInfoType]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(
            self._target.host, self._target.port, type=socket.SOCK_STREAM
        )
        self._kept_until = loop.time() + _ADDRESSES_KEPT_S
        return list(found)


def _note_error(look_up: asyncio.Task[list[AddrInfoType]]) -> None:
    if not look_up.cancelled():
        look_up.exception()  # who asked may have gone: it is not to be reported as never retrieved
