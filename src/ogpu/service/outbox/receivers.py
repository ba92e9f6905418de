"""Who is told what, for the outbox and for whoever asks whether there is one."""

from __future__ import annotations

from ..config import Settings
from ..journal import Lane


def lanes_of(settings: Settings) -> dict[Lane, str]:
    """Return the lanes that have a receiver, and its URL."""
    urls = {Lane.RESULTS: settings.callback_url, Lane.FAILURES: settings.failure_callback_url}
    return {
        lane: url for first, url in urls.items() if url is not None for lane in (first, first.again)
    }
