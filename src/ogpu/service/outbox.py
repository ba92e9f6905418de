"""The outbox: results go to ``{CALLBACK_URL}/{task_address}``, with retries.

Runs in the front, on the event loop; no worker waits for it.

1. A task succeeds: its callback is pending, and it joins the queue of deliveries.
2. One of MAX_IN_FLIGHT carriers posts the result. Any 2xx is success.
3. Anything else is a failure, redirects included (following one could lose the body). 410 ends it;
   otherwise it is tried again after a jittered back-off, or after ``Retry-After`` where that is
   longer, MAX_ATTEMPTS times in all. Then it is given up, in words.

Headers are those of Standard Webhooks: ``webhook-id`` is the same for every attempt.
"""

from __future__ import annotations

import asyncio
import math
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import aiohttp
from yarl import URL

from .backoff import Backoff
from .journal import MemoryJournal
from .logger import logger
from .task import CallbackState, Task, TaskState

MAX_IN_FLIGHT = 32
MAX_ATTEMPTS = 8
RETRY_BACKOFF = Backoff(first_s=0.5, limit_s=60.0)
MAX_RETRY_AFTER_S = 300.0
_ANSWER_BYTES = 64 * 1024  # read to its end, a short answer leaves the connection open for the next


class Outbox:
    """Delivers results to one receiver."""

    def __init__(self, callback_url: str, timeout_s: float, journal: MemoryJournal) -> None:
        self._callback_url = callback_url
        self._journal = journal
        self._due: asyncio.Queue[Task] = asyncio.Queue()
        self._waiting: dict[str, asyncio.TimerHandle] = {}  # by task id: until the next attempt
        self._pending = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._session: aiohttp.ClientSession | None = None
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._carriers: list[asyncio.Task[None]] = []

    def on_transition(self, task: Task) -> None:
        """Take a task that has succeeded (a listener of the journal)."""
        if task.state is not TaskState.SUCCEEDED:
            return
        self._journal.record_delivery(task, CallbackState.PENDING)
        self._pending += 1
        self._settled.clear()
        self._due.put_nowait(task)

    async def start(self) -> None:
        """Begin to deliver."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_IN_FLIGHT), timeout=self._timeout
        )
        loop = asyncio.get_running_loop()
        self._carriers = [loop.create_task(self._carry()) for _ in range(MAX_IN_FLIGHT)]

    async def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; return whether that came true in time."""
        try:
            await asyncio.wait_for(self._settled.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stop delivering."""
        for timer in self._waiting.values():
            timer.cancel()
        for carrier in self._carriers:
            carrier.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _carry(self) -> None:
        while True:
            task = await self._due.get()
            task.callback.attempts += 1
            try:
                status, retry_after = await self._post(task)
            except (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError) as error:
                self._on_failure(task, str(error) or type(error).__name__)
                continue
            if 200 <= status < 300:
                self._settle(task, CallbackState.DELIVERED)
            elif status == 410:
                self._give_up(task, "the receiver answered 410 Gone")
            else:
                self._on_failure(
                    task, f"the receiver answered {status}", _retry_after_s(retry_after)
                )

    async def _post(self, task: Task) -> tuple[int, str | None]:
        assert self._session is not None
        # The address is of [A-Za-z0-9._:-] and is not "." or "..", so it needs no quoting; the
        # rest of the URL is the operator's, to be used as it is.
        url = URL(f"{self._callback_url}/{task.address}", encoded=True)
        headers = {
            "content-type": "application/json",
            "webhook-id": task.id,
            "webhook-timestamp": str(int(time.time())),
        }
        async with self._session.post(
            url, data=task.result, headers=headers, allow_redirects=False
        ) as response:
            await response.content.read(_ANSWER_BYTES)
            return response.status, response.headers.get("retry-after")

    def _on_failure(self, task: Task, error: str, wait_at_least_s: float = 0.0) -> None:
        attempts = task.callback.attempts
        if attempts >= MAX_ATTEMPTS:
            self._give_up(task, f"{error} ({attempts} attempts)")
            return
        wait_s = max(RETRY_BACKOFF.wait_s(attempts), wait_at_least_s)
        self._journal.record_delivery(task, CallbackState.PENDING, error=error)
        logger.warning(
            "[%s] callback failed (attempt %d): %s; next in %.1f s",
            task.address,
            attempts,
            error,
            wait_s,
        )
        loop = asyncio.get_running_loop()
        self._waiting[task.id] = loop.call_later(wait_s, self._retry, task)

    def _retry(self, task: Task) -> None:
        del self._waiting[task.id]
        self._due.put_nowait(task)

    def _give_up(self, task: Task, error: str) -> None:
        logger.error("[%s] callback given up: %s", task.address, error)
        self._settle(task, CallbackState.GIVEN_UP, error)

    def _settle(self, task: Task, state: CallbackState, error: str | None = None) -> None:
        self._journal.record_delivery(task, state, error=error)
        self._pending -= 1
        if not self._pending:
            self._settled.set()


def _retry_after_s(value: str | None) -> float:
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
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
