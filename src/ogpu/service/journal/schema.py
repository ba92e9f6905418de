"""The journal's tables, and the statement that writes a whole commit. SQL and nothing else."""

from __future__ import annotations

# What a database file is, for file(1) and for us: "ogpu" in ASCII.
APPLICATION_ID = 0x6F677075

# One script for each version of the schema; a file of an older version runs those that it lacks.
MIGRATIONS = (
    """
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    INSERT INTO facts VALUES ('journal_id', lower(hex(randomblob(12))));

    CREATE TABLE tasks (
        number INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of acceptance; never again
        function TEXT NOT NULL,
        address TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN (
            'queued', 'running', 'succeeded', 'failed', 'timed_out', 'cancelled', 'expired')),
        attempt INTEGER NOT NULL,
        finished_at REAL,               -- seconds since 1970, as all times here
        details TEXT NOT NULL,          -- what no statement asks for, as JSON (see rows.py)
        result_bytes INTEGER NOT NULL,
        callback TEXT NOT NULL CHECK (callback IN ('none', 'pending', 'delivered', 'given_up')),
        callback_lane TEXT,
        callback_attempts INTEGER NOT NULL,
        callback_error TEXT,
        callback_due REAL,
        callback_since REAL
    );
    CREATE INDEX tasks_by_address ON tasks (address);
    CREATE INDEX callbacks_by_time ON tasks (callback_lane, callback_due)
        WHERE callback = 'pending';

    -- Bodies are apart from the rows that are written again and again.
    CREATE TABLE inputs (number INTEGER PRIMARY KEY, body BLOB NOT NULL);
    CREATE TABLE results (number INTEGER PRIMARY KEY, body BLOB NOT NULL);
    """,
    # (names.py has it, and why)
    "DROP INDEX tasks_by_address;",
    # An empty body is in a file (bodies.py); one who does not know that must not open it.
    "SELECT 1;",
)

TASK_COLUMNS = (
    "number", "function", "address", "state", "attempt", "finished_at", "details", "result_bytes",
    "callback", "callback_lane", "callback_attempts", "callback_error", "callback_due",
    "callback_since",
)  # fmt: skip
_DELIVERY_COLUMNS = (
    "callback", "callback_lane", "callback_attempts", "callback_error", "callback_due",
    "callback_since",
)  # fmt: skip
_ROW_COLUMNS = TASK_COLUMNS[: TASK_COLUMNS.index("callback")]
_NEVER_CHANGE = ("number", "function", "address")


def _cell(index: int) -> str:
    return f"json_extract(row.value, '$[{index}]')"


def _task_insert(part: str, callback: str) -> str:
    """Return the insert of rows whose columns for the callback, six of them, are as given."""
    return (
        f"INSERT INTO tasks SELECT {', '.join(map(_cell, range(len(_ROW_COLUMNS))))}, {callback} "  # noqa: S608 - constants
        f"FROM json_each(new.{part}) AS row WHERE true ON CONFLICT (number) DO UPDATE SET "
        f"{', '.join(f'{c} = excluded.{c}' for c in TASK_COLUMNS if c not in _NEVER_CHANGE)};"
    )


def _body_insert(table: str) -> str:
    return (
        f"INSERT OR REPLACE INTO {table} SELECT {_cell(0)}, CAST({_cell(1)} AS BLOB) "  # noqa: S608 - constants
        f"FROM json_each(new.{table}) AS row;"
    )


_LANE = _cell(len(_ROW_COLUMNS))
_FINISHED_AT = _cell(_ROW_COLUMNS.index("finished_at"))

# A commit is one statement: an insert of one row of JSON into this view. sqlite3 gives the GIL up
# for each statement that runs, and the event loop, when it is busy, lets go of it again only after
# the switch interval of 5 ms. With one statement a row (executemany) beside a loop that never
# rests, a commit took 1,290 ms at the median; with one statement a table 35 ms; with this one 8 ms.
BATCH = f"""
    CREATE TEMP VIEW batch AS
        SELECT NULL AS tasks, NULL AS pending, NULL AS inputs, NULL AS results, NULL AS deliveries,
            NULL AS settled;
    CREATE TEMP TRIGGER write_batch INSTEAD OF INSERT ON batch BEGIN
        {_task_insert("tasks", "'none', NULL, 0, NULL, NULL, NULL")}
        {_task_insert("pending", f"'pending', {_LANE}, 0, NULL, {_FINISHED_AT}, {_FINISHED_AT}")}
        {_body_insert("inputs")}
        {_body_insert("results")}
        UPDATE tasks SET
            {", ".join(f"{c} = {_cell(i + 1)}" for i, c in enumerate(_DELIVERY_COLUMNS))}
            FROM json_each(new.deliveries) AS row WHERE tasks.number = {_cell(0)};
        DELETE FROM inputs WHERE number IN (SELECT value FROM json_each(new.settled));
    END;
"""  # noqa: S608 - constants
WRITE_BATCH = "INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?)"
