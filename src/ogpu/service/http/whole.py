"""Requests that arrive whole, in one read: most of those to ``/run`` do. Runs in the front.

One parser serves all connections, since none of them leaves it in the middle of a request. What it
cannot take in one go is left to the connection's own parser, with the bytes as they came.
"""

from __future__ import annotations

from dataclasses import dataclass

import httptools

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class WholeRequest:
    """A request of HTTP/1.1 on a connection that is kept alive; names of headers in lower case."""

    target: bytes
    headers: Headers
    body: bytes


class WholeReader:
    r"""Parses requests that are all there.

    Example:
        >>> WholeReader().read(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        WholeRequest(target=b'/', headers=[(b'host', b'x')], body=b'')
    """

    def __init__(self) -> None:
        self._renew()

    def read(self, data: bytes) -> WholeRequest | None:
        """Return the request that ``data`` is; None: it is less, or more, or an unusual one."""
        self._begun = self._ended = 0
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._renew()
            return None
        if self._begun != 1 or self._ended != 1 or not self._is_usual:
            self._renew()
            return None
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        return WholeRequest(self._target, self._headers, body)

    def _renew(self) -> None:
        self._is_usual = False
        self._parser = httptools.HttpRequestParser(self)

    # --- what the parser calls

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_url(self, target: bytes) -> None:
        self._target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        self._is_usual = (
            parser.should_keep_alive()
            and parser.get_http_version() == "1.1"
            and all(name != b"expect" for name, _ in self._headers)
        )

    def on_body(self, part: bytes) -> None:
        self._body.append(part)

    def on_message_complete(self) -> None:
        self._ended += 1
