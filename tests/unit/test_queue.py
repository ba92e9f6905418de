"""The queue of tasks, how long it will take, and how long to wait before the next try."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpu.service.backoff import Backoff
from ogpu.service.errors import JournalError
from ogpu.service.journal import Journal
from ogpu.service.pool import queue as queue_module
from ogpu.service.pool.background import Background
from ogpu.service.pool.estimate import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, Estimate
from ogpu.service.pool.queue import TaskQueue
from ogpu.service.task import Task
from support.journal import FrailDatabase, on_loop, opened, until


@dataclass
class Line:
    """A queue, its journal, and what it told its owner."""

    journal: Journal
    database: FrailDatabase
    queue: TaskQueue = field(init=False)
    expired: list[Task] = field(default_factory=list)
    lost: list[Task] = field(default_factory=list)
    loads: int = 0

    def on_expired(self, task: Task) -> None:
        self.expired.append(task)

    def on_input_lost(self, task: Task) -> None:
        self.lost.append(task)

    def on_loaded(self) -> None:
        self.loads += 1

    def add(self, size: int = 10, function: str = "f") -> Task:
        """Accept and queue a task, whose input is its own and has a size."""
        number = self.journal._last_number + 1
        task = self.journal.accept(function, f"a{number}", f"{number:0{size}d}".encode(), None)
        self.queue.append(task)
        return task

    def pop(self) -> Task | None:
        """Take the task at the head; None: there is none, or its input is being read."""
        return next(iter(self.queue.take(self.queue.heads()[:1])), None)

    async def take(self) -> Task:
        """Take the task at the head, with its input, as soon as that is there."""
        while True:
            loads = self.loads
            task = self.pop()
            if task is not None:
                assert task.input is not None
                assert int(task.input) == task.number
                return task
            await until(lambda before=loads: self.loads > before, "an input")

    def check_memory(self) -> None:
        """What is counted is what is there."""
        inputs = [task.input for task in self.queue]
        assert self.queue._loaded_bytes == sum(len(body) for body in inputs if body is not None)
        assert self.queue._unloaded == inputs.count(None)


@asynccontextmanager
async def line(timeout_s: float | None = None) -> AsyncIterator[Line]:
    async with opened() as (journal, database):
        defects: list[BaseException] = []
        background = Background(defects.append)
        made = Line(journal, database)
        made.queue = TaskQueue(journal, background, timeout_s, made)
        journal.on_stored(made.queue.on_stored)
        yield made
        await background.cancel()
        made.queue.close()
        assert defects == []


@on_loop
async def test_first_come_first_served_but_for_what_is_queued_again() -> None:
    """What lost its worker goes first; what is taken out is gone; then there is nothing."""
    async with line() as it:
        tasks = [it.add() for _ in range(4)]
        assert (len(it.queue), list(it.queue)) == (4, tasks)
        assert it.pop() is tasks[0]
        assert tasks[0] not in it.queue
        tasks[0].queued_s = 1.0
        it.queue.append_first(tasks[0])
        assert tasks[0].queued_s == 1.0  # a window that has closed stays closed
        assert it.queue.remove(tasks[2])
        assert not it.queue.remove(tasks[2])
        assert [it.pop() for _ in range(4)] == [tasks[0], tasks[1], tasks[3], None]
        it.check_memory()


@on_loop
async def test_what_waits_too_long_expires() -> None:
    """Out of the queue, and told once; not what was taken before, nor what is queued later."""
    async with line(timeout_s=0.05) as it:
        taken, late, waited = it.add(), it.add(), it.add()
        it.queue.remove(waited)
        assert it.pop() is taken
        it.queue.append(waited, waited_s=1000)  # before the front was restarted
        await until(lambda: it.expired, "one is expired")
        assert it.expired == [waited]
        await until(lambda: len(it.expired) > 1, "the other one, too")
        assert it.expired == [waited, late]
        assert len(it.queue) == 0
        it.check_memory()


@on_loop
async def test_nothing_expires_after_the_end() -> None:
    """A queue that was closed keeps what it has: the next start runs it."""
    async with line(timeout_s=0.01) as it:
        task = it.add()
        it.queue.close()
        over = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.05, over.set_result, None)
        await over
        assert it.expired == []
        assert task in it.queue


@on_loop
async def test_inputs_beyond_a_limit_wait_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are dropped when they are stored, and are there again before their turn, in order."""
    monkeypatch.setattr(queue_module, "MEMORY_BYTES", 10_000)
    async with line() as it:
        tasks = [it.add(1000) for _ in range(300)]
        assert it.queue._loaded_bytes == 300_000  # not yet stored, so not to be dropped
        await it.journal.settle()
        assert it.queue._loaded_bytes <= 10_000
        assert it.queue._unloaded >= 290
        it.check_memory()
        for task in tasks:
            assert await it.take() is task
            assert it.queue._loaded_bytes <= 2 * 10_000 + 1000  # at the tail, at the head, one more
        it.check_memory()
        assert (len(it.queue), it.queue._loaded_bytes, it.queue._unloaded) == (0, 0, 0)


