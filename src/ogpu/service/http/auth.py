"""Who may come in: with OGPU_API_KEY set, whoever brings it. Runs in the front."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import Scope

from .problem import UNAUTHORIZED

# What the machinery around the service asks, which has no keys.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
_SCHEME = b"bearer "


class KeyCheck:
    """Compares the bearer token of requests (RFC 6750) with the key, in constant time."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that may not come in; None: it may."""
        if scope["path"] in OPEN_PATHS or self.is_brought(scope["headers"]):
            return None
        response = UNAUTHORIZED.response(
            "Send `Authorization: Bearer` and the value of OGPU_API_KEY."
        )
        response.headers["www-authenticate"] = 'Bearer realm="ogpu-service"'
        return response

    def is_brought(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Tell whether a request brings the key."""
        for name, value in headers:
            if name == b"authorization" and value[: len(_SCHEME)].lower() == _SCHEME:
                return hmac.compare_digest(value[len(_SCHEME) :].strip(), self._key)
        return False
