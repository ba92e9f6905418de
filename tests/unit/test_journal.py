"""The journal: what it keeps, how it commits, what it does when the disk does nothing."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ogpu.service.errors import FailureReason, JournalError, TaskError
from ogpu.service.journal import Database, DeliveryUpdate, Lane, commits, pruning
from ogpu.service.journal.batch import Batch
from ogpu.service.task import CallbackState, Outcome, Progress, Task, TaskState
from support.journal import (
    NOW,
    RESULT_LANES,
    SUCCESS,
    WORKER,
    accepted,
    ended,
    failure,
    log_heard,
    on_loop,
    opened,
    until,
)

MOST = 2**40


# --- commits


@on_loop
async def test_what_one_step_of_the_loop_accepts_shares_a_commit() -> None:
    """A hundred tasks accepted at once cost one commit, and the next ones another."""
    async with opened() as (journal, database):
        before = database.commits
        await asyncio.gather(*(accepted(journal, f"a{number}") for number in range(100)))
        assert database.commits == before + 1
        await asyncio.gather(*(accepted(journal, f"b{number}") for number in range(100)))
        assert database.commits == before + 2


@on_loop
async def test_what_nobody_waits_for_is_written_within_a_moment(tmp_path: Path) -> None:
    """An end that nobody asks for is on the disk soon, and its task is out of the memory."""
    async with opened(tmp_path) as (journal, database):
        task = await accepted(journal)
        journal.start(task, WORKER, NOW)
        journal.finish(task, SUCCESS)
        commits_before = database.commits
        await until(lambda: database.commits > commits_before, "a commit", timeout_s=1)
        await until(lambda: journal.find_active("f", "a") is None, "forgotten", timeout_s=1)
        other = sqlite3.connect(tmp_path / "journal.db")
        assert other.execute("SELECT state FROM tasks").fetchall() == [("succeeded",)]
        other.close()


@on_loop
async def test_that_a_promised_task_runs_is_written_shortly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempt counts after a crash; of a task whose client waits the end alone is written."""
    monkeypatch.setattr(commits, "LAZY_S", 3600)
    async with opened(tmp_path) as (journal, database):
        await until(lambda: database.prunes, "the first look at what is too old, which commits")
        awaited = journal.accept("f", "awaited", b"{}", 60.0)
        await journal.settle()
        commits_before = database.commits
        journal.start(awaited, WORKER, NOW)
        later = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.02, later.set_result, None)
        await later
        assert database.commits == commits_before
        promised = await accepted(journal, "promised")
        journal.start(promised, WORKER, NOW)
        await until(lambda: database.commits > commits_before + 1, "a commit", timeout_s=1)
        await until(lambda: not journal._commits.will_write(promised.number), "it is over")
        other = sqlite3.connect(tmp_path / "journal.db")
        assert other.execute("SELECT DISTINCT state FROM tasks").fetchall() == [("running",)]
        other.close()


@on_loop
async def test_in_a_crowd_commits_wait_for_one_another_and_alone_none_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those who come after a crowd share a commit, which begins when there are enough of them."""
    monkeypatch.setattr(commits, "EVERY_S", 3600)
    async with opened() as (journal, database):
        for number in range(9):
            await asyncio.wait_for(accepted(journal, f"alone{number}"), 1)
        await asyncio.gather(*(accepted(journal, f"a{n}") for n in range(commits.CROWD)))
        before = database.commits
        others = [
            asyncio.ensure_future(accepted(journal, f"b{n}")) for n in range(commits.ENOUGH - 1)
        ]
        assert (await asyncio.wait(others, timeout=0.05))[0] == set()
        await asyncio.wait_for(asyncio.gather(accepted(journal, "the last"), *others), 1)
        assert database.commits == before + 1


@on_loop
async def test_who_asks_to_be_called_is_called_once_and_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When the task is on the disk, and not before; at the loop's next step where it is already."""
    errors: list[JournalError | None] = []
    async with opened(tmp_path) as (journal, database):
        database.hold.clear()
        tasks = [journal.accept("f", f"a{number}", b"{}", 60.0) for number in range(3)]
        with log_heard():
            journal.when_stored(tasks[0], lambda _: 1 / 0)  # a defect costs nobody else
            for task in tasks:
                journal.when_stored(task, errors.append)
            await asyncio.sleep(0.01)  # a commit is under way, and hangs
            journal.when_stored(tasks[2], errors.append)
            assert errors == []
            database.hold.set()
            await until(lambda: len(errors) == 4, "the calls")
        other = sqlite3.connect(tmp_path / "journal.db")
        assert other.execute("SELECT count(*) FROM tasks").fetchone() == (3,)
        other.close()
        journal.when_stored(tasks[0], errors.append)
        assert len(errors) == 4
        await asyncio.sleep(0)
        assert errors == [None] * 5
    assert "Who waited for the journal failed" in caplog.text


