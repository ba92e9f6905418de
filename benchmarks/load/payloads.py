"""A load of large bodies, in a process of its own: raw asyncio, since wrk's script would copy each.

N connections post the same body, each again as soon as it was answered; with a path of its own for
each where the server wants that. An answer must be 2xx and hold the text that was sent: every byte
of it is compared. When the time is over, what is on its way is waited for, and counts as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import httptools
import uvloop

from ..candidate import Candidate
from ..harness import HOST, BenchmarkError
from ..noise import watch_others
from ..report import percentile

_START_BYTES = 64
_SLACK_S = 60.0  # for what is on its way when the time is over


@dataclass(frozen=True)
class Exchange:
    """What one run has seen."""

    requests: int
    requests_per_s: float
    p50_ms: float
    load_cpus: float
    others_cpus: float = 0.0


def exchange(
    candidate: Candidate, data: Mapping[str, Any], tag: str, concurrency: int, seconds: int
) -> Exchange:
    """Send ``data`` again and again, and compare its longest value with what comes back.

    Raises:
        BenchmarkError: an answer was not 2xx, or has not the text, or a connection failed.
    """
    with tempfile.TemporaryDirectory(prefix="ogpu-benchmark-") as folder:
        body, text = Path(folder) / "body", Path(folder) / "text"
        body.write_bytes(candidate.body(data))
        text.write_text(max(data.values(), key=len), encoding="ascii")
        command = [sys.executable, "-m", "benchmarks.load.payloads"]
        command += ["--port", str(candidate.server.port), "--seconds", str(seconds)]
        command += ["--path", f"{candidate.path}{tag}-" if candidate.numbered else candidate.path]
        command += ["--numbered"] if candidate.numbered else []
        command += ["--prefer", candidate.prefer] if candidate.prefer else []
        command += ["--body", str(body), "--text", str(text), "--concurrency", str(concurrency)]
        others_cpus = watch_others(candidate.server.process.pid)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            timeout=seconds + 2 * _SLACK_S,
            check=False,
        )
    if done.returncode:
        raise BenchmarkError(f"{done.stderr.strip()}\n{candidate.server.log_tail()}")
    return Exchange(**{**json.loads(done.stdout), "others_cpus": others_cpus()})


class _Load:
    """What all connections share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.body = options.body.read_bytes()
        self.text = options.text.read_bytes()
        self.until = time.perf_counter() + options.seconds
        self.took_s: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.open = options.concurrency
        self._options = options
        self._sent = 0

    def head(self) -> bytes:
        options = self._options
        self._sent += 1
        lines = [
            f"POST {options.path}{self._sent if options.numbered else ''} HTTP/1.1",
            f"host: {HOST}:{options.port}",
            "content-type: application/json",
            f"content-length: {len(self.body)}",
        ]
        if options.prefer:
            lines.append(f"prefer: {options.prefer}")
        return "\r\n".join([*lines, "\r\n"]).encode()

    def fail(self, message: str) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(message))


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._post()

    def connection_lost(self, _: Exception | None) -> None:
        self._load.fail("the server has closed a connection of the load")

    def _post(self) -> None:
        self._parts = []
        self._parser = httptools.HttpResponseParser(self)
        self._posted_at = time.perf_counter()
        self._transport.writelines([self._load.head(), self._load.body])

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        load, now = self._load, time.perf_counter()
        load.took_s.append(now - self._posted_at)
        status, body = self._parser.get_status_code(), b"".join(self._parts)
        if not 200 <= status < 300:
            load.fail(f"answered {status}: {body[:300]!r}")
        # Not `in`: that looks for a needle of 1 MiB with tables made from it, each time.
        elif not body.startswith(load.text, max(0, body.find(load.text[:_START_BYTES]))):
            load.fail(f"the answer has not the text that was sent: {len(body)} bytes")
        elif now < load.until:
            self._post()
        else:
            load.open -= 1
            if not load.open and not load.over.done():
                load.over.set_result(None)


async def _run(options: argparse.Namespace) -> Exchange:
    load = _Load(options)
    loop = asyncio.get_running_loop()
    started, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(options.concurrency):
        await loop.create_connection(lambda: _Client(load), HOST, options.port)
    try:
        await asyncio.wait_for(load.over, options.seconds + _SLACK_S)
    except asyncio.TimeoutError:
        raise RuntimeError(f"{load.open} requests were not answered") from None
    duration_s = time.perf_counter() - started
    return Exchange(
        requests=len(load.took_s),
        requests_per_s=len(load.took_s) / duration_s,
        p50_ms=percentile(load.took_s, 50) * 1000,
        load_cpus=(time.process_time() - cpu_s) / duration_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.payloads")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--numbered", action="store_true", help="put a number behind the path")
    parser.add_argument("--prefer", help="the Prefer header")
    parser.add_argument("--body", type=Path, required=True, help="file with the request's body")
    parser.add_argument("--text", type=Path, required=True, help="file with what comes back")
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    try:
        seen = asdict(uvloop.run(_run(parser.parse_args())))
    except (RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
