"""The life of a task: the table of transitions, and the journal against a plain model of it.

The machine does to a journal, in any order, what the front, its disk and a crash can do to it. A
crash is a copy of the database and its WAL, as they are between two commits (or with a torn one at
the end), opened by another journal; what the first one had in memory is gone.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ogpu.service.errors import JournalError
from ogpu.service.journal import DeliveryUpdate, Lane, StateFolder
from ogpu.service.task import (
    TRANSITIONS,
    Callback,
    CallbackState,
    IllegalTransitionError,
    Outcome,
    Task,
    TaskState,
)
from support.journal import (
    NOW,
    RESULT_LANES,
    WORKER,
    FrailDatabase,
    Life,
    Run,
    failure,
    seen,
    until,
)

S = TaskState
# The table as the design draws it; what is common stands first and often.
WAYS = {
    S.QUEUED: [S.RUNNING, S.RUNNING, S.RUNNING, S.FAILED, S.CANCELLED, S.EXPIRED],
    S.RUNNING: [S.SUCCEEDED, S.SUCCEEDED, S.QUEUED, S.FAILED, S.TIMED_OUT, S.CANCELLED],
}
NAMES = [(function, address) for function in "fg" for address in "ab"]
TERMINAL = [state for state in TaskState if state.is_terminal]
TOLD = [CallbackState.PENDING, CallbackState.DELIVERED, CallbackState.GIVEN_UP]
WHICH = st.integers(0, 100)
MEMORY_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None  # has no slow fsync


@given(st.lists(st.sampled_from(TaskState), max_size=12))
def test_only_the_transitions_of_the_table_happen(wishes: list[TaskState]) -> None:
    """Whatever is asked, a task moves as the design draws it, and never out of a terminal state."""
    task = Task(1, "task_1", "f", "a", b"{}")
    for wish in wishes:
        before = task.state
        if wish in WAYS.get(before, ()):
            task.advance(wish)
            assert task.state is wish
        else:
            with pytest.raises(IllegalTransitionError, match=f"{before.value} → {wish.value}"):
                task.advance(wish)
            assert task.state is before


def test_the_terminal_states_are_the_ones_of_the_design() -> None:
    """Five states are terminal; every state is reached from another one."""
    terminal = {state.value for state in TERMINAL}
    assert terminal == {"succeeded", "failed", "timed_out", "cancelled", "expired"}
    assert set().union(*TRANSITIONS.values()) == set(TaskState)
    assert [state for state in TaskState if not TRANSITIONS[state]] == TERMINAL


class Body(Enum):
    """Inputs and results; by name, since a failing case shows them."""

    EMPTY = b""
    SMALL = b"{}"
    ODD = b"\x00\xff"
    LARGE = b"\xff" * 40_000


BODIES = st.sampled_from(Body)


class JournalMachine(RuleBasedStateMachine):
    """A journal, and the model of what it must know."""

    is_durable = True

    @initialize(lazy_s=st.sampled_from([0.0, 3600.0]))
    def begin(self, lazy_s: float) -> None:
        self.lazy_s = lazy_s
        self.root = Path(tempfile.mkdtemp(dir=MEMORY_FOLDER))
        self.lives = 0
        self.runs: list[Run] = []
        self.open()

    def open(self) -> None:
        path = self.root / f"{self.lives}" if self.is_durable else None
        self.life = Life(path, self.on_withdrawn, self.lazy_s)
        self.journal, self.run = self.life.journal, self.life.run
        self.expected: list[tuple[int, TaskState]] = []
        unfinished = self.unfinished()
        assert [t.number for t in self.life.recovered] == [run.task.number for run in unfinished]
        for task, run in zip(self.life.recovered, unfinished, strict=True):
            run.task = task

    def on_withdrawn(self, task: Task) -> None:
        """Only what was never on the disk, and does not run, is withdrawn."""
        (run,) = (run for run in self.runs if run.task is task)
        assert run.history[0] is None
        assert run.now.state is TaskState.QUEUED
        self.runs.remove(run)

    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if not run.now.state.is_terminal]

    def newest(self) -> dict[tuple[str, str], Run]:
        return {run.task.key: run for run in self.runs}

    # --- what the front does

    @rule(which=WHICH, body=BODIES, wait=st.booleans())
    def accept(self, which: int, body: Body, wait: bool) -> None:
        newest = self.newest()  # a POST of the name of a task that is active joins that one
        free = [name for name in NAMES if name not in newest or newest[name].now.is_over]
        if not free:
            return
        name = free[which % len(free)]
        if self.journal.trouble is not None:
            with pytest.raises(JournalError):
                self.journal.accept(*name, body.value, 60.0)
            return
        self.runs.append(Run(self.journal.accept(*name, body.value, 60.0), body.value))
        if wait:
            self.wait(-1)

    @precondition(lambda self: self.runs)
    @rule(which=WHICH)
    def wait(self, which: int) -> None:
        run = self.runs[which % len(self.runs)]
        try:
            self.run(self.journal.stored(run.task))
        except JournalError:
            if self.life.database.is_full or run not in self.runs:
                return
            self.run(self.room_is_known())  # there is some, and it has not heard of that yet
            self.run(self.journal.stored(run.task))
        if not run.was_told:
            run.settle()

    async def room_is_known(self) -> None:
        while self.journal.trouble is not None:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)

    def move(self, task: Task, state: TaskState, result: bytes) -> None:
        if state is TaskState.RUNNING:
            self.journal.start(task, WORKER, NOW)
        elif state is TaskState.QUEUED:
            self.journal.requeue(task, is_loss=True)
        elif state is TaskState.SUCCEEDED:
            self.journal.finish(task, Outcome(state, result=result))
        else:
            self.journal.finish(task, failure(state))

    @precondition(lambda self: self.unfinished())
    @rule(which=WHICH, way=WHICH, result=BODIES)
    def move_on(self, which: int, way: int, result: Body) -> None:
        run = self.unfinished()[which % len(self.unfinished())]
        state = WAYS[run.now.state][way % len(WAYS[run.now.state])]
        self.move(run.task, state, result.value)
        self.expected.append((run.task.number, state))
        match state:
            case TaskState.QUEUED:
                run.note(state=state, attempt=run.now.attempt + 1)
            case TaskState.SUCCEEDED:
                run.note(state=state, result=result.value, callback=CallbackState.PENDING)
            case _:
                run.note(state=state)

    @precondition(lambda self: self.runs)
    @rule(which=WHICH, state=st.sampled_from(TaskState))
    def move_wrongly(self, which: int, state: TaskState) -> None:
        """The first end wins, over late and repeated ones; no other move changes anything."""
        run = self.runs[which % len(self.runs)]
        if run.now.state.is_terminal and state.is_terminal:
            self.move(run.task, state, b"late")
        elif state not in WAYS.get(run.now.state, ()):
            with pytest.raises(IllegalTransitionError):
                self.move(run.task, state, b"wrong")
        assert run.task.state is run.now.state

    @precondition(lambda self: self.newest())
    @rule(which=WHICH, state=st.sampled_from(TOLD))
    def deliver(self, which: int, state: CallbackState) -> None:
        """A delivery that failed, is over, or is asked for once more; of an end on the disk."""
        ends = [run for run in self.newest().values() if run.now.state is TaskState.SUCCEEDED]
        if not ends:
            return
        run = ends[which % len(ends)]
        self.wait(self.runs.index(run))
        if run.history[0] is None or not run.history[0].state.is_terminal:
            return
        run.was_told = True
        found = replace(run.task, callback=Callback(run.now.callback))  # as find() would show it
        is_resend = state is CallbackState.PENDING and run.now.callback is not CallbackState.PENDING
        run.note(callback=state, tries=run.now.tries + 1)
        due = 5.0 if state is CallbackState.PENDING else None
        update = DeliveryUpdate(state, Lane.RESULTS_AGAIN, run.now.tries, "no", due, 1.0)
        if is_resend:
            self.journal.record_resend(found, update)
        else:
            self.journal.record_delivery(run.task, update)

    @precondition(lambda self: self.unfinished())
    @rule(which=WHICH)
    def drop_input(self, which: int) -> None:
        """The queue drops an input that is on the disk."""
        run = self.unfinished()[which % len(self.unfinished())]
        if run.history[0] is not None:
            run.task.input = None

    @precondition(lambda self: self.runs)
    @rule(steps=st.integers(1, 4))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.life.step()

    # --- what the world does

    @precondition(lambda self: self.runs)
    @rule()
    def fill_the_disk(self) -> None:
        self.life.database.is_full = True

    @precondition(lambda self: self.life.database.is_full)
    @rule()
    def make_room(self) -> None:
        self.life.database.is_full = False
        self.run(until(lambda: self.journal.trouble is None, "no trouble"))

    @precondition(lambda self: self.is_durable and self.runs)
    @rule(torn=st.booleans())
    def crash(self, torn: bool) -> None:
        """What was known to be on the disk is there; each task is as it was then, or later."""
        self.lives += 1
        new = self.root / f"{self.lives}"
        self.life.copy(new)
        self.life.abandon()
        if torn:  # the beginning of a commit that was not completed
            with (new / "journal.db-wal").open("ab") as wal:
                wal.write(b"\x01" * 3000)
        self.check_what_is_left(new)
        self.open()
        for run in self.unfinished():
            if run.now.state is TaskState.RUNNING:
                self.journal.requeue(run.task, is_loss=True)
                run.note(state=TaskState.QUEUED, attempt=run.now.attempt + 1)
                self.expected.append((run.task.number, TaskState.QUEUED))

    def check_what_is_left(self, path: Path) -> None:
        folder = StateFolder(str(path))
        database = FrailDatabase(folder)
        left = {task.number: task for task in database.page(None, None, 10_000, 2**40)[0]}
        for run in list(self.runs):
            task = left.pop(run.task.number, None)
            assert (None if task is None else seen(task)) in run.history
            if task is None:
                self.runs.remove(run)
                continue
            run.history, run.task, run.was_told = [seen(task)], task, False
            kept = database.inputs([task.number], 2**40).get(task.number)
            if not run.now.state.is_terminal:
                assert kept == run.body
            elif run.now.is_over:
                assert kept is None
        assert not left
        database.close()
        folder.close()

    # --- what must be true

    @invariant()
    def each_transition_is_told_once(self) -> None:
        assert self.life.defects == []
        assert self.life.told == self.expected
        assert all(count == 1 for count in self.life.stored_ends.values() if count)

    @precondition(lambda self: self.runs and not self.life.database.is_full)
    @rule()
    def read(self) -> None:
        """All that the journal is asked, it answers as the model does."""
        self.run(until(lambda: self.journal.trouble is None, "no trouble"))
        self.run(self.journal.settle())
        for run in self.runs:
            run.settle()
        every, more = self.run(self.journal.page(None, None, 10_000, 2**40))
        assert not more
        assert [(task.number, seen(task)) for task in every] == [
            (run.task.number, run.now) for run in reversed(self.runs)
        ]
        assert set(self.journal.unfinished()) == {run.task for run in self.unfinished()}
        ends = {number for number, state in self.expected if state.is_terminal}
        assert {number for number, count in self.life.stored_ends.items() if count} == ends
        self.check_names()
        self.check_deliveries()
        self.check_inputs()

    def check_names(self) -> None:
        newest = self.newest()
        for address in "ab":
            found = {task.key: seen(task) for task in self.run(self.journal.find(address))}
            assert found == {key: run.now for key, run in newest.items() if key[1] == address}
        for function, address in NAMES:
            found = [seen(task) for task in self.run(self.journal.find(address, function))]
            known = newest.get((function, address))
            assert found == ([] if known is None else [known.now])

    def check_deliveries(self) -> None:
        pending = [run for run in self.runs if run.now.callback is CallbackState.PENDING]
        assert self.journal.undelivered == len(pending)
        assert all(self.journal.may_be_undelivered(*run.task.key) for run in pending)
        for lane in RESULT_LANES:
            due, again = self.run(
                self.journal.due_deliveries(lane, 1e12, frozenset(), 10_000, 2**40)
            )
            assert again is None
            assert {(d.task.number, d.attempts, d.task.result) for d in due} == {
                (run.task.number, run.now.tries, run.now.result)
                for run in pending
                if (run.now.tries > 0) is (lane is Lane.RESULTS_AGAIN)
            }

    def check_inputs(self) -> None:
        bodies = self.run(self.journal.inputs([run.task.number for run in self.runs], 2**40))
        for run in self.runs:
            if not run.now.state.is_terminal:
                assert bodies[run.task.number] == run.body
            elif run.now.is_over:
                assert run.task.number not in bodies

    def teardown(self) -> None:
        try:
            if self.runs and not self.life.is_over:  # it is where a crash has lost something
                self.life.database.is_full = False
                self.read()
        finally:
            self.life.abandon()
            shutil.rmtree(self.root)


class MemoryJournalMachine(JournalMachine):
    """The same without a folder: there is nothing to come back to after a crash."""

    is_durable = False


_QUICK = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestJournal = JournalMachine.TestCase
TestJournal.settings = _QUICK
TestMemoryJournal = MemoryJournalMachine.TestCase
TestMemoryJournal.settings = _QUICK
