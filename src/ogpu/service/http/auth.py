"""Who may come in: with OGPU_API_KEY set, whoever brings it. Runs in the front."""

from __future__ import annotations

import hmac

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
        if scope["path"] in OPEN_PATHS or self.is_in(_brought(scope)):
            return None
        response = UNAUTHORIZED.response(
            "Send `Authorization: Bearer` and the value of OGPU_API_KEY."
        )
        response.headers["www-authenticate"] = 'Bearer realm="ogpu-service"'
        return response

    def is_in(self, authorization: bytes) -> bool:
        """Tell whether the value of ``Authorization`` is the key."""
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            return False
        return hmac.compare_digest(authorization[len(_SCHEME) :].strip(), self._key)


def _brought(scope: Scope) -> bytes:
    """Return the first bearer token's line."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[: len(_SCHEME)].lower() == _SCHEME:
            return bytes(value)
    return b""
