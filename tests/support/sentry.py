"""A receiver of Sentry envelopes on a free local port."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from typing_extensions import Self


class SentryReceiver:
    """Keeps the events that an SDK sends to ``dsn``."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        receiver = self

        class Envelopes(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver.take(body)
                self.send_response(200)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                """Keep the tests' output readable."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Envelopes)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def dsn(self) -> str:
        return f"http://key@127.0.0.1:{self._server.server_address[1]}/1"

    def take(self, envelope: bytes) -> None:
        """Read an envelope: a header line, then item header and item, line by line."""
        lines = envelope.split(b"\n")
        for head, item in zip(lines[1::2], lines[2::2], strict=False):
            if head and json.loads(head).get("type") == "event":
                self.events.append(json.loads(item))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
