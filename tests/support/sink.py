"""A real callback receiver: an HTTP server in a thread, which keeps what it is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .waiting import wait_until


@dataclass(frozen=True)
class Delivery:
    """One POST that reached the receiver."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def address(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Sink:
    """The receiver. ``answers`` are given in order, the last one for ever; 0 hangs up mid-way."""

    answers: list[int] = field(default_factory=lambda: [200])
    answer_headers: dict[str, str] = field(default_factory=dict)
    deliveries: list[Delivery] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    on_delivery: Callable[[Delivery], object] = lambda _: None  # may wait, in the delivery's thread
    port: int = 0

    def __post_init__(self) -> None:
        self.hold.set()
        self._lock = threading.Lock()
        sink = self

        class Receiver(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["content-length"]))
                headers = {k.lower(): v for k, v in self.headers.items()}
                delivery = Delivery(self.path, headers, sent)
                status = sink.take(delivery)
                sink.on_delivery(delivery)
                sink.hold.wait(30)
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in sink.answer_headers.items():
                    self.send_header(name, value)
                body = b"" if status == 204 else b"ok"  # RFC 9110: a 204 has no content
                if body:
                    self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Keep the tests' output readable."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Receiver)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/callback"

    def take(self, delivery: Delivery) -> int:
        with self._lock:
            self.deliveries.append(delivery)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def wait_for(self, count: int, timeout_s: float = 15) -> list[Delivery]:
        wait_until(
            lambda: len(self.deliveries) >= count,
            f"{count} deliveries (there are {len(self.deliveries)})",
            timeout_s,
        )
        return self.deliveries

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
