"""One attempt to deliver: what is sent, and what the answer means.

Runs in the front. Headers and the meaning of answers are those of Standard Webhooks (on GitHub,
standard-webhooks/standard-webhooks, spec/standard-webhooks.md): any 2xx is success; anything else
is not, redirects included, since following one could lose the body; 410 ends it; ``webhook-id`` is
the same for every attempt.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum

from pydantic_core import to_json

from ..task import Task, TaskState
from .client import Client
from .connection import Answer

_ERROR_CHARS = 1000
# What is larger is signed in a thread: at once it would hold up the loop.
_LARGE_BYTES = 512 * 1024


class AttemptOutcome(str, Enum):
    """What came of an attempt; the values are those of the metric."""

    DELIVERED = "delivered"
    REFUSED = "refused"  # by an answer that is no success
    GONE = "gone"  # the receiver wants no more of it
    FAILED = "failed"  # there was no answer


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended; ``retry_after_s`` is what the receiver asks for."""

    outcome: AttemptOutcome
    error: str | None = None
    retry_after_s: float = 0.0


_DELIVERED = Attempt(AttemptOutcome.DELIVERED)


class Sender:
    """Posts ends of tasks to one receiver."""

    def __init__(self, client: Client, keys: Sequence[bytes]) -> None:
        self._client = client
        self._keys = keys

    async def post(self, task: Task) -> Attempt:
        """Try once."""
        body, content_type = body_of(task)
        timestamp = str(int(time.time()))
        fields = (
            f"content-type: {content_type}\r\n"
            f"webhook-id: {task.id}\r\n"
            f"webhook-timestamp: {timestamp}\r\n"
        )
        if self._keys:
            fields += f"webhook-signature: {await self._sign(task.id, timestamp, body)}\r\n"
        try:
            answer = await self._client.post(task.address, fields, body)
        except OSError as error:
            return Attempt(AttemptOutcome.FAILED, _text_of(error))
        return _judge(answer)

    async def close(self) -> None:
        """Close the connections to the receiver."""
        await self._client.close()

    async def _sign(self, message_id: str, timestamp: str, body: bytes) -> str:
        if len(body) <= _LARGE_BYTES:
            return sign(self._keys, message_id, timestamp, body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, sign, self._keys, message_id, timestamp, body)


def sign(keys: Sequence[bytes], message_id: str, timestamp: str, body: bytes) -> str:
    """Return the value of ``webhook-signature``: one signature for each key."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def body_of(task: Task) -> tuple[bytes, str]:
    """Return what a receiver is sent, and its content type: the result, or a problem (RFC 9457)."""
    if task.state is TaskState.SUCCEEDED:
        return task.result or b"null", "application/json"
    error = task.error
    assert error is not None
    problem = {
        "type": f"urn:ogpu:problem:task-{task.state.value.replace('_', '-')}",
        "title": f"The task has {_ENDS[task.state]}",
        "detail": error.message,
        "task_address": task.address,
        "function": task.function,
        "state": task.state.value,
        "attempt": task.attempt,
        "error": {**asdict(error), "reason": error.reason.value},
    }
    return to_json(problem), "application/problem+json"


_ENDS = {
    TaskState.FAILED: "failed",
    TaskState.TIMED_OUT: "passed its deadline",
    TaskState.CANCELLED: "been cancelled",
    TaskState.EXPIRED: "waited for too long",
}


def _text_of(error: Exception) -> str:
    """Return what went wrong; a receiver's odd bytes may be in it, as lone surrogates."""
    text = str(error) or type(error).__name__
    return text[:_ERROR_CHARS].encode("utf-8", "backslashreplace").decode()


def _judge(answer: Answer) -> Attempt:
    if 200 <= answer.status < 300:
        return _DELIVERED
    if answer.status == 410:
        return Attempt(AttemptOutcome.GONE, "the receiver answered 410 Gone")
    error = f"the receiver answered {answer.status}"
    return Attempt(AttemptOutcome.REFUSED, error, retry_after_s(answer.retry_after))


def retry_after_s(value: str | None) -> float:
    """Read Retry-After (RFC 9110, 10.2.3): seconds or a date; 0 where there is none."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
            if at.tzinfo is None:
                at = at.replace(tzinfo=timezone.utc)
            seconds = (at - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, OverflowError):  # no date, or one that no calendar holds
            return 0.0
    return 0.0 if math.isnan(seconds) else max(seconds, 0.0)
