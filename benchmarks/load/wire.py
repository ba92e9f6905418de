"""Both ends of a load in raw asyncio: connections that post tasks, and the sink for results.

A ``Book`` decides what is posted next and what an answer or a delivery means; subclasses know when
it is over. Whatever goes wrong first ends it, and is raised where ``over`` is awaited.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import httptools

from ..harness import HOST

_BACKLOG = 1024
_SINK_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


@dataclass
class Task:
    """One task, and when what happened to it."""

    client: Client
    text: str
    posted_at: float
    accepted_at: float | None = None
    delivered_at: float | None = None


class Book(ABC):
    """Every task of a run, and the first thing that went wrong."""

    def __init__(self, tag: str) -> None:
        self.tasks: dict[str, Task] = {}
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tag = tag

    @abstractmethod
    def post_next(self, client: Client) -> None:
        """Post a task on this connection, or none any more."""

    @abstractmethod
    def note_accepted(self, task: Task) -> None:
        """Go on: a task was accepted, and may have been delivered already."""

    @abstractmethod
    def note_delivered(self, task: Task) -> None:
        """Go on: a task was delivered, and its acceptance may not have been read yet."""

    def post(self, client: Client) -> None:
        address = f"{self._tag}-{len(self.tasks)}"
        task = Task(client, f"hello {address}", time.perf_counter())
        self.tasks[address] = task
        client.post(address, json.dumps({"text": task.text}))

    def accepted(self, address: str) -> None:
        task = self.tasks[address]
        task.accepted_at = time.perf_counter()
        self.note_accepted(task)

    def delivered(self, address: str, body: bytes) -> None:
        task = self.tasks.get(address)
        if task is None:
            self.fail(f"{address} was delivered, which this run has not posted")
        elif task.delivered_at is not None:
            self.fail(f"{address} was delivered twice")
        elif not _says(body, task.text):
            self.fail(f"{address} was delivered as {body[:200]!r}")
        else:
            task.delivered_at = time.perf_counter()
            self.note_delivered(task)

    def end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def fail(self, message: str) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(message))
        elif self.over.exception() is None:  # after the last delivery
            self.over = asyncio.get_running_loop().create_future()
            self.over.set_exception(RuntimeError(message))

    def missing(self) -> str:
        """Say how many tasks have not arrived, and which is the first of them."""
        lost = [address for address, task in self.tasks.items() if task.delivered_at is None]
        return f"{len(lost)} of {len(self.tasks)} tasks were not delivered, {lost[:1]} the first"


def _says(body: bytes, text: str) -> bool:
    try:
        return bool(json.loads(body) == {"text": text})
    except ValueError:
        return False


async def open_sink(book: Book, descriptor: int) -> asyncio.Server:
    """Take what is delivered at a socket that listens already."""
    listener = socket.socket(fileno=descriptor)
    return await asyncio.get_running_loop().create_server(
        lambda: _Sink(book), sock=listener, backlog=_BACKLOG
    )


async def open_clients(book: Book, port: int, path: str, number: int) -> list[Client]:
    loop = asyncio.get_running_loop()
    return [
        (await loop.create_connection(lambda: Client(book, port, path), HOST, port))[1]
        for _ in range(number)
    ]


class Client(asyncio.Protocol):
    """One connection: posts a task, and reads what is answered."""

    def __init__(self, book: Book, port: int, path: str) -> None:
        self._book = book
        self._head = f"POST {path}%s HTTP/1.1\r\nhost: {HOST}:{port}\r\n"
        self._head += "content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
        self._parser = httptools.HttpResponseParser(self)
        self._address = ""  # of the task that is not answered yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _: Exception | None) -> None:
        if self._address:  # an idle one may be closed
            self._book.fail(f"the connection was closed before {self._address} was answered")

    def post(self, address: str, body: str) -> None:
        if self._transport.is_closing():
            self._book.fail(f"the connection was closed before {address} was posted")
        self._address = address
        self._transport.write((self._head % (address, len(body), body)).encode())

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        address, self._address = self._address, ""
        if status in (200, 202):  # 200: the sink itself, when its limit is measured
            self._book.accepted(address)
        else:
            self._book.fail(f"{address} was answered {status}")


class _Sink(asyncio.Protocol):
    """One connection of the service: takes results, and answers 200 with no body."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._parser = httptools.HttpRequestParser(self)
        self._url = self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._transport.write(_SINK_OK)
        self._book.delivered(self._url.rpartition(b"/")[2].decode(), self._body)
        if not self._parser.should_keep_alive():
            self._transport.close()
