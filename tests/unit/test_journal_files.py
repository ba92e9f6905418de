"""The journal's folder and file: private, one front's, refused where they are no good."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ogpu.service.errors import JournalError
from ogpu.service.journal import Database, StateFolder
from ogpu.service.journal import schema as journal_schema
from support.journal import (
    accepted,
    ended,
    on_loop,
    opened,
)

MOST = 2**40


def an_old_journal(folder: Path) -> Path:
    """Make a journal with a queued and a succeeded task, closed in order."""

    async def fill() -> None:
        async with opened(folder) as (journal, _):
            await accepted(journal, "queued", b"x" * 9000)
            for number in range(200):  # the table has more than one page
                await ended(journal, f"a{number}")

    asyncio.run(fill())
    return folder / "journal.db"


def reopen(folder: Path) -> str:
    """Open a journal that cannot be opened; return what that says."""
    state = StateFolder(str(folder))
    try:
        with pytest.raises(JournalError) as raised:
            Database(state)
        return str(raised.value)
    finally:
        state.close()


def in_sql(statement: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        connection = sqlite3.connect(file)
        connection.executescript(statement)
        connection.close()

    return change


def in_another_programs(file: Path) -> None:
    file.unlink()
    in_sql("CREATE TABLE songs (name TEXT)")(file)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_bytes(file: Path) -> None:
    """Spoil the pages of the tasks, and nothing else."""
    connection = sqlite3.connect(file)
    ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'tasks'")
    connection.close()
    with file.open("r+b") as data:
        data.seek((root - 1) * 4096)
        page = data.read(4096)
        data.seek((root - 1) * 4096)
        data.write(bytes(byte ^ 0xFF for byte in page))


@pytest.mark.parametrize(
    ("spoil", "complaint", "remedy"),
    [
        (in_sql("PRAGMA user_version = 99"), "newer ogpu-service (schema 99", "another folder"),
        (in_another_programs, "another program's database", "another folder"),
        (lambda file: file.write_text("Dear diary,\n" * 999), "damaged", "put it aside"),
        (cut_short, "damaged", "put it aside"),
        (flip_bytes, "damaged", "put it aside"),
    ],
    ids=["newer", "another program's", "text", "cut short", "flipped bytes"],
)
def test_a_file_that_is_no_good_journal_is_refused_and_left_alone(
    tmp_path: Path, spoil: Callable[[Path], None], complaint: str, remedy: str
) -> None:
    """The message names the file and says what to do; not a byte of the file is changed."""
    file = an_old_journal(tmp_path)
    spoil(file)
    before = file.read_bytes()
    message = reopen(tmp_path)
    assert str(file) in message
    assert complaint in message
    assert remedy in message
    assert file.read_bytes() == before


@on_loop
async def test_a_journal_of_an_older_schema_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scripts that it lacks are run, once, all or nothing; its tasks are kept."""
    async with opened(tmp_path) as (journal, _):
        await accepted(journal, "queued", b"{1}")
        await ended(journal, "over")
    first = journal_schema.MIGRATIONS
    broken = (*first, "CREATE TABLE more (n); INSERT INTO more VALUES (1); SELECT nonsense;")
    monkeypatch.setattr(journal_schema, "MIGRATIONS", broken)
    assert "nonsense" in reopen(tmp_path)
    more = "CREATE TABLE more (n); INSERT INTO more VALUES (1);"
    monkeypatch.setattr(journal_schema, "MIGRATIONS", (*first, more))
    for _ in range(2):
        async with opened(tmp_path) as (journal, database):
            states = [
                (t.address, t.state.value) for t in (await journal.page(None, None, 9, MOST))[0]
            ]
            assert states == [("over", "succeeded"), ("queued", "queued")]
            assert await journal.inputs([1, 2], MOST) == {1: b"{1}"}
            assert database._connection.execute("SELECT n FROM more").fetchall() == [(1,)]
    monkeypatch.setattr(journal_schema, "MIGRATIONS", first)
    assert f"newer ogpu-service (schema {len(first) + 1}" in reopen(tmp_path)


@on_loop
async def test_a_journal_of_the_first_schema_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tasks are found by their names, and are over, or run, as they were to."""
    with monkeypatch.context() as old:
        old.setattr(journal_schema, "MIGRATIONS", journal_schema.MIGRATIONS[:1])
        async with opened(tmp_path) as (journal, _):
            for address in ("twice", "twice", "over"):
                await ended(journal, address)
            await accepted(journal, "queued", b"{1}")
    async with opened(tmp_path) as (journal, database):
        numbers = {a: [t.number for t in await journal.find(a)] for a in ("twice", "over", "no")}
        assert numbers == {"twice": [2], "over": [3], "no": []}
        assert [task.address for task in journal.unfinished()] == ["queued"]
        found = database._connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")
        assert ("tasks_by_address",) not in found.fetchall()


def test_a_folder_is_one_process_s_at_a_time_and_free_after_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one is told who has it; after a SIGKILL, when nobody tidies up, it is free."""
    folder = tmp_path / "state"
    code = (
        "import sys; from ogpu.service.journal import StateFolder; "
        "folder = StateFolder(sys.argv[1]); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"locked\n"
        monkeypatch.setattr("ogpu.service.journal.folder._LOCK_WAIT_S", 0.1)
        with pytest.raises(JournalError) as raised:
            StateFolder(str(folder))
        assert f"OGPU_STATE_DIR={folder}: the service with pid {owner.pid} uses" in str(
            raised.value
        )
        owner.send_signal(signal.SIGKILL)
    StateFolder(str(folder)).close()


@on_loop
async def test_nobody_else_can_read_the_journal(tmp_path: Path) -> None:
    """Folder 0700, files 0600, the WAL and what belongs to it among them."""
    folder = tmp_path / "state"
    async with opened(folder) as (journal, _):
        await accepted(journal)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert set(modes) == {"journal.db", "journal.db-wal", "journal.db-shm", "lock"}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
