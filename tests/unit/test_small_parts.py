"""Back-off, Retry-After, log formats, evidence: pure logic."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpu.service import wire
from ogpu.service.backoff import Backoff
from ogpu.service.errors import FailureReason, WireError
from ogpu.service.http.inputs import preferred_wait_s
from ogpu.service.logger import (
    FAIL_LEVEL,
    SUCCESS_LEVEL,
    TIMEOUT_LEVEL,
    JsonFormatter,
    PlainFormatter,
    logger,
)
from ogpu.service.outbox.post import retry_after_s
from ogpu.service.pool.budget import CrashBudget
from ogpu.service.pool.evidence import describe_end, failed_in_worker


@given(st.integers(1, 10_000))
def test_a_wait_grows_is_jittered_and_is_bounded(failures: int) -> None:
    rule = Backoff(first_s=0.5, limit_s=60)
    full = min(60, 0.5 * 2.0 ** min(failures - 1, 64))
    assert full / 2 <= rule.wait_s(failures) <= full


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("7", 7),
        ("-7", 0),
        ("1e9", 1e9),
        ("nan", 0),
        ("soon", 0),
        ("", 0),
        ("Mon, 01 Jan 2026 00:00:00 +99999999999999", 0),
        ("1e400", float("inf")),
    ],
)
def test_retry_after_in_seconds(value: str | None, seconds: float) -> None:
    assert retry_after_s(value) == seconds


def test_retry_after_as_a_date() -> None:
    at = datetime.now(timezone.utc) + timedelta(seconds=100)
    assert 95 < retry_after_s(format_datetime(at, usegmt=True)) <= 100
    assert retry_after_s(format_datetime(at - timedelta(days=1), usegmt=True)) == 0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (b"wait=10", 10),
        (b"respond-async, wait=5", 5),
        (b"Wait = 3", 3),
        (b'wait="4"', 4),
        (b"respond-async; foo=1, wait=9", 9),
        (b"nowait=10", 0),
        (b"wait=soon", 0),
        (b"wait=-1", 0),
        (b"", 0),
    ],
)
def test_the_prefer_header_is_read_as_rfc_7240_writes_it(header: bytes, seconds: float) -> None:
    assert preferred_wait_s(header) == seconds


def record(level: int, message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("ogpu.service", level, "", 0, message, None, None)
    vars(made).update(extra)
    return made


def test_the_plain_format_is_that_of_the_frozen_module() -> None:
    line = PlainFormatter(colour=False).format(record(SUCCESS_LEVEL, "done"))
    assert line.endswith("✅ SUCCESS   done")
    assert line.startswith(f"[{datetime.now().astimezone().year}-")


def test_a_workers_line_names_slot_and_task() -> None:
    line = PlainFormatter(colour=False).format(record(20, "hello", slot=1, task_address="0xabc"))
    assert line.endswith("[worker 1 0xabc] hello")


def test_colour_only_where_asked() -> None:
    assert "\x1b[" in PlainFormatter(colour=True).format(record(FAIL_LEVEL, "x"))
    assert "\x1b[" not in PlainFormatter(colour=False).format(record(FAIL_LEVEL, "x"))


def test_json_lines_carry_level_slot_and_task() -> None:
    entry = json.loads(
        JsonFormatter().format(record(TIMEOUT_LEVEL, "late\nvery", slot=0, task_address="t"))
    )
    assert entry["time"].endswith("Z")
    assert {k: v for k, v in entry.items() if k != "time"} == {
        "level": "TIMEOUT",
        "logger": "ogpu.service",
        "message": "late\nvery",
        "slot": 0,
        "task_address": "t",
    }


def test_the_three_levels_and_their_methods() -> None:
    assert (SUCCESS_LEVEL, TIMEOUT_LEVEL, FAIL_LEVEL) == (25, 35, 45)
    assert logging.getLevelName(25) == "SUCCESS"
    assert logging.getLevelName(35) == "TIMEOUT"
    assert logging.getLevelName(45) == "FAIL"
    seen: list[tuple[int, str]] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.levelno, record.getMessage()))

    collector = Collector()
    logger.addHandler(collector)
    try:
        logger.task_success("a %s", 1)
        logger.task_timeout("b")
        logger.task_fail("c %d", 3, exc_info=True, extra={"anything": 1}, stacklevel=2)
    finally:
        logger.removeHandler(collector)
    assert seen == [(25, "a 1"), (35, "b"), (45, "c 3")]


def test_any_logger_has_the_three_methods() -> None:
    """The frozen module gave them to every logger, and deployed sources use them there."""
    for method in ("task_success", "task_timeout", "task_fail"):
        assert callable(getattr(logging.getLogger("elsewhere"), method))


@pytest.mark.parametrize(
    ("code", "number", "says"),
    [(7, None, "exited with code 7"), (None, 11, "was ended by SIGSEGV"), (None, 40, "signal 40")],
)
def test_an_end_is_described(code: int | None, number: int | None, says: str) -> None:
    assert says in describe_end(wire.Gone(0, 1, code, number))
    assert signal.SIGSEGV == 11


def test_a_worker_cannot_invent_a_reason() -> None:
    with pytest.raises(WireError, match="bad luck"):
        failed_in_worker(wire.Failed(1, "bad luck", "m", None, None))


def test_a_workers_texts_are_made_of_what_utf8_can_say() -> None:
    outcome = failed_in_worker(wire.Failed(1, "exception", "\ud800", None, 5))  # type: ignore[arg-type]
    assert outcome.error is not None
    assert outcome.error.reason is FailureReason.EXCEPTION
    assert outcome.error.message == "\\ud800"
    assert outcome.error.traceback == "5"


def test_a_kill_does_not_depend_on_a_free_descriptor() -> None:
    """Where the front has none left nobody asks for stacks, and the worker is killed at once."""
    code = (
        "import os, resource, signal; from ogpu.service.processes import would_handle; "
        "signal.signal(signal.SIGUSR1, lambda *_: None); "
        "assert would_handle(os.getpid(), signal.SIGUSR1); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); "
        "assert not would_handle(os.getpid(), signal.SIGUSR1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_crash_budget_counts_within_its_window() -> None:
    """Used up by so many failures in so much time; older ones are forgotten."""
    budget = CrashBudget(failures=3, window_s=60)
    assert [budget.spend(now_s, 0) for now_s in (100, 130, 161)] == [False, False, False]
    assert budget.spend(190, 0)


def test_the_time_that_failed_starts_took_is_not_counted() -> None:
    """Three models that fail after ten minutes each are a loop; starts that overlap count once."""
    budget = CrashBudget(failures=3, window_s=60)
    assert [budget.spend(now_s, 600) for now_s in (1000, 1610, 2220)] == [False, False, True]
    budget = CrashBudget(failures=3, window_s=60)
    assert [budget.spend(now_s, 600) for now_s in (1000, 1001, 1100)] == [False, False, True]
    budget = CrashBudget(failures=3, window_s=60)
    assert [budget.spend(now_s, 1) for now_s in (1000, 1031, 1063)] == [False, False, False]
