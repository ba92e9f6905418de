"""The outbox's client in a test: on the front's kind of loop, with a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from ogpu.service.outbox.client import Client
from ogpu.service.outbox.connection import Answer

TYPE = "content-type: application/json\r\n"


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on the loop that the front has, with a bound."""

    async def bounded() -> None:
        await asyncio.wait_for(main, 15)

    uvloop.run(bounded())


@asynccontextmanager
async def client_of(url: str, timeout_s: float = 10) -> AsyncIterator[Client]:
    client = Client(url, timeout_s)
    try:
        yield client
    finally:
        await client.close()
        await asyncio.sleep(0)  # the connections are closed in the loop's next step


async def posted(client: Client, count: int = 1, body: bytes = b"{}") -> list[Answer]:
    return [await client.post(f"a{number}", TYPE, body) for number in range(count)]


async def fails(client: Client, error: type[OSError], words: str, body: bytes = b"{}") -> None:
    with pytest.raises(error, match=words):
        await client.post("a", TYPE, body)
