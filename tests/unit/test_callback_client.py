"""The client of the outbox, against receivers that do what they should not, and what they may."""

from __future__ import annotations

import asyncio
import gc
import sys

import pytest

from ogpu.service.outbox import connection as connection_module
from ogpu.service.outbox.client import Client
from ogpu.service.outbox.connection import Answer
from support.callback_client import TYPE, client_of, fails, posted, run
from support.receiver import OK, Receiver, Talk, answering, receiving

LARGE = b"x" * 5_000_000

CLOSE = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"


# --- connections are kept


def test_a_connection_takes_one_request_after_the_other() -> None:
    """And a request says no more than it has to."""

    async def main() -> None:
        async with receiving(answering(OK)) as receiver, client_of(receiver.url) as client:
            assert await posted(client, 3) == [Answer(200, None)] * 3
            assert receiver.connections == 1
            lines = receiver.requests[1].head.split("\r\n")
            version = lines.pop(2)
            assert version.startswith("user-agent: ogpu-service/")
            assert lines == [
                "POST /callback/a1 HTTP/1.1",
                f"host: 127.0.0.1:{receiver.port}",
                "accept: */*",
                "content-type: application/json",
                "content-length: 2",
                "",
                "",
            ]

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx: y\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\nretry-after: 9\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nupgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok",
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_after_a_whole_answer_of_any_form_it_is_free(answer: bytes, at_once: bool) -> None:
    async def script(talk: Talk, _: Receiver) -> None:
        while True:
            await talk.request()
            for piece in [answer] if at_once else [answer[i : i + 1] for i in range(len(answer))]:
                await talk.say(piece)
                await asyncio.sleep(0)

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            for status, retry_after in await posted(client, 2):
                assert (status // 100, retry_after) == (2, None)
            assert receiver.connections == 1

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        CLOSE,
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n" + b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000,  # and on, until it hangs up
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nno chunk",
        OK + b"and more",
        OK + OK,
        OK + b"HTTP/1.1 500 ",
    ],
)
def test_after_any_other_answer_it_is_not_used_again(answer: bytes) -> None:
    """The answer counts, though."""

    async def main() -> None:
        async with receiving(answering(answer)) as receiver, client_of(receiver.url) as client:
            assert await posted(client, 2) == [Answer(200, None)] * 2
            assert receiver.connections == 2

    run(main())


