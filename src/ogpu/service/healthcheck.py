"""``python -m ogpu.service healthcheck``: ask the service in this container whether it is alive.

Runs in a short process of its own, started by the container engine, beside the front and with its
environment.

1. Where to ask: OGPU_HOST and OGPU_PORT, as the service itself reads them; ``--url`` beats them.
2. Ask once, past all proxies, with the standard library alone: slim images have no curl.
3. One line of words, for ``docker inspect``, and exit code 0 (healthy) or 1.

It asks ``/healthz``, whether the event loop answers, and not ``/readyz``, whether a task would run
now: an engine that restarts what is unhealthy would otherwise restart a service that drains, or
that loads its model again after a kill (triton-inference-server/server#7014). While the first model
is loaded the port is closed (OGPU_BIND=ready), and the check fails: ``start_period`` is for that.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
import urllib.error
import urllib.request

from .config import load_settings
from .errors import SettingsError

ALIVE, READY = "/healthz", "/readyz"
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read here, not bound to
_MAX_ANSWER_BYTES = 64 * 1024


def healthcheck(url: str | None, timeout_s: float, path: str) -> int:
    """Ask, say in one line what came of it, and return the exit code."""
    try:
        base = own_url() if url is None else url.rstrip("/")
        healthy, words = ask(base + path, timeout_s)
    except SettingsError as error:
        healthy, words = False, str(error)
    sys.stdout.write(" ".join(words.split()) + "\n")
    return 0 if healthy else 1


def own_url() -> str:
    """Return where the service of this environment can be reached from its own machine.

    Raises:
        SettingsError: a setting is invalid, or the port is not known beforehand.
    """
    settings = load_settings()
    if settings.port == 0:
        raise SettingsError("OGPU_PORT=0 is any free port; tell the health check which: --url")
    host = _ANYWHERE.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def ask(url: str, timeout_s: float) -> tuple[bool, str]:
    """Ask once; return whether the answer was 200, and the answer or its absence in words."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    started = time.monotonic()
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            took_ms = (time.monotonic() - started) * 1000
            return True, f"{url} answered {answer.status} in {took_ms:.0f} ms"
    except urllib.error.HTTPError as error:
        with error:
            return False, f"{url} answered {error.code}: {_detail(error)}"
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        return False, f"no answer from {url}: {reason}"


def _detail(answer: urllib.error.HTTPError) -> str:
    """Return what a problem (RFC 9457) says, or the status in words."""
    try:
        return str(json.loads(answer.read(_MAX_ANSWER_BYTES))["detail"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return str(answer.reason)
