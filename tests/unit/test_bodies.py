"""Large bodies: in files of their own, as safe as rows, and gone with them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from ogpu.service.errors import JournalError
from ogpu.service.journal import Database, StateFolder
from ogpu.service.journal.batch import FILED_BODY_BYTES, Batch, Kept
from ogpu.service.task import Outcome, TaskState
from support.journal import accepted, ended, log_heard, on_loop, opened, until

LARGE = b'"' + b"\xc3\xa9\0" * (FILED_BODY_BYTES // 3) + b'"'
SMALL = b'"small"'
MOST = 2**40


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateFolder]:
    folder = StateFolder(str(tmp_path))
    yield folder
    folder.close()


def files(folder: Path) -> list[str]:
    bodies = folder / "bodies"
    return sorted(file.name for file in bodies.iterdir()) if bodies.exists() else []


def make_it_fail(database: Database) -> None:
    """Have each commit fail after its bodies were written."""
    database._connection.executescript(
        "CREATE TEMP TRIGGER no BEFORE INSERT ON main.inputs BEGIN SELECT RAISE(ABORT, 'no'); END"
    )


@pytest.mark.parametrize("is_durable", [True, False])
def test_from_a_size_on_a_body_is_a_file(state: StateFolder, is_durable: bool) -> None:
    """It comes back byte for byte, beside smaller ones, and an empty one; :memory: has no files."""
    database = Database(state if is_durable else None)
    just_below = b"x" * (FILED_BODY_BYTES - 1)
    given = {1: SMALL, 2: LARGE, 3: just_below, 4: b""}
    database.write(Batch(inputs=list(given.items()), results=[(9, LARGE)]))
    expected = ["inputs-2", "inputs-4", "results-9"] if is_durable else []
    assert files(state.path) == expected
    assert database.inputs(given, MOST) == given
    database.write(Batch(settled=[1, 2]))
    assert database.inputs(given, MOST) == {3: just_below, 4: b""}
    assert files(state.path) == expected[1:]
    database.close()


def test_a_body_is_private(state: StateFolder) -> None:
    """Nobody but the owner may read the file, nor look into the folder."""
    database = Database(state)
    database.write(Batch(inputs=[(1, LARGE)]))
    folder = state.path / "bodies"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "inputs-1").stat().st_mode & 0o777 == 0o600
    database.close()


@on_loop
async def test_large_tasks_outlive_their_front(tmp_path: Path) -> None:
    """A front that just stops, and another one: the input is run, the result is shown."""
    async with opened(tmp_path, close=False) as (journal, _):
        await accepted(journal, "waits", LARGE)
        await ended(journal, "over", Outcome(TaskState.SUCCEEDED, LARGE), LARGE)
    assert files(tmp_path) == ["inputs-1", "results-2"]
    async with opened(tmp_path) as (journal, _):
        assert await journal.inputs([1], MOST) == {1: LARGE}
        (over,) = await journal.find("over")
        assert over.result == LARGE


@on_loop
async def test_what_is_forgotten_leaves_no_file(tmp_path: Path) -> None:
    """Pruning deletes a task's row, and its file after that; others stay."""
    async with opened(tmp_path) as (journal, database):
        for address in "ab":
            await ended(journal, address, Outcome(TaskState.SUCCEEDED, LARGE), LARGE)
        assert files(tmp_path) == ["results-1", "results-2"]
        assert [task.address for task in database.prune(Kept(1, 0), 0.0)] == ["a"]
        assert files(tmp_path) == ["results-2"]


def test_files_without_a_row_are_deleted_by_the_next_start(state: StateFolder) -> None:
    """The front died before the commit, or after one that deleted the row; or in the middle."""
    database = Database(state)
    database.write(Batch(inputs=[(1, LARGE), (2, SMALL)], results=[(1, LARGE)]))
    database.close()
    kept = files(state.path)
    for name in ("inputs-2", "inputs-3", "results-2", "inputs-1.begun", "tasks-1", "inputs-²"):
        (state.path / "bodies" / name).write_bytes(b"left")
    database = Database(state)
    assert files(state.path) == kept == ["inputs-1", "results-1"]
    assert database.inputs([1, 2], MOST) == {1: LARGE, 2: SMALL}
    database.close()


def test_a_commit_that_fails_leaves_no_file(state: StateFolder) -> None:
    """But for that of a row that was there before."""
    database = Database(state)
    database.write(Batch(inputs=[(1, LARGE)]))
    make_it_fail(database)
    with pytest.raises(Exception, match="no"):
        database.write(Batch(inputs=[(1, LARGE), (2, LARGE)], results=[(3, LARGE)]))
    assert files(state.path) == ["inputs-1"]
    database._connection.execute("DROP TRIGGER no")
    assert database.inputs([1, 2], MOST) == {1: LARGE}
    database.close()


@on_loop
async def test_bodies_that_cannot_be_written_are_not_accepted(tmp_path: Path) -> None:
    """The client is told; small tasks that come with them are refused, too, until all is well."""
    async with opened(tmp_path) as (journal, _):
        (tmp_path / "bodies").touch()  # no folder
        both = [accepted(journal, "large", LARGE), accepted(journal, "small", SMALL)]
        for error in await asyncio.gather(*both, return_exceptions=True):
            assert isinstance(error, JournalError)
            assert "bodies cannot be written" in str(error)
        (tmp_path / "bodies").unlink()
        await until(lambda: journal.trouble is None, "all is well", timeout_s=3)
        await accepted(journal, "large", LARGE)
        assert len(files(tmp_path)) == 1


@on_loop
async def test_a_file_that_is_missing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has deleted it: the log names it, and the others are read."""
    async with opened(tmp_path) as (journal, _):
        for address in "ab":
            await accepted(journal, address, LARGE)
        (tmp_path / "bodies" / "inputs-1").unlink()
        with log_heard():
            assert await journal.inputs([1, 2], MOST) == {2: LARGE}
        assert "inputs-1 is missing" in caplog.text