@given(st.binary(max_size=100) | st.text(max_size=50).map(str.encode))
@example(b"x" * 32 * 1024)
@example(b"x" * (32 * 1024 + 1))
@example(b"\0" * 3_000_000)
@example(b'\xef\xbb\xbf"\\u0000\\ud800 \xe2\x80\xa8"')
def test_bodies_come_back_byte_for_byte(body: bytes) -> None:
    """Whatever its bytes and its size: an input, a result, and beside a large one of another."""
    database = Database(None)
    large = b"\xff" * 40_000
    database.write(Batch(inputs=[(1, body), (2, large)], results=[(3, body)]))
    database.write(Batch(inputs=[(4, body)]))
    assert database.inputs([1, 2, 4], MOST) == {1: body, 2: large, 4: body}
    assert database._body("results", 3) == body
    database.close()


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "ü\u2028\n\U0001f600", "'\"\\"])
@on_loop
async def test_a_task_is_the_same_after_a_restart(tmp_path: Path, text: str) -> None:
    """Every field, with any text that a handler may print, or that its exception may say."""
    error = TaskError(FailureReason.EXCEPTION, text, text, text, 9, 1, text, text)
    async with opened(tmp_path) as (journal, _):
        task = await accepted(journal)
        journal.start(task, WORKER, NOW)
        journal.note_progress(task, Progress(1 / 3, text))
        journal.finish(task, Outcome(TaskState.FAILED, error=error, output=text))
        await journal.stored(task)
    async with opened(tmp_path) as (journal, _):
        (found,) = await journal.find("a")
        task.timeout_s = None  # the handler's, not the task's
        clean = text.encode("utf-8", "backslashreplace").decode()  # what UTF-8 can say of it
        task.error = TaskError(error.reason, clean, clean, clean, 9, 1, clean, clean)
        task.progress, task.output = Progress(1 / 3, clean), clean
        assert {n: getattr(found, n) for n in Task.__slots__} == {
            n: getattr(task, n) for n in Task.__slots__
        }
        assert (found.deadline, found.worker) == (task.deadline, WORKER)


# --- names, deliveries, pages, forgetting


@on_loop
async def test_a_requeued_task_forgets_the_worker_it_never_reached() -> None:
    async with opened() as (journal, _):
        task = await accepted(journal)
        journal.start(task, WORKER, NOW)
        assert task.deadline is not None
        journal.requeue(task, is_loss=True)
        assert (task.state, task.attempt) == (TaskState.QUEUED, 2)
        assert (task.started_at, task.worker, task.deadline) == (None, None, None)


@on_loop
async def test_an_address_may_serve_several_functions_and_ids_are_unique() -> None:
    """Also over journals: an id is what a receiver knows a delivery by."""
    async with opened() as (journal, _), opened() as (other, _):
        one, two = (journal.accept(function, "a", b"", None) for function in "fg")
        assert journal.find_active("f", "a") is one
        assert {task.id for task in await journal.find("a")} == {one.id, two.id}
        assert await journal.find("b") == []
        assert len({one.id, two.id, (await accepted(other)).id}) == 3


