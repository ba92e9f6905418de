"""A receiver that says what a test has it say, byte by byte: what no well-behaved server does."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass(frozen=True)
class Request:
    """What has arrived: the head as text, and the body."""

    head: str
    body: bytes


@dataclass
class Talk:
    """One connection, as the receiver has it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> str:
        return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def request(self) -> Request:
        head = await self.head()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return Request(head, await self.reader.readexactly(length))

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hears_the_end(self) -> bool:
        """Wait until the other side hangs up; return False where it says something instead."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:  # it closed with our last words unread
            return True


@dataclass
class Receiver:
    """Where it listens, and what has come."""

    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/callback"


Script = Callable[[Talk, Receiver], Awaitable[None]]


@asynccontextmanager
async def receiving(
    script: Script, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """Have each connection go by the script; its end is the end of the connection."""
    receiver = Receiver()
    talks: set[asyncio.Task[None]] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())  # type: ignore[arg-type]
        receiver.connections += 1
        try:
            await script(Talk(reader, writer), receiver)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the other side has gone
        finally:
            writer.close()

    server = await asyncio.start_server(talk, host, 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


def answering(*answers: bytes) -> Script:
    """Answer the requests of each connection in this way, the last answer for ever."""

    async def script(talk: Talk, receiver: Receiver) -> None:
        left = list(answers)
        while True:
            receiver.requests.append(await talk.request())
            await talk.say(left.pop(0) if len(left) > 1 else left[0])

    return script
