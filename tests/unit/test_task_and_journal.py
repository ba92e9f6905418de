"""The life of a task, and its record."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpu.service import journal as journal_module
from ogpu.service.errors import FailureReason, TaskError
from ogpu.service.journal import MemoryJournal, Outcome
from ogpu.service.task import (
    TRANSITIONS,
    CallbackState,
    IllegalTransitionError,
    Task,
    TaskState,
    WorkerReference,
)

NOW = datetime.now(timezone.utc)
WORKER = WorkerReference(slot=0, generation=1, pid=1)
SUCCESS = Outcome(TaskState.SUCCEEDED, result=b"{}")
FAILURE = Outcome(TaskState.FAILED, error=TaskError(FailureReason.EXCEPTION, "no"))


def accepted(journal: MemoryJournal, address: str = "a", function: str = "f") -> Task:
    task = Task(function, address, b"{}")
    asyncio.run(journal.accept(task))
    return task


@given(st.lists(st.sampled_from(TaskState), max_size=12))
def test_only_the_transitions_of_the_table_happen(wishes: list[TaskState]) -> None:
    """Whatever is asked, a task moves along the table only, and never out of a terminal state."""
    task = Task("f", "a", b"{}")
    for wish in wishes:
        before = task.state
        if wish in TRANSITIONS[before]:
            task.advance(wish)
            assert task.state is wish
        else:
            with pytest.raises(IllegalTransitionError):
                task.advance(wish)
            assert task.state is before


def test_the_terminal_states_are_the_ones_of_the_design() -> None:
    terminal = {state.value for state in TaskState if state.is_terminal}
    assert terminal == {"succeeded", "failed", "timed_out", "cancelled"}


def test_the_first_end_wins() -> None:
    """Later news of a task that has ended is dropped, and told to nobody."""
    journal, told = MemoryJournal(), []
    journal.on_transition(lambda task: told.append(task.state))
    task = accepted(journal)
    journal.start(task, WORKER, NOW)
    journal.finish(task, FAILURE)
    journal.finish(task, SUCCESS)
    assert task.state is TaskState.FAILED
    assert task.result is None
    assert told == [TaskState.RUNNING, TaskState.FAILED]


def test_a_requeued_task_forgets_the_worker_it_never_reached() -> None:
    journal = MemoryJournal()
    task = accepted(journal)
    task.timeout_s = 5
    journal.start(task, WORKER, NOW)
    assert task.started_at
    assert task.deadline
    journal.requeue(task)
    assert (task.state, task.started_at, task.worker, task.deadline) == (
        TaskState.QUEUED,
        None,
        None,
        None,
    )


def test_an_address_may_serve_several_functions() -> None:
    journal = MemoryJournal()
    one, two = accepted(journal, "a", "f"), accepted(journal, "a", "g")
    assert journal.find("f", "a") is one
    assert set(journal.find_all("a")) == {one, two}
    assert journal.find_all("b") == []


def test_tasks_that_are_over_are_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by count and by bytes; what is not over is never forgotten."""
    monkeypatch.setattr(journal_module, "MAX_KEPT_TASKS", 3)
    journal = MemoryJournal()
    waiting = accepted(journal, "waiting")
    for number in range(5):
        task = accepted(journal, f"t{number}")
        journal.start(task, WORKER, NOW)
        journal.finish(task, SUCCESS)
    kept = [name for name in ("t0", "t1", "t2", "t3", "t4") if journal.find("f", name)]
    assert kept == ["t2", "t3", "t4"]
    assert journal.find("f", "waiting") is waiting
    monkeypatch.setattr(journal_module, "MAX_KEPT_BYTES", 10)
    journal.start(waiting, WORKER, NOW)
    journal.finish(waiting, Outcome(TaskState.SUCCEEDED, result=b"x" * 100))
    assert journal.find("f", "t4") is None
    assert journal.find("f", "waiting") is waiting


def test_a_task_whose_callback_is_pending_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_KEPT_TASKS", 1)
    journal = MemoryJournal()
    task = accepted(journal, "pending")
    journal.start(task, WORKER, NOW)
    journal.record_delivery(task, CallbackState.PENDING)
    journal.finish(task, SUCCESS)
    for number in range(3):
        other = accepted(journal, f"t{number}")
        journal.start(other, WORKER, NOW)
        journal.finish(other, SUCCESS)
    assert task.is_active
    assert journal.find("f", "pending") is task
    journal.record_delivery(task, CallbackState.DELIVERED)
    assert not task.is_active


def test_ids_are_unique() -> None:
    assert len({Task("f", "a", b"").id for _ in range(1000)}) == 1000