def test_what_is_said_without_being_asked_ends_it() -> None:
    async def script(talk: Talk, receiver: Receiver) -> None:
        await talk.request()
        await talk.say(OK)
        if receiver.connections == 1:
            await said.wait()
            await talk.say(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n")
            assert await talk.hears_the_end()
            heard.set()
        await talk.hears_the_end()

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            await posted(client)
            said.set()
            await heard.wait()
            assert await posted(client) == [Answer(200, None)]
            assert receiver.connections == 2

    said, heard = asyncio.Event(), asyncio.Event()
    run(main())


def test_a_connection_that_idles_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_IDLE_S", 0.1)
    ended = asyncio.Event()

    async def script(talk: Talk, _: Receiver) -> None:
        await talk.request()
        await talk.say(OK)
        assert await talk.hears_the_end()
        ended.set()

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            await posted(client)
            await ended.wait()
            await asyncio.sleep(0)
            assert client._idle == []

    run(main())


def test_a_request_may_take_longer_than_a_connection_may_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The timer was set for the idleness before it, and rings within it."""
    monkeypatch.setattr(connection_module, "_IDLE_S", 0.1)

    async def script(talk: Talk, _: Receiver) -> None:
        while True:
            await talk.request()
            await asyncio.sleep(0.25)
            await talk.say(OK)

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            assert await posted(client, 2) == [Answer(200, None)] * 2
            assert receiver.connections == 1

    run(main())


@pytest.mark.parametrize("when", ["after its answer", "as the next request comes"])
def test_a_kept_connection_that_was_closed_is_replaced(when: str) -> None:
    """Closed before an answer has begun: the request goes out once more, and nobody hears of it."""

    async def script(talk: Talk, receiver: Receiver) -> None:
        await talk.request()
        await talk.say(OK)
        if receiver.connections > 1 or when != "after its answer":
            await talk.request()

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            assert await posted(client, 3) == [Answer(200, None)] * 3
            assert receiver.connections >= 2

    run(main())


def test_a_request_goes_out_twice_at_most() -> None:
    async def script(talk: Talk, receiver: Receiver) -> None:
        receiver.requests.append(await talk.request())
        if receiver.connections == 1:
            await talk.say(OK)
            receiver.requests.append(await talk.request())

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            await posted(client)
            await fails(client, ConnectionError, "hung up without an answer")
            assert (receiver.connections, len(receiver.requests)) == (2, 3)

    run(main())


# --- what is an answer, and what is none


def test_retry_after_is_handed_on() -> None:
    answer = b"HTTP/1.1 503 Busy\r\nRETRY-AFTER: 7\r\ncontent-length: 0\r\n\r\n"

    async def main() -> None:
        async with receiving(answering(answer, OK)) as receiver, client_of(receiver.url) as client:
            assert await posted(client, 2) == [Answer(503, "7"), Answer(200, None)]

    run(main())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.9\r\n", "not HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "exceeds 65536 bytes"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 3000, "exceeds 65536 bytes"),
    ],
)
def test_what_is_no_answer_is_told_in_words(answer: bytes, words: str) -> None:
    async def main() -> None:
        async with receiving(answering(answer)) as receiver, client_of(receiver.url) as client:
            await fails(client, ConnectionError, words)

    run(main())


def test_a_change_of_protocols_is_an_answer_that_is_no_success() -> None:
    answer = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"

    async def main() -> None:
        async with receiving(answering(answer)) as receiver, client_of(receiver.url) as client:
            assert await posted(client, 2) == [Answer(101, None)] * 2
            assert receiver.connections == 2

    run(main())


@pytest.mark.parametrize(
    ("said", "words"), [(b"", "without an answer"), (b"HTTP/1.1 200 O", "within its answer")]
)
def test_hanging_up_is_no_answer(said: bytes, words: str) -> None:
    async def script(talk: Talk, _: Receiver) -> None:
        await talk.request()
        await talk.say(said)

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            await fails(client, ConnectionError, words)

    run(main())


def test_hanging_up_at_once_is_no_answer() -> None:
    """Before the request is sent, or while it is."""

    async def script(_: Talk, __: Receiver) -> None:
        return

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            for body in (b"{}", LARGE):
                await fails(client, ConnectionError, "hung up", body)

    run(main())


def test_the_head_is_the_answer_though_its_body_never_ends() -> None:
    async def script(talk: Talk, _: Receiver) -> None:
        await talk.request()
        await talk.say(b"HTTP/1.1 202 Accepted\r\ncontent-length: 9\r\n\r\n")
        await talk.hears_the_end()

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url, 0.2) as client:
            assert await posted(client) == [Answer(202, None)]

    run(main())


def test_what_could_not_be_delivered_is_not_kept() -> None:
    """Not even until the next collection: a receiver in trouble could cost the front its memory."""

    async def script(talk: Talk, receiver: Receiver) -> None:
        await talk.request()
        await talk.say(b"HTTP/1.1 200 OK\r\nx: ")
        if receiver.connections > 1:  # the first hears that it hangs up, the second nothing
            await talk.hears_the_end()

    async def attempt(client: Client, what: bytes) -> str:
        try:
            await client.post("a", TYPE, what)
        except OSError as error:
            return str(error)
        return "delivered"

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url, 0.2) as client:
            said = [await attempt(client, body), await attempt(client, body)]
        async with client_of(receiver.url) as client:
            said.append(await attempt(client, body))
        assert [words in text for words, text in zip(expected, said, strict=True)] == [True] * 3

    expected = ["hung up", "in time", "Cannot connect"]
    body = b"x" * 1000
    gc.collect()
    gc.disable()
    try:
        before = sys.getrefcount(body)
        run(main())
        assert sys.getrefcount(body) == before
    finally:
        gc.enable()
