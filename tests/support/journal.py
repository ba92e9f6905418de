"""A journal under test: a loop for it, ends of tasks, and a disk that is full when told to be."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar
from unittest import mock

from ogpu.service.errors import FailureReason, TaskError
from ogpu.service.journal import Database, Journal, Lane, StateFolder, commits
from ogpu.service.journal.batch import Batch, Forgotten
from ogpu.service.metrics import Metrics
from ogpu.service.task import CallbackState, Outcome, Task, TaskState, WorkerReference

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, timezone.utc)
WORKER = WorkerReference(slot=1, generation=2, pid=3, device="0")
RESULT_LANES = (Lane.RESULTS, Lane.RESULTS_AGAIN)
SUCCESS = Outcome(TaskState.SUCCEEDED, result=b'{"text":"yes"}')
FULL = "database or disk is full"


def failure(state: TaskState = TaskState.FAILED) -> Outcome:
    return Outcome(state, error=TaskError(FailureReason.EXCEPTION, "no"))


def end(state: TaskState) -> Outcome:
    return SUCCESS if state is TaskState.SUCCEEDED else failure(state)


def on_loop(
    test: Callable[Parameters, Coroutine[Any, Any, None]],
) -> Callable[Parameters, None]:
    """Run a test on an event loop of its own, for 20 s at most."""

    @functools.wraps(test)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


async def until(condition: Callable[[], object], what: str, timeout_s: float = 5.0) -> None:
    """Let the loop go on until the condition is true; fail with ``what`` if it is not in time."""
    limit = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.001)


@contextmanager
def log_heard() -> Iterator[None]:
    """Let ``caplog`` hear what the service logs."""
    monitored = logging.getLogger("ogpu.service")
    monitored.propagate = True
    try:
        yield
    finally:
        monitored.propagate = False


class FrailDatabase(Database):
    """A database whose disk is full while ``is_full``, hangs without ``hold``, and that counts."""

    is_full = False
    commits = 0
    prunes = 0
    refusals = 0

    def __init__(self, folder: StateFolder | None) -> None:
        super().__init__(folder)
        self.hold = threading.Event()
        self.hold.set()

    def write(self, batch: Batch) -> float:
        self._check()
        took_s = super().write(batch)
        self.commits += 1
        return took_s

    def write_with_room(self, batch: Batch) -> float:
        self._check()  # a checkpoint needs room, too
        return super().write_with_room(batch)

    def probe(self) -> float:
        self._check()
        return super().probe()

    def prune(self, *limits: Any, **named: Any) -> list[Forgotten]:
        pruned = super().prune(*limits, **named)
        self.prunes += 1
        return pruned

    def _check(self) -> None:
        assert self.hold.wait(20)
        if self.is_full:
            self.refusals += 1
            raise sqlite3.OperationalError(FULL)


@asynccontextmanager
async def opened(
    folder: Path | None = None,
    lanes: Collection[Lane] = (),
    task_ttl_s: float = 1e9,
    *,
    close: bool = True,
) -> AsyncIterator[tuple[Journal, FrailDatabase]]:
    """Open a journal in a folder, or in memory; close it in order, unless the test does."""
    state = None if folder is None else StateFolder(str(folder))
    database = FrailDatabase(state)
    journal = Journal(database, lanes, Metrics(), task_ttl_s)
    try:
        await journal.recover()
        yield journal, database
    finally:
        if close:
            await journal.close()
        database.close()  # again: a journal in trouble leaves it open
        if state is not None:
            state.close()


async def accepted(journal: Journal, address: str = "a", body: bytes = b"{}") -> Task:
    """Accept a task of the function ``f``, as the front does."""
    task = journal.accept("f", address, body, 60.0)
    await journal.stored(task)
    return task


async def ended(
    journal: Journal, address: str = "a", outcome: Outcome = SUCCESS, body: bytes = b"{}"
) -> Task:
    """Accept a task, run it and end it, on the disk."""
    task = await accepted(journal, address, body)
    journal.start(task, WORKER, NOW)
    journal.finish(task, outcome)
    await journal.stored(task)
    return task


class Seen(NamedTuple):
    """What a journal says of a task."""

    state: TaskState
    attempt: int = 1
    result: bytes | None = None
    callback: CallbackState = CallbackState.NONE
    tries: int = 0

    @property
    def is_over(self) -> bool:
        return self.state.is_terminal and self.callback is not CallbackState.PENDING


def seen(task: Task) -> Seen:
    callback = task.callback
    return Seen(task.state, task.attempt, task.result, callback.state, callback.attempts)


@dataclass(eq=False)
class Run:
    """The model of a task: what it has been since what is known to be on the disk."""

    task: Task
    body: bytes
    history: list[Seen | None] = field(default_factory=lambda: [None, Seen(TaskState.QUEUED)])
    was_told: bool = False  # ``stored`` speaks of the task, not of its delivery

    @property
    def now(self) -> Seen:
        assert self.history[-1] is not None
        return self.history[-1]

    def note(self, **changes: object) -> None:
        self.history.append(self.now._replace(**changes))

    def settle(self) -> None:
        """What it is now is on the disk."""
        del self.history[:-1]


class _AtOnce(Executor):
    """Runs what it is given at once, so that nothing depends on a thread's pace."""

    def submit(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it is the future's
            future.set_exception(error)
        return future


class Life:
    """One journal, from its opening to its end, and what its listeners were told.

    It has a loop of its own, which runs while something is awaited, and stands still otherwise;
    there is no thread, what failed is tried again with its next step, and what nobody waits for is
    written after ``lazy_s``.
    """

    def __init__(
        self, path: Path | None, on_withdrawn: Callable[[Task], None], lazy_s: float
    ) -> None:
        self.path = path
        self.is_over = False
        self.told: list[tuple[int, TaskState]] = []
        self.stored_ends: Counter[int] = Counter()
        self.defects: list[dict[str, Any]] = []  # what was raised where nobody is to catch it
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, context: self.defects.append(context))
        self._folder = None if path is None else StateFolder(str(path))
        self.database = FrailDatabase(self._folder)
        self._patches = ExitStack()
        for name, value in {
            "LAZY_S": lazy_s, "EVERY_S": 0.0, "RETRY_S": 0.0,
            "ThreadPoolExecutor": lambda *_, **__: _AtOnce()
        }.items():  # fmt: skip
            self._patches.enter_context(mock.patch.object(commits, name, value))
        try:
            self.journal = self.run(self._make(on_withdrawn))
            self.recovered = self.run(self.journal.recover())
        except BaseException:
            self._patches.close()
            raise

    async def _make(self, on_withdrawn: Callable[[Task], None]) -> Journal:
        journal = Journal(self.database, RESULT_LANES, Metrics(), 1e9)
        journal.on_transition(lambda task: self.told.append((task.number, task.state)))
        journal.on_stored(self._on_stored)
        journal.on_withdrawn(on_withdrawn)
        return journal

    def _on_stored(self, task: Task) -> None:
        if task.state.is_terminal:
            self.stored_ends[task.number] += 1

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return self._loop.run_until_complete(asyncio.wait_for(work, 10))

    def step(self) -> None:
        """Let the loop go round once, so that a commit may be under way afterwards."""
        self._loop.call_soon(self._loop.stop)
        self._loop.run_forever()

    def copy(self, to: Path) -> None:
        """Copy the folder as a crash would leave it now: between two commits."""
        assert self.path is not None
        shutil.copytree(self.path, to, ignore=shutil.ignore_patterns("*-shm"))

    def abandon(self) -> None:
        """End without a word to the disk."""
        if self.is_over:
            return
        self.is_over = True
        self.run(self.journal._pruner.stop())
        self._patches.close()
        self.database.close()
        self._loop.close()
        if self._folder is not None:
            self._folder.close()