@on_loop
async def test_inputs_are_read_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """While there is enough at the head to go on with, the next ones are read; nobody waits."""
    monkeypatch.setattr(queue_module, "MEMORY_BYTES", 10_000)
    async with line() as it:
        for _ in range(50):
            it.add(1000)
            await it.journal.settle()
        assert it.queue._unloaded == 40
        for _ in range(50):
            assert it.pop() is not None
            await it.journal.settle()  # a moment for the disk, as a task's run would be


@on_loop
async def test_a_task_whose_input_cannot_be_read_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails is tried again; nothing is lost, nor overtaken."""
    monkeypatch.setattr(queue_module, "MEMORY_BYTES", 1)
    monkeypatch.setattr(queue_module, "_READ_AGAIN_S", 0.001)
    async with line() as it:
        first, second = it.add(), it.add()
        await it.journal.settle()
        assert first.input is None
        failures = 3
        read = it.journal.inputs

        async def inputs(*arguments: Any) -> dict[int, bytes]:
            nonlocal failures
            if failures:
                failures -= 1
                raise JournalError("the disk has a bad day")
            return await read(*arguments)

        monkeypatch.setattr(it.journal, "inputs", inputs)
        assert await it.take() is first
        assert failures == 0
        assert await it.take() is second


@on_loop
async def test_a_task_whose_input_is_gone_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the queue, and is told to the owner, once; the next one is taken."""
    monkeypatch.setattr(queue_module, "MEMORY_BYTES", 1)
    async with line() as it:
        first, second = it.add(), it.add()
        await it.journal.settle()
        it.database._connection.execute("DELETE FROM inputs WHERE number = ?", (first.number,))
        assert await it.take() is second
        assert it.lost == [first]
        it.check_memory()


@on_loop
async def test_tasks_that_leave_while_their_inputs_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last one that lacks its input is cancelled before the read begins: nothing happens."""
    monkeypatch.setattr(queue_module, "MEMORY_BYTES", 1)
    async with line() as it:
        task = it.add()
        await it.journal.settle()
        assert it.pop() is None  # a read is to begin
        assert it.queue.remove(task)
        await until(lambda: it.loads, "the read")
        assert it.lost == []
        it.check_memory()


KINDS = st.sampled_from(["add", "add", "take", "again", "remove", "store"])
STEPS = st.lists(st.tuples(KINDS, st.integers(0, 99)), max_size=40)


@given(STEPS)
def test_the_queue_is_a_deque_whatever_is_in_memory(steps: list[tuple[str, int]]) -> None:
    """Order and count are a plain deque's, and memory is accounted for, to the last byte."""

    async def follow() -> None:
        async with line() as it:
            model: deque[Task] = deque()
            taken: list[Task] = []
            for step, number in steps:
                if step == "add":
                    model.append(it.add(number + 1))
                elif step == "take" and model:
                    taken.append(await it.take())
                    assert taken[-1] is model.popleft()
                elif step == "again" and taken:
                    model.appendleft(taken.pop())
                    it.queue.append_first(model[0])
                elif step == "remove" and model:
                    task = model[number % len(model)]
                    model.remove(task)
                    assert it.queue.remove(task)
                elif step == "store":
                    await it.journal.settle()
                assert list(it.queue) == list(model)
                it.check_memory()
            while model:
                assert await it.take() is model.popleft()
            assert it.pop() is None
            assert (it.queue._loaded_bytes, it.queue._unloaded) == (0, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_module, "MEMORY_BYTES", 100)
        patch.setattr(queue_module, "_READ_TASKS", 3)
        on_loop(follow)()