@on_loop
async def test_deliveries_come_in_the_order_in_which_they_are_due() -> None:
    """As many as wanted, none that is held, none too early; and with the time to look again."""
    async with opened(lanes=RESULT_LANES) as (journal, _):
        tasks = [await ended(journal, f"a{number}") for number in range(5)]
        for task, due in zip(tasks, (30.0, 10.0, 20.0, 50.0, 40.0), strict=True):
            update = DeliveryUpdate(CallbackState.PENDING, Lane.RESULTS_AGAIN, 2, "no", due, 1.0)
            journal.record_delivery(task, update)

        async def due_at(now: float, held: set[int], limit: int, most: int = MOST) -> object:
            lane, names = Lane.RESULTS_AGAIN, frozenset(tasks[n].number for n in held)
            due, again = await journal.due_deliveries(lane, now, names, limit, most)
            assert all((d.lane, d.attempts, d.since) == (lane, 2, 1.0) for d in due)
            assert all(d.task.result == SUCCESS.result for d in due)
            return [int(d.task.address[1:]) for d in due], again

        assert await due_at(35, set(), 10) == ([1, 2, 0], 40.0)
        assert await due_at(35, {2}, 10) == ([1, 0], 40.0)
        assert await due_at(35, {1, 2}, 1) == ([0], 40.0)
        assert await due_at(35, set(), 2) == ([1, 2], 30.0)
        assert await due_at(99, set(), 5) == ([1, 2, 0, 4, 3], None)
        assert await due_at(99, set(), 5, most=1) == ([1], 20.0)
        assert await due_at(5, set(), 5) == ([], 10.0)
        assert await due_at(99, set(), 0) == ([], 10.0)
        assert await journal.due_deliveries(Lane.RESULTS, 1e12, frozenset(), 5, MOST) == ([], None)


@given(states=st.lists(st.sampled_from(["queued", "running", "failed"]), max_size=12),
       limit=st.integers(1, 5), most=st.sampled_from([1, 2500, MOST]))  # fmt: skip
def test_pages_show_each_task_once_newest_first(states: list[str], limit: int, most: int) -> None:
    """For every limit, of one state or of all, also where a page ends early for its size."""

    async def turn_pages() -> None:
        async with opened() as (journal, _):
            for state in states:
                task = await (ended(journal, "a", failure()) if state == "failed"
                              else accepted(journal, "a"))  # fmt: skip
                if state == "running":
                    journal.start(task, WORKER, NOW)
            for state in (None, TaskState.QUEUED, TaskState.RUNNING, TaskState.FAILED):
                seen: list[int] = []
                below, has_more = None, True
                while has_more:
                    page, has_more = await journal.page(state, below, limit, most)
                    assert len(page) <= limit
                    assert page or not has_more
                    seen += (task.number for task in page)
                    below = seen[-1] if seen else None
                wanted = [n for n, s in enumerate(states, 1) if state in (None, s)]
                assert seen == wanted[::-1]

    asyncio.run(turn_pages())


@pytest.mark.parametrize(
    ("limits", "ttl_s", "kept"),
    [
        (pruning.Kept(3, MOST), 1e9, ["t2", "t3", "t4"]),
        (pruning.Kept(1000, 3 * len(SUCCESS.result or b"")), 1e9, ["t2", "t3", "t4"]),
        (pruning.Kept(1000, MOST), 1e-9, []),
        (pruning.Kept(1000, MOST), 1e9, ["t0", "t1", "t2", "t3", "t4"]),
    ],
    ids=["number", "bytes", "age", "within"],
)
@on_loop
async def test_the_oldest_of_what_is_over_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, limits: pruning.Kept, ttl_s: float, kept: list[str]
) -> None:
    """No more than is needed; never what is active, nor an end that is not delivered yet."""
    monkeypatch.setattr("ogpu.service.journal.journal.MEMORY_LIMITS", limits)
    monkeypatch.setattr(pruning, "_CROWD_EVERY_S", 0.001)
    monkeypatch.setattr(pruning, "_AGE_EVERY_S", 0.0)
    async with opened(lanes=(Lane.RESULTS,), task_ttl_s=ttl_s) as (journal, database):
        await accepted(journal, "queued")
        running = await accepted(journal, "running")
        journal.start(running, WORKER, NOW)
        await ended(journal, "undelivered")
        for number in range(5):
            task = await ended(journal, f"t{number}")
            update = DeliveryUpdate(CallbackState.DELIVERED, Lane.RESULTS, 1, None, None, 1.0)
            journal.record_delivery(task, update)
        await journal.settle()
        looks = database.prunes
        await until(lambda: database.prunes > looks + 1, "two looks, of which one began after")
        names = [task.address for task in (await journal.page(None, None, 100, MOST))[0]]
        assert names == [*kept[::-1], "undelivered", "running", "queued"]
        assert len(await journal.inputs(range(100), MOST)) == 3
