"""Put one server under the load of wrk, with echo.lua, and read what wrk saw."""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .harness import HOST, BenchmarkError, Server, answer, post
from .noise import watch_others

_SCRIPT = Path(__file__).with_name("echo.lua")
_BODY = {"text": "hello world"}
_WRK_SLACK_S = 30
_RESULT = re.compile(r"^RESULT (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Candidate:
    """A server under test, and how it is asked."""

    name: str
    server: Server
    path: str
    numbered: bool = False  # a path of its own for each request
    prefer: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.prefer is None else {"prefer": self.prefer}


@dataclass(frozen=True)
class Load:
    """What wrk saw in one run."""

    requests_per_s: float
    p50_us: float
    p99_us: float
    others_cpus: float


def is_installed() -> bool:
    return shutil.which("wrk") is not None


def checked(candidate: Candidate) -> Candidate:
    """Wait until it answers, and see that it answers what was said to it."""

    def echoes(connection: http.client.HTTPConnection) -> bool:
        path = candidate.path + ("check" if candidate.numbered else "")
        post(connection, path, _BODY, candidate.headers)
        given = answer(connection)
        if (given["result"] if candidate.numbered else given) != _BODY:
            raise BenchmarkError(f"{candidate.name} answers {given}")
        return True

    candidate.server.wait_for(echoes)
    return candidate


def load(candidate: Candidate, tag: str, concurrency: int, seconds: int) -> Load:
    """Ask as fast as it answers; ``tag`` keeps the paths of two runs apart."""
    path = f"{candidate.path}{tag}-" if candidate.numbered else candidate.path
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}s", "-s", str(_SCRIPT)]
    command += [f"http://{HOST}:{candidate.server.port}", "--"]
    command += [path, "numbered" if candidate.numbered else "same"]
    if candidate.prefer is not None:
        command.append(candidate.prefer)
    others_cpus = watch_others(candidate.server.process.pid)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + _WRK_SLACK_S, check=False
    )
    found = _RESULT.search(done.stdout)
    if done.returncode or found is None:
        raise BenchmarkError(f"wrk failed:\n{done.stdout}{done.stderr}")
    figures = {name: float(value) for name, value in (f.split("=") for f in found[1].split())}
    errors = {
        name: int(figures[name])
        for name in ("status", "connect", "read", "write", "timeout")
        if figures[name]
    }
    if errors or not figures["requests"]:
        raise BenchmarkError(
            f"{candidate.name} gave errors: {errors} in {figures['requests']:.0f} requests\n"
            f"{candidate.server.log_tail()}"
        )
    requests_per_s = figures["requests"] / figures["duration_us"] * 1e6
    return Load(requests_per_s, figures["p50_us"], figures["p99_us"], others_cpus())
