"""The client of the outbox: its time, large bodies, TLS, and what a URL means."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from ogpu.service.outbox import client as client_module
from ogpu.service.outbox.connection import Answer, Connection
from ogpu.service.outbox.target import Target
from support.callback_client import client_of, fails, posted, run
from support.receiver import OK, Receiver, Script, Talk, answering, receiving

SELF_SIGNED = Path(__file__).parents[1] / "support" / "self_signed.pem"
LARGE = b"x" * 5_000_000


def tls_receiving(script: Script) -> AbstractAsyncContextManager[Receiver]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(SELF_SIGNED)
    return receiving(script, tls=context)


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
