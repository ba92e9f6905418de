"""What the front makes of a worker's output: a real pipe, a real loop, and a log that is read."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpu.service import wire
from ogpu.service.pool import line_log, output
from ogpu.service.pool.line_log import MAX_CHARS_PER_S, MAX_LINES_PER_S
from ogpu.service.pool.output import KEPT_BYTES, KEPT_LINES, MAX_LINE_BYTES, WorkerOutput
from ogpu.service.task import Task
from support.journal import on_loop, until

PIPE_BYTES = 2**20
TASK = Task(1, "id", "talk", "a", None)


class Talk(logging.Handler):
    """A worker's pipe: what is said on it, and what the front logs and tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.logged: list[logging.LogRecord] = []
        reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.output = WorkerOutput(
            reader, 0, lambda _, line: self.told.append(line), before_reading=lambda: None
        )
        self.output.begin_tasks((TASK,))

    def emit(self, record: logging.LogRecord) -> None:
        self.logged.append(record)

    def say(self, data: bytes) -> None:
        """Write, and have it read."""
        for begin in range(0, len(data), PIPE_BYTES):
            piece = data[begin : begin + PIPE_BYTES]
            assert os.write(self.writer, piece) == len(piece)
            self.output.drain()

    def end(self) -> str | None:
        self.output.end_tasks(read_first=True)
        return self.output.tail()

    @property
    def lines(self) -> list[str]:
        """The lines of the log, less what it says of dropped ones."""
        return [
            line
            for record in self.logged
            if " were dropped " not in record.getMessage()
            for line in record.getMessage().splitlines() or [""]
        ]

    @property
    def dropped(self) -> int:
        messages = [record.getMessage() for record in self.logged]
        return sum(int(m.split()[0]) for m in messages if " were dropped " in m)


@contextmanager
def talking() -> Iterator[Talk]:
    talk = Talk()
    # (The module, whose name in the package is the logger's.)
    with mock.patch.object(sys.modules["ogpu.service.logger"], "_handler", talk):
        try:
            yield talk
        finally:
            talk.output.close()
            os.close(talk.writer)


@settings(max_examples=50, deadline=None)
@given(
    lines=st.integers(0, 3 * MAX_LINES_PER_S),
    has_end=st.booleans(),
    cuts=st.lists(st.integers(0, 80_000), max_size=8),
)
def test_the_tail_is_the_end_of_what_was_printed(
    lines: int, has_end: bool, cuts: list[int]
) -> None:
    """However much was printed and however it was read: the last lines, the unfinished one too."""
    everything = [f"line {number}" for number in range(lines)]
    said = "".join(wire.encode_log(20, line) + "\n" for line in everything).encode()
    if has_end:
        everything.append("no end")
        said += b"no end"
    places = [0, *sorted(cuts), len(said)]

    async def print_it() -> None:
        with talking() as talk:
            for begin, end in itertools.pairwise(places):
                talk.say(said[begin:end])
            assert talk.end() == ("\n".join(everything[-KEPT_LINES:]) or None)
            talk.output.close()
            assert talk.lines == everything[:MAX_LINES_PER_S]
            assert talk.told == talk.lines
            assert len(talk.lines) + talk.dropped == len(everything)

    asyncio.run(print_it())


@on_loop
async def test_a_buffer_costs_the_same_however_many_lines_are_in_it() -> None:
    """64 KiB of empty lines, when the second's lines are used up: not a call for each."""
    with talking() as talk:
        talk.say(b"\n" * MAX_LINES_PER_S)
        with mock.patch.object(line_log, "decode_line", side_effect=AssertionError("decoded")):
            talk.say(b"\n" * 65_536)
        assert (len(talk.lines), len(talk.told)) == (MAX_LINES_PER_S, MAX_LINES_PER_S)
        talk.output.close()
        assert talk.dropped == 65_536


@on_loop
async def test_the_next_second_has_lines_of_its_own() -> None:
    """One line tells of those that were dropped, without waiting for more output."""
    with talking() as talk:
        talk.say(b"first\n" * (MAX_LINES_PER_S + 5))
        await until(lambda: talk.dropped, "the dropped lines are told")
        assert talk.logged[-1].levelno == logging.WARNING
        assert talk.logged[-1].task_address == "a"
        talk.say(b"second\n")
        assert talk.lines[MAX_LINES_PER_S:] == ["second"]
        assert talk.dropped == 5


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"x" * 65_535 + b"\n", id="long lines"),
        pytest.param(b"\n" * 65_536, id="empty lines"),
        pytest.param(b"x" * 65_536, id="no end of a line"),
        pytest.param(os.urandom(65_536), id="binary"),
        pytest.param(b"\xff" * 65_535 + b"\n", id="no UTF-8"),
        pytest.param(b"\r" * 65_535 + b"\n", id="carriage returns"),
        pytest.param(wire.encode_log(20, "\n" * 30_000).encode() + b"\n", id="long records"),
    ],
)
@on_loop
async def test_the_log_of_a_second_is_bounded(line: bytes) -> None:
    """Lines and characters: what a record or a carriage return makes of one line counts, too."""
    with talking() as talk:
        for _ in range(200):
            talk.say(line)
        assert len(talk.lines) <= MAX_LINES_PER_S
        assert sum(map(len, talk.lines)) <= MAX_CHARS_PER_S + 2 * MAX_LINE_BYTES
        assert len(talk.told) <= MAX_LINES_PER_S
        assert len(talk.end() or "") <= 4 * KEPT_BYTES


