"""The client of the outbox, against receivers that do what they should not, and what they may."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
import uvloop

from ogpu.service.outbox import client as client_module
from ogpu.service.outbox import connection as connection_module
from ogpu.service.outbox.client import Client
from ogpu.service.outbox.connection import Answer, Connection
from ogpu.service.outbox.target import Target
from support.receiver import OK, Receiver, Script, Talk, answering, receiving

SELF_SIGNED = Path(__file__).parents[1] / "support" / "self_signed.pem"
TYPE = "content-type: application/json\r\n"
LARGE = b"x" * 5_000_000
CLOSE = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"


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


def tls_receiving(script: Script) -> AbstractAsyncContextManager[Receiver]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(SELF_SIGNED)
    return receiving(script, tls=context)


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


# --- time


@pytest.mark.parametrize("body", [b"{}", LARGE])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nx: "])
def test_a_silent_receiver_is_left_in_time(body: bytes, said: bytes) -> None:
    """It takes nothing of a large body, either. On a connection that is kept, too."""

    async def script(talk: Talk, _: Receiver) -> None:
        await talk.request()
        await talk.say(OK)
        await talk.head()
        await talk.say(said)
        await asyncio.sleep(10)

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url, 0.2) as client:
            await posted(client)
            started = time.monotonic()
            await fails(client, TimeoutError, "not answered in time", body)
            assert 0.1 < time.monotonic() - started < 5

    run(main())


def test_a_look_up_that_hangs_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for it is told in time; a later attempt joins it."""
    asked, go_on = [], threading.Event()

    def look_up(host: str, *_: object, **__: object) -> object:
        asked.append(host)
        go_on.wait(10)
        raise socket.gaierror("nobody of that name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)  # uvloop would not ask it

    async def main() -> None:
        async with client_of("http://receiver.invalid/x", 0.1) as client:
            await asyncio.gather(
                *(fails(client, TimeoutError, "Cannot connect to receiver") for _ in range(8))
            )
            late = asyncio.create_task(fails(client, ConnectionError, "nobody of that name"))
            await asyncio.sleep(0)
            go_on.set()
            await late
            assert asked == ["receiver.invalid"]
            await fails(client, ConnectionError, "nobody of that name")
            assert len(asked) == 2  # a failure is not kept

    asyncio.run(main())


def test_a_look_up_that_fails_when_nobody_waits_any_more_is_no_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()

    def look_up(*_: object, **__: object) -> object:
        go_on.wait(10)
        raise socket.gaierror("nobody of that name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    async def main() -> None:
        async with client_of("http://receiver.invalid/x", 0.1) as client:
            await fails(client, TimeoutError, "Cannot connect to receiver")
            unheard = client._addresses._look_up
            assert unheard is not None
            go_on.set()
            await asyncio.wait([unheard])
            del unheard
            await fails(client, ConnectionError, "nobody of that name")  # of another one
            gc.collect()

    asyncio.run(main())
    assert caplog.records == []


def test_a_post_that_is_cancelled_closes_its_connection() -> None:
    arrived, ended = asyncio.Event(), asyncio.Event()

    async def script(talk: Talk, _: Receiver) -> None:
        await talk.request()
        arrived.set()
        assert await talk.hears_the_end()
        ended.set()

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url, 60) as client:
            post = asyncio.create_task(posted(client))
            await arrived.wait()
            post.cancel()
            await ended.wait()
            assert post.cancelled()

    run(main())


def test_at_the_end_all_connections_are_closed() -> None:
    ended = asyncio.Event()

    async def script(talk: Talk, _: Receiver) -> None:
        await talk.request()
        await talk.say(OK)
        assert await talk.hears_the_end()
        ended.set()

    async def main() -> None:
        async with receiving(script) as receiver:
            async with client_of(receiver.url) as client:
                await posted(client)
            await ended.wait()

    run(main())


# --- large bodies


def test_a_large_body_arrives_whole_and_the_connection_is_kept() -> None:
    async def main() -> None:
        async with receiving(answering(OK)) as receiver, client_of(receiver.url) as client:
            assert await posted(client, 2, LARGE) == [Answer(200, None)] * 2
            assert receiver.connections == 1
            assert [request.body for request in receiver.requests] == [LARGE, LARGE]

    run(main())


def test_an_answer_ends_the_sending_of_a_large_body() -> None:
    """As 413 does, for one. Nothing more is sent on that connection."""

    async def script(talk: Talk, _: Receiver) -> None:
        await talk.head()
        await talk.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        await asyncio.sleep(10)

    async def main() -> None:
        async with receiving(script) as receiver, client_of(receiver.url) as client:
            started = time.monotonic()
            assert await posted(client, 2, LARGE) == [Answer(413, None)] * 2
            assert receiver.connections == 2
            assert time.monotonic() - started < 5

    run(main())


def test_of_a_large_body_no_more_is_encrypted_than_the_receiver_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without TLS it costs nothing to give the transport all of it: it copies nothing."""
    monkeypatch.setenv("SSL_CERT_FILE", str(SELF_SIGNED))
    made: list[Connection] = []
    stuck = asyncio.Event()

    class Known(Connection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            made.append(self)

        def pause_writing(self) -> None:
            super().pause_writing()
            stuck.set()

    monkeypatch.setattr(client_module, "Connection", Known)

    async def script(talk: Talk, _: Receiver) -> None:
        await talk.head()
        await asyncio.sleep(10)

    async def main() -> None:
        async with (
            tls_receiving(script) as receiver,
            client_of(f"https://localhost:{receiver.port}", 0.5) as client,
        ):
            post = asyncio.create_task(fails(client, TimeoutError, "in time", LARGE * 4))
            await stuck.wait()
            await asyncio.sleep(0.2)
            assert made[0]._transport.get_write_buffer_size() < 1_000_000
            await post

    run(main())


# --- where it goes


def test_a_certificate_that_nobody_has_signed_is_refused_in_words() -> None:
    async def main() -> None:
        async with (
            tls_receiving(answering(OK)) as receiver,
            client_of(f"https://localhost:{receiver.port}") as client,
        ):
            await fails(client, ConnectionError, "certificate verify failed: self-signed")
            assert receiver.requests == []

    run(main())


def test_https_is_spoken_with_whom_the_system_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(SELF_SIGNED))

    async def main() -> None:
        async with (
            tls_receiving(answering(OK)) as receiver,
            client_of(f"https://localhost:{receiver.port}/x") as client,
        ):
            for body in (b"{}", LARGE):
                assert await posted(client, 2, body) == [Answer(200, None)] * 2
            assert receiver.connections == 1
            assert [request.body for request in receiver.requests] == [b"{}"] * 2 + [LARGE] * 2

    run(main())


def test_a_certificate_is_for_the_name_without_a_dot_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(SELF_SIGNED))

    async def main() -> None:
        async with (
            tls_receiving(answering(OK)) as receiver,
            client_of(f"https://localhost.:{receiver.port}/x") as client,
        ):
            here = socket.getaddrinfo("127.0.0.1", receiver.port, type=socket.SOCK_STREAM)
            monkeypatch.setattr(client._addresses, "get", AsyncMock(return_value=here))
            assert await posted(client) == [Answer(200, None)]

    run(main())


def test_ipv6() -> None:
    async def main() -> None:
        try:
            async with receiving(answering(OK), host="::1") as receiver:
                async with client_of(f"http://[::1]:{receiver.port}/x") as client:
                    assert await posted(client) == [Answer(200, None)]
                assert f"host: [::1]:{receiver.port}\r\n" in receiver.requests[0].head
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")

    run(main())


def test_nobody_there_is_told_in_words() -> None:
    async def main() -> None:
        async with receiving(answering(OK)) as receiver:
            pass
        async with client_of(receiver.url) as client:
            await fails(client, ConnectionError, f"Cannot connect to 127.0.0.1:{receiver.port}: ")

    run(main())


@pytest.mark.parametrize(
    ("url", "host", "port", "path", "name"),
    [
        ("http://example.org", "example.org", 80, "", "example.org"),
        ("https://Example.org/a%2Fb/", "example.org", 443, "/a%2Fb/", "example.org"),
        ("https://example.org:80/x", "example.org", 80, "/x", "example.org:80"),
        ("http://example.org:80/x?token=1&b", "example.org", 80, "/x?token=1&b", "example.org"),
        ("http://h?x=1", "h", 80, "/?x=1", "h"),
        ("http://h/a b\u00fc", "h", 80, "/a%20b%C3%BC", "h"),
        ("http://b\u00fccher.example", "xn--bcher-kva.example", 80, "", "xn--bcher-kva.example"),
        ("http://[fe80::1%25eth0]:81/x", "fe80::1%eth0", 81, "/x", "[fe80::1]:81"),
    ],
)
def test_a_url_is_used_as_it_is(url: str, host: str, port: int, path: str, name: str) -> None:
    target = Target.parse(url)
    assert (target.host, target.port, target.path) == (host, port, path)
    assert target.is_secure == url.startswith("https")
    assert target.fields.startswith(f"host: {name}\r\n")


@pytest.mark.parametrize(
    ("user", "field"),
    [
        ("user:pass@", "Basic dXNlcjpwYXNz"),
        ("user@", "Basic dXNlcjo="),
        ("u%40x:one@two%2F@", "Basic dUB4Om9uZUB0d28v"),
    ],
)
def test_a_user_in_the_url_is_basic_authentication(user: str, field: str) -> None:
    target = Target.parse(f"http://{user}example.org/x")
    assert (target.host, target.path) == ("example.org", "/x")
    assert f"authorization: {field}\r\n" in target.fields
