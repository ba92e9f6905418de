"""Where callbacks go: what a URL says, as each request needs it. Runs in the front."""

from __future__ import annotations

import base64
import string
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from ..config import SDK_VERSION, host_and_port

_AS_IT_IS = string.ascii_letters + string.digits + string.punctuation


@dataclass(frozen=True)
class Target:
    """A receiver.

    Args:
        host: its name or address, as it is looked up.
        is_secure: True for https.
        path: what the path of each request begins with. What the operator wrote is used as it is.
        fields: the header fields that all requests have, each with the end of its line.
    """

    host: str
    port: int
    is_secure: bool
    path: str
    fields: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """Read a URL.

        Raises:
            ValueError: it has no host or no port.

        Example:
            >>> Target.parse("https://user:pass@example.org/callback?token=1").path
            '/callback?token=1'
        """
        host, port = host_and_port(url)
        parts = urlsplit(url)
        path = parts.path
        if parts.query:
            path = f"{path or '/'}?{parts.query}"
        name = f"[{host.partition('%')[0]}]" if ":" in host else host
        if port != (443 if parts.scheme == "https" else 80):
            name += f":{port}"
        fields = f"host: {name}\r\nuser-agent: ogpu-service/{SDK_VERSION}\r\naccept: */*\r\n"
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            fields += f"authorization: Basic {base64.b64encode(user).decode()}\r\n"
        # Blanks, line ends and what is not ASCII would make another request of it.
        return cls(host, port, parts.scheme == "https", quote(path, safe=_AS_IT_IS), fields)
