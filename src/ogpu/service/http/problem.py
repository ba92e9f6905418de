"""Errors as ``application/problem+json`` (RFC 9457): a stable type, a title, and what to do.

Runs in the front.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic_core import to_json
from starlette.responses import Response

from ..errors import JournalError


@dataclass(frozen=True)
class Problem:
    """One kind of error; ``type`` is stable, so that clients may switch over it."""

    status: int
    slug: str
    title: str

    def response(
        self, detail: str, *, retry_after_s: int | None = None, **members: object
    ) -> Response:
        """Return the answer; ``members`` are further facts for machines."""
        body = {
            "type": f"urn:ogpu:problem:{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": detail,
            **members,
        }
        headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}
        return Response(to_json(body), self.status, headers, "application/problem+json")


def unavailable(error: JournalError) -> Response:
    """Return the answer where the journal cannot be used at present."""
    detail = str(error)
    return JOURNAL_UNAVAILABLE.response(
        detail[:1].upper() + detail[1:] + "; try again later.", retry_after_s=1
    )


UNKNOWN_FUNCTION = Problem(404, "unknown-function", "Unknown function")
UNKNOWN_TASK = Problem(404, "unknown-task", "Unknown task")
AMBIGUOUS_TASK = Problem(409, "ambiguous-task", "Several functions have a task of this address")
INPUT_CONFLICT = Problem(409, "input-conflict", "Another input for an active task")
BODY_TOO_LARGE = Problem(413, "body-too-large", "Body too large")
UNAUTHORIZED = Problem(401, "unauthorized", "A key is needed")
ALREADY_ENDED = Problem(409, "already-ended", "The task has ended already")
NOT_ENDED = Problem(409, "not-ended", "The task has not ended")
NO_RECEIVER = Problem(409, "no-receiver", "Nobody is to be told")
STOPPING = Problem(409, "stopping", "The service stops")
JOURNAL_UNAVAILABLE = Problem(503, "journal-unavailable", "The journal cannot be used")
QUEUE_FULL = Problem(503, "queue-full", "The queue is full")
NOT_ACCEPTING = Problem(503, "not-accepting", "Not accepting tasks")
NOT_READY = Problem(503, "not-ready", "Not ready")
VALIDATOR_FAILED = Problem(500, "validator-failed", "The input model's validator failed")
