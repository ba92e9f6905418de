"""Put one server under the load of wrk, with wrk.lua, and read what wrk saw."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..candidate import Candidate
from ..harness import HOST, BenchmarkError
from ..noise import watch_others

_SCRIPT = Path(__file__).with_name("wrk.lua")
_SLACK_S = 30
_TIMEOUT_S = 30  # 2 s as it comes, which a large batch may take
_RESULT = re.compile(r"^RESULT (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Load:
    """What wrk saw in one run."""

    requests_per_s: float
    p50_us: float
    p99_us: float
    others_cpus: float


def is_installed() -> bool:
    return shutil.which("wrk") is not None


def load(
    candidate: Candidate, data: Mapping[str, Any], tag: str, concurrency: int, seconds: int
) -> Load:
    """Ask as fast as it answers; ``tag`` keeps the paths of two runs apart.

    Raises:
        BenchmarkError: an answer was not 2xx, or a connection failed.
    """
    path = f"{candidate.path}{tag}-" if candidate.numbered else candidate.path
    with tempfile.NamedTemporaryFile() as body:
        body.write(candidate.body(data))
        body.flush()
        command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}s", f"--timeout={_TIMEOUT_S}s"]
        command += ["-s", str(_SCRIPT), f"http://{HOST}:{candidate.server.port}", "--"]
        command += [path, "numbered" if candidate.numbered else "same", body.name]
        if candidate.prefer is not None:
            command.append(candidate.prefer)
        others_cpus = watch_others(candidate.server.process.pid)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + _SLACK_S, check=False
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
