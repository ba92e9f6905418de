"""Requests whose head arrives whole, in one read: most of those to ``/run``. Runs in the front.

One parser serves all connections, since none of them leaves it in the middle of a request: of a
body that has not arrived yet the length is known, and it needs no parser. What is otherwise is left
to the connection's own parser, with the bytes as they came.
"""

from __future__ import annotations

from typing import NamedTuple

import httptools

Headers = dict[bytes, bytes]


class WholeRequest(NamedTuple):
    """A request of HTTP/1.1 on a connection that is kept alive.

    Names of headers are in lower case; of several lines with one name the values are one, with
    commas between them (RFC 9110, 5.3).
    """

    target: bytes
    headers: Headers
    body: bytes


class BegunRequest(NamedTuple):
    """A request of which ``missing`` bytes of the body are to come; ``body`` is what has."""

    target: bytes
    headers: Headers
    body: bytes
    missing: int


class WholeReader:
    r"""Parses requests that are all there, or of which the rest is nothing but body.

    Example:
        >>> WholeReader().read(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        WholeRequest(target=b'/', headers={b'host': b'x'}, body=b'')
    """

    def __init__(self) -> None:
        self._renew()

    def read(self, data: bytes) -> WholeRequest | BegunRequest | None:
        """Return the request that ``data`` is; None: it is less, or more, or an unusual one."""
        self._begun = self._ended = 0
        self._is_usual = False
        self._target = self._body = b""
        self._headers: Headers = {}
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._renew()
            return None
        is_one, is_usual = self._begun == 1, self._is_usual
        if is_one and is_usual and self._ended == 1:
            return WholeRequest(self._target, self._headers, self._body)
        self._renew()
        return self._as_begun() if is_one and is_usual and not self._ended else None

    def _as_begun(self) -> BegunRequest | None:
        length = self._headers.get(b"content-length", b"")
        # (18 digits are more than any limit, and a chunked body tells its length at its end only.)
        if b"transfer-encoding" in self._headers or not length.isdigit() or len(length) > 18:
            return None
        missing = int(length) - len(self._body)
        return BegunRequest(self._target, self._headers, self._body, missing)

    def _renew(self) -> None:
        self._parser = httptools.HttpRequestParser(self)

    # --- what the parser calls

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_url(self, target: bytes) -> None:
        self._target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in self._headers:
            value = b"%b, %b" % (self._headers[name], value)
        self._headers[name] = value

    def on_headers_complete(self) -> None:
        parser = self._parser
        self._is_usual = (
            parser.should_keep_alive()
            and parser.get_http_version() == "1.1"
            and b"expect" not in self._headers
        )

    def on_body(self, part: bytes) -> None:
        self._body = self._body + part if self._body else part

    def on_message_complete(self) -> None:
        self._ended += 1