@on_loop
async def test_functions_take_turns_in_the_order_of_their_first_tasks() -> None:
    """Each function has a lane: a batch is taken from it, past those of others; order holds."""
    async with line() as it:
        a1, b1, a2, a3, b2 = (it.add(function=name) for name in "abaab")
        assert it.queue.heads() == [a1, b1]
        assert it.queue.first_of("a", 2) == [a1, a2]
        assert it.queue.take([a1, a2]) == [a1, a2]
        assert it.queue.heads() == [b1, a3]
        it.queue.append_first(a1)
        assert it.queue.heads() == [a1, b1]
        assert list(it.queue) == [a1, b1, a3, b2]
        assert it.queue.take([b1, b2]) == [b1, b2]
        assert it.queue.heads() == [a1]
        it.check_memory()


@on_loop
async def test_a_batch_is_whole_wherever_its_inputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tasks and bytes than are read at once: they are waited for, and keep their order."""
    monkeypatch.setattr(queue_module, "MEMORY_BYTES", 100)
    monkeypatch.setattr(queue_module, "_READ_TASKS", 3)
    async with line() as it:
        tasks = [it.add(20, function="ab"[number % 2]) for number in range(40)]
        await it.journal.settle()
        assert it.queue._unloaded > 30
        for batch in (tasks[1::2], tasks[::2]):
            loads = 0
            while not (taken := it.queue.take(batch)):
                await until(lambda before=it.loads: it.loads > before, "a read")
                loads += 1
            assert taken == batch
            assert [int(task.input or b"0") for task in taken] == [task.number for task in batch]
            assert loads < 6  # its own come first
        it.check_memory()


@on_loop
async def test_a_batch_of_large_inputs_has_fewer_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that BATCH_BYTES hold, the last of them whole; and always one."""
    monkeypatch.setattr(queue_module, "BATCH_BYTES", 25)
    async with line() as it:
        tasks = [it.add(10) for _ in range(5)] + [it.add(1000)]
        assert it.queue.take(tasks) == tasks[:3]
        assert it.queue.take(tasks[5:]) == tasks[5:]
        it.check_memory()


# --- arithmetic


@given(
    runs=st.lists(st.floats(0, 1e6), max_size=5), inits=st.lists(st.floats(0, 1e6), max_size=5),
    waiting=st.integers(0, 10_000), slots=st.integers(1, 64), ready=st.integers(0, 64),
)  # fmt: skip
def test_an_estimate_grows_with_the_queue_and_the_runs_and_is_bounded(
    runs: list[float], inits: list[float], waiting: int, slots: int, ready: int
) -> None:
    """Whole seconds between 1 and 3,600, and never less where there is more to do."""
    estimate = Estimate()
    for took_s in runs:
        estimate.note_run("f", took_s)
    for took_s in inits:
        estimate.note_init(took_s)
    said = estimate.retry_after_s(waiting=waiting, slots=slots, ready=ready)
    assert isinstance(said, int)
    assert MIN_RETRY_AFTER_S == 1 <= said <= 3600 == MAX_RETRY_AFTER_S
    assert estimate.retry_after_s(waiting=waiting + 100, slots=slots, ready=ready) >= said
    assert estimate.retry_after_s(waiting=waiting, slots=slots + 1, ready=ready) <= said
    assert estimate.retry_after_s(waiting=waiting, slots=slots, ready=0) >= said
    estimate.note_run("f", max(runs, default=1.0) + 1)
    assert estimate.retry_after_s(waiting=waiting, slots=slots, ready=ready) >= said


def test_an_estimate_is_what_the_queue_will_take() -> None:
    """Tasks over slots, times a run; and an @init before, where no worker is ready."""
    estimate = Estimate()
    assert estimate.retry_after_s(waiting=10, slots=2, ready=1) == 5  # a second each, as a guess
    estimate.note_run("f", 10)
    assert estimate.retry_after_s(waiting=10, slots=2, ready=1) == 50
    estimate.note_run("f", 20)  # a fifth of the way to it
    assert estimate.retry_after_s(waiting=10, slots=2, ready=1) == 60
    estimate.note_init(30)
    assert estimate.retry_after_s(waiting=10, slots=2, ready=1) == 60
    assert estimate.retry_after_s(waiting=10, slots=2, ready=0) == 90


@given(st.floats(1.01, 4), st.integers(1, 5000))
def test_a_wait_grows_by_its_factor(factor: float, failures: int) -> None:
    """Each failure more multiplies the wait, up to the limit; half of it is random."""
    rule = Backoff(first_s=0.2, limit_s=600, factor=factor)
    full = min(600, 0.2 * factor ** min(failures - 1, 64))
    assert full / 2 <= rule.wait_s(failures) <= full
