"""Requests that arrive whole: what is taken, and what is left to the connection's own parser."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpu.service.http.whole import BegunRequest, WholeReader, WholeRequest

HEAD = b"POST /run/echo/a HTTP/1.1\r\nHost: h\r\nPrefer: wait=5\r\n"
READER = WholeReader()  # one for all tests: what one leaves behind must not reach the next


def a_request(body: bytes) -> bytes:
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def test_a_whole_request_is_read() -> None:
    """Names in lower case, values and body as they came."""
    request = READER.read(a_request(b'{"a": 1}'))
    assert request == WholeRequest(
        b"/run/echo/a",
        {b"host": b"h", b"prefer": b"wait=5", b"content-length": b"8"},
        b'{"a": 1}',
    )


def test_lines_of_one_name_are_one_value() -> None:
    request = READER.read(HEAD + b"Prefer: a\r\nprefer: b\r\ncontent-length: 2\r\n\r\n{}")
    assert isinstance(request, WholeRequest)
    assert request.headers[b"prefer"] == b"wait=5, a, b"


@pytest.mark.parametrize(
    "data",
    [
        a_request(b"{}") + b"P",
        a_request(b"{}") + a_request(b"{}"),
        HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\n{}",
        HEAD + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
        HEAD + b"upgrade: websocket\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\n{}",
        HEAD.replace(b"1.1", b"1.0") + b"connection: keep-alive\r\ncontent-length: 2\r\n\r\n{}",
        HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        HEAD + b"content-length: two\r\n\r\n{}",
        HEAD + b"no colon\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"",
    ],
)
def test_what_is_unusual_is_left_alone(data: bytes) -> None:
    """And spoils nothing for the next request of another connection."""
    assert READER.read(data) is None
    assert isinstance(READER.read(a_request(b"{}")), WholeRequest)


def test_a_chunked_body_may_be_whole_as_well() -> None:
    data = HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
    request = READER.read(data)
    assert isinstance(request, WholeRequest)
    assert request.body == b"{}"


@given(st.text(), st.data())
def test_what_is_missing_of_a_body_is_told(text: str, data: st.DataObject) -> None:
    """Wherever the kernel cuts it: in the head nothing is known, after it how much is to come."""
    body = json.dumps({"text": text}).encode()
    whole = a_request(body)
    cut = data.draw(st.integers(0, len(whole) - 1))
    head_bytes = len(whole) - len(body)
    begun = READER.read(whole[:cut])
    if cut < head_bytes:
        assert begun is None
    else:
        assert isinstance(begun, BegunRequest)
        assert begun.body == body[: cut - head_bytes]
        assert begun.missing == len(whole) - cut
    request = READER.read(whole)  # and nothing of it is left in the parser
    assert isinstance(request, WholeRequest)
    assert request.body == body


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{",
        HEAD + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n{",
        HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\n{",
        HEAD + b"content-length: 9999999999999999999\r\n\r\n{",
    ],
)
def test_a_beginning_that_is_unusual_is_left_alone(head: bytes) -> None:
    assert READER.read(head) is None


@given(st.binary(max_size=300))
def test_garbage_raises_nothing(garbage: bytes) -> None:
    READER.read(garbage)
    READER.read(HEAD + garbage)
    assert isinstance(READER.read(a_request(b"{}")), WholeRequest)