@on_loop
async def test_long_lines_are_kept_as_far_as_there_is_room() -> None:
    """Never more than KEPT_BYTES for long, and always the last line."""
    with talking() as talk:
        for number in range(30):
            talk.say(b"%d " % number + b"x" * 10_000 + b"\n")
        assert sum(map(len, talk.output._kept)) <= KEPT_BYTES
        talk.say(b"y" * (MAX_LINE_BYTES + 10))
        tail = talk.end()
        assert tail is not None
        assert set(tail.splitlines()[-1]) == {"y"}


@on_loop
async def test_only_what_is_there_is_read_at_once() -> None:
    """Somebody who writes as fast as the front reads does not keep it for ever."""
    with talking() as talk:
        os.write(talk.writer, b"x")
        with mock.patch.object(os, "read", side_effect=[b"y" * 65_535 + b"\n"]):
            talk.output.drain()


@on_loop
async def test_a_thread_that_prints_on_does_not_hold_the_front_up() -> None:
    """drain() ends, while somebody writes as fast as it can; and nobody waits for good."""
    with talking() as talk:
        over = threading.Event()
        written = 0

        def flood() -> None:
            nonlocal written
            while not over.is_set():
                written += os.write(talk.writer, b"y" * 79 + b"\n")

        writer = threading.Thread(target=flood)
        writer.start()
        await until(lambda: talk.dropped, "a second of it")
        started = time.monotonic()
        talk.output.drain()
        assert time.monotonic() - started < 1
        before = written
        await until(lambda: written > before + 2 * PIPE_BYTES, "it goes on")
        over.set()
        await until(lambda: not writer.is_alive(), "its last write is read")
        talk.say(b"the end")
        assert (talk.end() or "").endswith("y\nthe end")


@on_loop
async def test_all_who_flood_share_one_share_of_the_front() -> None:
    """Two of them pause for twice as long as one."""
    with talking() as one, talking() as other:
        for talk in (one, other):
            os.write(talk.writer, b"\n" * (MAX_LINES_PER_S + 1))
        with mock.patch.object(output, "_PAUSE_S", 30.0):
            await until(lambda: len(WorkerOutput._paused) == 2, "both pause")
        now = asyncio.get_running_loop().time()
        pauses = [t.output._pause.when() - now for t in (one, other) if t.output._pause]
        assert [round(pause, -1) for pause in sorted(pauses)] == [30, 60]
    assert not WorkerOutput._paused


@on_loop
async def test_a_pipe_that_is_closed_is_not_asked_again() -> None:
    """A handler may close 1 and 2: the front must not be told of it in every step of its loop."""
    with talking() as talk:
        os.write(talk.writer, b"\n" * MAX_LINES_PER_S + b"last words")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, talk.writer)
        os.close(null)
        with mock.patch.object(os, "read", side_effect=os.read) as reads:
            await until(lambda: reads.call_args_list and not talk.output._pause, "read to its end")
            count = reads.call_count
            for _ in range(10):  # steps of the loop, each of which would read once more
                await asyncio.sleep(0)
            assert reads.call_count <= count + 1
        assert (talk.end() or "").endswith("last words")


@on_loop
async def test_a_line_without_an_end_is_the_tasks_that_began_it() -> None:
    with talking() as talk:
        talk.say(b"no end")
        assert talk.end() == "no end"
        talk.output.begin_tasks((Task(2, "id", "talk", "b", None),))
        talk.say(b"\nnext\n")
        assert talk.end() == "\nnext"
        assert [record.task_address for record in talk.logged] == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        (wire.encode_log(40, "bad"), 40, "bad"),
        ("\x1e" + "[" * 100_000, 20, None),
        ("\x1e[1" + "0" * 1000 + ', "x"]', 50, "x"),
        ('\x1e[-7, "x"]', 0, "x"),
        (wire.encode_log(20, "half \ud800"), 20, "half \\ud800"),
    ],
    ids=["record", "brackets", "huge level", "negative level", "surrogate"],
)  # fmt: skip
def test_any_line_can_be_shown(line: str, level: int, message: str | None) -> None:
    """No record can raise, leave its level behind in the logger, or bring text that is none."""
    found = line_log.decode_line(line.encode())
    assert found == (level, line if message is None else message)
    found[1].encode()
