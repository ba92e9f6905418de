"""Which way a request takes: asked of the protocol itself, with nothing behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from ogpu.service.http.clients import ClientLimits
from ogpu.service.http.protocol import Answer
from ogpu.service.http.run import Reply
from ogpu.service.http.shortcut import shortcut_protocol
from ogpu.service.http.whole import BegunRequest, WholeRequest

HEAD = b"POST /run/echo/a HTTP/1.1\r\nhost: h\r\n"


class ShortWay:
    """Takes whatever it is given."""

    def expects(self, begun: BegunRequest) -> bool:
        return begun.missing > 0

    def begin(self, request: WholeRequest, reply: Reply) -> Answer:
        del reply
        return 200, b"short:" + request.body


async def long_way(scope: Any, receive: Any, send: Any) -> None:
    del scope, receive
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}
    )
    await send({"type": "http.response.body", "body": b"long"})


async def answer_to(*pieces: bytes) -> bytes:
    protocol = shortcut_protocol(ClientLimits(10, 65_536, 5.0), ShortWay())
    config = uvicorn.Config(long_way, http=protocol, ws="none", lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.01)  # so that they are two reads: with one, the answer is the same
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = await asyncio.wait_for(reader.readexactly(length), 5)
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    return body


def test_what_is_usual_takes_the_short_way() -> None:
    """Whole, or with some of its body still to come."""
    assert asyncio.run(answer_to(HEAD + b"content-length: 2\r\n\r\n{}")) == b"short:{}"
    assert asyncio.run(answer_to(HEAD + b"content-length: 2\r\n\r\n{", b"}")) == b"short:{}"


def test_what_is_unusual_takes_the_long_way() -> None:
    """A head in two pieces, and another path."""
    assert asyncio.run(answer_to(HEAD, b"content-length: 2\r\n\r\n{}")) == b"long"
    assert asyncio.run(answer_to(b"GET /healthz HTTP/1.1\r\nhost: h\r\n\r\n")) == b"long"
