"""Requests that arrive whole, in one read: most of those to ``/run`` do. Runs in the front.

One parser serves all connections, since none of them leaves it in the middle of a request. What it
cannot take in one go is left to the connection's own parser, with the bytes as they came.
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


class WholeReader:
    r"""Parses requests that are all there.

    Example:
        >>> WholeReader().read(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        WholeRequest(target=b'/', headers={b'host': b'x'}, body=b'')
    """

    def __init__(self) -> None:
        self._renew()

    def read(self, data: bytes) -> WholeRequest | None:
        """Return the request that ``data`` is; None: it is less, or more, or an unusual one."""
        self._begun = self._ended = 0
        self._target = self._body = b""
        self._headers: Headers = {}
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._renew()
            return None
        is_one = self._begun == self._ended == 1
        if not is_one or not self._is_kept or b"expect" in self._headers:
            self._renew()
            return None
        return WholeRequest(self._target, self._headers, self._body)

    def _renew(self) -> None:
        self._is_kept = False
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

    def on_body(self, part: bytes) -> None:
        self._body = self._body + part if self._body else part

    def on_message_complete(self) -> None:
        self._ended += 1
        parser = self._parser
        self._is_kept = parser.should_keep_alive() and parser.get_http_version() == "1.1"
