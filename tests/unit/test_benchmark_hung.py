"""How the benchmark of hung handlers puts times into a table, and when a peer is asked again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmarks.cases.hang import Hang
from benchmarks.cases.hung import next_ratio, times_cell

NEVER = "never (8 s)"
OVER = Hang(told="504", told_ms=1.0, gone_ms=2.0, child_gone_ms=None, has_child=False, next_ms=9.0)


@pytest.mark.parametrize(
    ("times", "cell"),
    [
        ([3.0, 1.0, 2.04], "2.0 (3.0)"),
        ([None, None], NEVER),
        ([], "-"),
        ([-500.0, -200.0], "before the deadline"),
        ([-3.0, -1.0], "-2.0 (-1.0)"),
        ([5.0, None], f"5.0 (5.0); {NEVER}: 1 of 2"),
    ],
)
def test_a_cell_says_what_never_came(times: list[float | None], cell: str) -> None:
    """The median and the greatest are of what came; what did not come is never left out."""
    assert times_cell(times, NEVER) == cell


@pytest.mark.parametrize("what", ["told_ms", "gone_ms", "next_ms"])
def test_a_hang_is_over_when_all_has_come(what: str) -> None:
    """A server whose client, work or next result is still awaited does not hang a second time."""
    assert OVER.is_over
    assert not replace(OVER, **{what: None}).is_over


def test_a_grandchild_that_is_left_is_no_reason_to_stop() -> None:
    """The harness ends it itself."""
    assert replace(OVER, has_child=True, child_gone_ms=None).is_over


def test_a_ratio_is_of_what_both_come_back_from() -> None:
    """A peer that never recovers from one way to hang is compared by the others."""
    ours = {"sleep": [replace(OVER, next_ms=10.0)], "c_call": [replace(OVER, next_ms=30.0)]}
    other = {"sleep": [replace(OVER, next_ms=5.0)], "c_call": [replace(OVER, next_ms=None)]}
    assert next_ratio(ours, other) == 2.0
    assert next_ratio(ours, {"c_call": other["c_call"]}) is None
