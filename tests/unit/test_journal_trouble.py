"""A disk that takes nothing: what is withdrawn, what is kept, what is shown."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from ogpu.service.errors import JournalError
from ogpu.service.journal import DeliveryUpdate, Lane, commits
from ogpu.service.task import CallbackState, Task
from support.journal import (
    FULL,
    NOW,
    RESULT_LANES,
    SUCCESS,
    WORKER,
    accepted,
    ended,
    log_heard,
    on_loop,
    opened,
    until,
)

MOST = 2**40


@on_loop
async def test_what_a_full_disk_does_not_take_is_not_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queued tasks are withdrawn, and whoever waits, or asks later, is told why; nothing hangs."""
    monkeypatch.setattr(commits, "RETRY_S", 0.001)
    withdrawn: list[Task] = []
    async with opened() as (journal, database):
        journal.on_withdrawn(withdrawn.append)
        database.is_full = True
        tasks = [journal.accept("f", name, b"{}", None) for name in ("a", "b")]
        with pytest.raises(JournalError, match=FULL):
            await journal.stored(tasks[0])
        assert withdrawn == tasks
        errors: list[JournalError | None] = []
        journal.when_stored(tasks[1], errors.append)
        await until(lambda: errors, "the call")
        assert FULL in str(errors[0])
        with pytest.raises(JournalError, match=FULL):  # as a request with Prefer: wait does
            await journal.stored(tasks[1])
        assert FULL in (journal.trouble or "")
        with pytest.raises(JournalError, match=FULL):
            journal.accept("f", "c", b"{}", None)
        assert await journal.find("a") == []
        database.is_full = False
        await until(lambda: journal.trouble is None, "no trouble")
        with pytest.raises(JournalError):
            await journal.stored(tasks[1])
        await accepted(journal, "a")
        assert [task.address for task in (await journal.page(None, None, 9, MOST))[0]] == ["a"]


@on_loop
async def test_what_runs_while_the_disk_is_full_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end, and what came of deliveries, are written when the disk takes them again."""
    monkeypatch.setattr(commits, "RETRY_S", 0.001)
    update = DeliveryUpdate(CallbackState.DELIVERED, Lane.RESULTS, 1, None, None, 1.0)
    async with opened(tmp_path, RESULT_LANES) as (journal, database):
        delivered, known = await ended(journal, "delivered"), await accepted(journal, "known")
        database.is_full = True
        new = journal.accept("f", "new", b"{}", None)
        for task in (new, known):
            journal.start(task, WORKER, NOW)
        await until(lambda: journal.trouble, "trouble")
        journal.record_delivery(delivered, update)
        for task in (new, known):
            journal.finish(task, SUCCESS)
        waiting = asyncio.ensure_future(journal.stored(known))
        errors: list[JournalError | None] = []
        journal.when_stored(known, errors.append)
        with pytest.raises(JournalError, match=FULL):
            await waiting
        await until(lambda: errors, "the call")
        assert FULL in str(errors[0])
        assert journal.undelivered == 3
        refusals = database.refusals
        await until(lambda: database.refusals > refusals + 1, "it is tried again and again")
        database.is_full = False
        await until(lambda: journal.trouble is None, "no trouble")
        await journal.stored(new)
        assert journal.undelivered == 2
    async with opened(tmp_path, RESULT_LANES) as (journal, _):
        due, _ = await journal.due_deliveries(Lane.RESULTS, 1e12, frozenset(), 9, MOST)
        assert {d.task.address for d in due} == {"new", "known"}
        assert all(d.task.result == SUCCESS.result for d in due)
        (told,) = await journal.find("delivered")
        assert told.callback.state is CallbackState.DELIVERED


@pytest.mark.parametrize("function", ["f", None])
@on_loop
async def test_an_end_that_is_not_on_the_disk_is_not_shown(function: str | None) -> None:
    """After a crash the task would run again, and could end otherwise."""
    async with opened() as (journal, database):
        task = await accepted(journal)
        journal.start(task, WORKER, NOW)
        await journal.settle()
        database.is_full = True
        journal.finish(task, SUCCESS)
        await until(lambda: journal.trouble, "trouble")
        with pytest.raises(JournalError, match=FULL):
            await journal.find("a", function)
        database.is_full = False


@on_loop
async def test_closing_while_the_disk_is_full_ends_soon_and_for_good(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried once more, and told; nothing is tried after that."""
    monkeypatch.setattr(commits, "RETRY_S", 0.01)
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with opened(close=False) as (journal, database):
        task = await accepted(journal)
        journal.start(task, WORKER, NOW)
        database.is_full = True
        journal.finish(task, SUCCESS)
        started = time.monotonic()
        await journal.close()
        assert time.monotonic() - started < 2
    assert (
        f"written to the journal at the end: the journal cannot be written: {FULL}" in caplog.text
    )
    loop = asyncio.get_running_loop()
    later = loop.create_future()
    loop.call_later(5 * commits.RETRY_S, later.set_result, None)  # after the timer of a retry
    await later
    assert complaints == []


@on_loop
async def test_a_disk_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Closing waits for so long and no longer, and says so."""
    monkeypatch.setattr(commits, "CLOSE_LIMIT_S", 0.1)
    async with opened(close=False) as (journal, database):
        database.hold.clear()
        journal.accept("f", "a", b"{}", None)
        await journal.close()
        database.hold.set()
        await until(lambda: database.commits, "the end of the hang")
    assert "written to the journal at the end: the disk hangs" in caplog.text


@on_loop
async def test_nothing_is_read_for_delivery_that_the_disk_does_not_know_of(tmp_path: Path) -> None:
    """In trouble the database still shows as due what was delivered: it would go out for ever."""
    update = DeliveryUpdate(CallbackState.DELIVERED, Lane.RESULTS, 1, None, None, 1.0)
    async with opened(tmp_path, RESULT_LANES) as (journal, database):
        delivered = await ended(journal, "delivered")
        assert (await journal.due_deliveries(Lane.RESULTS, 1e12, frozenset(), 9, MOST))[0]
        database.is_full = True
        journal.record_delivery(delivered, update)
        await until(lambda: journal.trouble, "trouble")
        with pytest.raises(JournalError, match=FULL):
            await journal.due_deliveries(Lane.RESULTS, 1e12, frozenset(), 9, MOST)
        database.is_full = False
        await until(lambda: journal.trouble is None, "no trouble")
        assert (await journal.due_deliveries(Lane.RESULTS, 1e12, frozenset(), 9, MOST))[0] == []


@on_loop
async def test_a_listener_with_a_defect_costs_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other listeners hear of the task, the next tasks are written, and the log tells."""
    told: list[str] = []

    def broken(_: Task) -> None:
        raise ValueError("a defect")

    async with opened(tmp_path, RESULT_LANES) as (journal, _):
        for subscribe in (journal.on_transition, journal.on_stored):
            subscribe(broken)
        journal.on_stored(lambda task: told.append(task.address))
        with log_heard():
            await ended(journal, "one")
            await ended(journal, "two")
        assert {"one", "two"} <= set(told)
    assert "A listener of the journal failed" in caplog.text
