"""The journal's SQLite database: opening it, writing a commit, reading what was asked.

``Database`` is made by the front at start(), before its event loop runs, and used by the journal's
one thread from then on. Nothing here knows what a transition means.

1. Open: WAL, synchronous=FULL (a commit is on the disk when it returns), a private file. Check that
   it is ours, whole, and of a version that is known; bring an older one up to date.
2. Write: a batch is one transaction. Whatever fails leaves the database as it was.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from pydantic_core import to_json

from ..errors import JournalError
from ..task import CallbackState, Task, TaskState
from . import schema
from .batch import Batch, Body, Forgotten, Kept, Written, by_size
from .bodies import Bodies, FileBodies, FiledBody, MemoryBodies
from .deliveries import Delivery, Lane
from .disk import Disk
from .folder import StateFolder
from .rows import Row, task_of

MEMORY = ":memory:"
_FILE = "journal.db"
_BODIES_FOLDER = "bodies"
_COLUMNS = ", ".join(schema.TASK_COLUMNS)
_OVER = (
    f"state NOT IN ('{TaskState.QUEUED.value}', '{TaskState.RUNNING.value}') "
    f"AND callback != '{CallbackState.PENDING.value}'"
)

PRUNE_AT_ONCE = 250
_LONGEST_PAUSE_S = 2 * 86_400.0
_AT = {name: index for index, name in enumerate(schema.TASK_COLUMNS)}


class Database:
    """An open journal database; every method is called by one thread at a time."""

    def __init__(self, folder: StateFolder | None) -> None:
        """Open the database in a folder; None: in memory.

        Raises:
            JournalError: it cannot be opened, is damaged, or is not a journal.
        """
        self.is_durable = folder is not None
        self._where = MEMORY if folder is None else str(folder.private_file(_FILE))
        self._disk = Disk(None if folder is None else self._where)
        try:
            self._connection = sqlite3.connect(
                self._where, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            self._prepare()
            self._bodies: Bodies = (
                MemoryBodies()
                if folder is None
                else FileBodies(folder.path / _BODIES_FOLDER, self._refers_to_file)
            )
        except sqlite3.Error as error:
            self._connection.close()
            raise self._unusable(error) from error
        except JournalError:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the database; what was committed is in it."""
        self._connection.close()

    def _prepare(self) -> None:
        execute = self._connection.execute
        version = self._version()  # before anything is changed: it may be somebody else's file
        if not version:
            execute("PRAGMA auto_vacuum = INCREMENTAL")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA temp_store = MEMORY")
        execute(f"PRAGMA wal_autocheckpoint = {self._disk.wal_pages}")
        # The bodies are not read through: that would take as long as reading all of them.
        for table in ("tasks", "inputs") if version else ():
            (verdict,) = execute(f"PRAGMA quick_check({table})").fetchone()
            if verdict != "ok":
                raise self._damaged(verdict)
        for number, script in enumerate(schema.MIGRATIONS[version:], version + 1):
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {script} PRAGMA application_id = {schema.APPLICATION_ID}; "
                f"PRAGMA user_version = {number}; COMMIT"
            )
        self._connection.executescript(schema.BATCH)
        ((self.journal_id,),) = execute("SELECT value FROM facts WHERE name = 'journal_id'")
        highest = execute("SELECT seq FROM sqlite_sequence WHERE name = 'tasks'").fetchone()
        self.last_number: int = 0 if highest is None else highest[0]

    def _version(self) -> int:
        ((version,),) = self._connection.execute("PRAGMA user_version")
        ((owner,),) = self._connection.execute("PRAGMA application_id")
        ((tables,),) = self._connection.execute("SELECT count(*) FROM sqlite_master")
        if tables and owner != schema.APPLICATION_ID:
            raise JournalError(
                f"{self._where} is another program's database; give the service another folder"
            )
        if version > len(schema.MIGRATIONS):
            raise JournalError(
                f"{self._where} was written by a newer ogpu-service (schema {version}, this one "
                f"knows {len(schema.MIGRATIONS)}); install that version, or use another folder"
            )
        return int(version)

    def _unusable(self, error: sqlite3.Error) -> JournalError:
        if isinstance(error, sqlite3.OperationalError):
            return JournalError(f"the journal {self._where} cannot be used: {error}")
        return self._damaged(str(error))

    def _damaged(self, verdict: str) -> JournalError:
        return JournalError(
            f"the journal {self._where} is damaged ({verdict}); put it aside, with its -wal file, "
            "to start with an empty one: tasks that it holds are not run until it is repaired"
        )

    # --- writing

    def write(self, batch: Batch) -> Written:
        """Commit a batch.

        Raises:
            sqlite3.Error, JournalError: nothing of it was written.
        """
        started = time.perf_counter()
        body_bytes = sum(len(body) for _, body in chain(batch.inputs, batch.results))
        self._disk.require(body_bytes, is_new=bool(batch.inputs))
        inputs, large_inputs, filed_inputs = by_size(batch.inputs)
        results, large_results, filed_results = by_size(batch.results)
        cells = tuple(
            to_json(part).decode()
            for part in (  # as the columns of the view
                batch.tasks,
                batch.pending,
                inputs,
                results,
                batch.deliveries,
                batch.settled,
            )
        )
        filed = [FiledBody("inputs", *body) for body in filed_inputs]
        filed += [FiledBody("results", *body) for body in filed_results]
        with self._bodies.written(filed):
            self._commit(cells, large_inputs, large_results)
        self._bodies.drop("inputs", batch.settled)
        return Written(time.perf_counter() - started, self._disk.trouble())

    def _commit(self, cells: tuple[str, ...], inputs: list[Body], results: list[Body]) -> None:
        if not inputs and not results:
            self._connection.execute(schema.WRITE_BATCH, cells)
            return
        with self._transaction():
            for table, bodies in (("inputs", inputs), ("results", results)):
                self._connection.executemany(
                    f"INSERT OR REPLACE INTO {table} VALUES (?, ?)",  # noqa: S608 - constants
                    bodies,
                )
            self._connection.execute(schema.WRITE_BATCH, cells)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # some errors have rolled it back already
                self._connection.execute("ROLLBACK")
            raise

    def write_with_room(self, batch: Batch) -> Written:
        """Commit a batch after giving back what the file holds and does not need.

        Raises:
            sqlite3.Error, JournalError: nothing of it was written.
        """
        self._make_room()
        return self.write(batch)

    def probe(self) -> Written:
        """Write something that changes nothing, to see whether writing works again.

        Raises:
            sqlite3.Error: it does not.
        """
        started = time.perf_counter()
        self._make_room()
        self._connection.execute(
            "INSERT OR REPLACE INTO facts VALUES ('probe', hex(randomblob(2048)))"
        )
        return Written(time.perf_counter() - started, self._disk.trouble())

    def _make_room(self) -> None:
        """Empty the WAL, and give free pages back to the disk, in steps for which there is room."""
        execute = self._connection.execute
        execute("PRAGMA wal_checkpoint(TRUNCATE)")
        free = math.inf
        while True:
            ((still_free,),) = execute("PRAGMA freelist_count")
            if not 0 < still_free < free:
                return
            free = still_free
            execute(f"PRAGMA incremental_vacuum({self._disk.vacuum_pages})").fetchall()
            execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def prune(self, excess: Kept, finished_before: float) -> list[Forgotten]:
        """Forget the oldest of what is over, as much as is too much, and what ended long ago.

        It forgets PRUNE_AT_ONCE tasks at most; return which.

        Raises:
            sqlite3.Error: nothing was forgotten.
        """
        is_crowded = excess.tasks > 0 or excess.result_bytes > 0
        oldest = self._connection.execute(
            f"SELECT {', '.join(Forgotten._fields)}, finished_at < ? FROM tasks WHERE {_OVER} "  # noqa: S608 - constants
            "AND (? OR finished_at < ?) ORDER BY number LIMIT ?",
            (finished_before, is_crowded, finished_before, PRUNE_AT_ONCE),
        )
        forgotten: list[Forgotten] = []
        left_tasks, left_bytes = excess.tasks, excess.result_bytes
        for *columns, is_old in oldest.fetchall():
            if is_old or left_tasks > 0 or left_bytes > 0:
                task = Forgotten(*columns)
                forgotten.append(task)
                left_tasks -= 1
                left_bytes -= task.result_bytes
        if not forgotten:
            return []
        numbers = to_json([task.number for task in forgotten]).decode()
        with self._transaction():
            for table in ("tasks", "inputs", "results"):
                self._connection.execute(
                    f"DELETE FROM {table} "  # noqa: S608 - constants
                    "WHERE number IN (SELECT value FROM json_each(?))",
                    (numbers,),
                )
        for table in ("inputs", "results"):
            self._bodies.drop(table, [task.number for task in forgotten])
        return forgotten

    # --- reading

    def kept(self) -> Kept:
        """Count what is over."""
        ((tasks, size),) = self._connection.execute(
            f"SELECT count(*), coalesce(sum(result_bytes), 0) FROM tasks WHERE {_OVER}"  # noqa: S608 - constants
        )
        return Kept(tasks, size)

    def unfinished(self) -> list[Task]:
        """Return the tasks that have not ended, in the order of their acceptance."""
        return self._tasks(f"state IN ('{TaskState.QUEUED.value}', '{TaskState.RUNNING.value}')")

    def names(self) -> Iterator[tuple[int, str, str, bool]]:
        """Return number, function and address of all tasks, and whether a callback is pending."""
        yield from self._connection.execute(
            f"SELECT number, function, address, callback = '{CallbackState.PENDING.value}' "  # noqa: S608 - constants
            "FROM tasks"
        )

    def find(self, numbers: Iterable[int]) -> list[Task]:
        """Return the tasks with these numbers, of which some may be forgotten."""
        wanted = to_json(list(numbers)).decode()
        condition = "number IN (SELECT value FROM json_each(?))"
        return [self._task(row) for row in self._rows(condition, (wanted,))]

    def page(
        self, state: TaskState | None, below: int | None, limit: int, most_bytes: int
    ) -> tuple[list[Task], bool]:
        """Return tasks with numbers below one, newest first, and whether there are more.

        There are at most ``limit``, and only the first ones where they are too large together.
        """
        found: list[Task] = []
        size = 0
        for row in self._rows(
            "(? IS NULL OR state = ?) AND (? IS NULL OR number < ?) ORDER BY number DESC LIMIT ?",
            (state and state.value, state and state.value, below, below, limit + 1),
        ):
            size += _size_of(row)
            if len(found) == limit or (found and size > most_bytes):
                return found, True
            found.append(self._task(row))
        return found, False

    def inputs(self, numbers: Iterable[int], most_bytes: int) -> dict[int, bytes]:
        """Return the inputs of tasks, of the first ones only where they are too large together."""
        bodies: dict[int, bytes] = {}
        size = 0
        for number in numbers:
            body = self._body("inputs", number)
            if body is None:
                continue
            bodies[number] = body
            size += len(body)
            if size > most_bytes:
                break
        return bodies

    def due_deliveries(
        self, lane: Lane, now: float, held: frozenset[int], limit: int, most_bytes: int
    ) -> tuple[list[Delivery], float | None]:
        """Return deliveries whose time has come and that are not held already.

        Beside them, the time at which to look again: at once where there may be more of them.
        """
        due: list[Delivery] = []
        size = 0
        for row in self._rows(
            "callback = 'pending' AND callback_lane = ? ORDER BY callback_due LIMIT ?",
            (lane.value, limit + len(held) + 1),
        ):
            if row[_AT["number"]] in held:
                continue
            when, since = row[_AT["callback_due"]], row[_AT["callback_since"]]
            # (One that lies beyond all pauses was planned before the clock was set back.)
            if now < when < now + _LONGEST_PAUSE_S or len(due) == limit or size > most_bytes:
                return due, min(when, now + _LONGEST_PAUSE_S)
            size += _size_of(row)
            due.append(Delivery(self._task(row), lane, row[_AT["callback_attempts"]], since))
        return due, None

    def _tasks(self, condition: str) -> list[Task]:
        rows = self._rows(f"{condition} ORDER BY number", ())
        return [task_of(row, self.journal_id) for row in rows]

    def _rows(self, condition: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        return self._connection.execute(
            f"SELECT {_COLUMNS} FROM tasks WHERE {condition}",  # noqa: S608 - constants
            values,
        )

    def _task(self, row: Row) -> Task:
        has_result = row[_AT["state"]] == TaskState.SUCCEEDED.value
        result = self._body("results", row[_AT["number"]]) if has_result else None
        return task_of(row, self.journal_id, result)

    def _body(self, table: str, number: int) -> bytes | None:
        row = self._connection.execute(
            f"SELECT body FROM {table} WHERE number = ?",  # noqa: S608 - constants
            (number,),
        ).fetchone()
        if row is None:
            return None
        return bytes(row[0]) or self._bodies.read(table, number)

    def _refers_to_file(self, table: str, number: int) -> bool:
        return table in ("inputs", "results") and bool(
            self._connection.execute(
                f"SELECT 1 FROM {table} WHERE number = ? AND length(body) = 0",  # noqa: S608 - constants
                (number,),
            ).fetchone()
        )


def _size_of(row: Row) -> int:
    """Estimate how many bytes a row's task takes as JSON."""
    return 1000 + int(row[_AT["result_bytes"]]) + len(row[_AT["details"]])
