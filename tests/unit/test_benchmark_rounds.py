"""The benchmarks' arithmetic: whose turn it is, what is compared with what, what is left out."""

from __future__ import annotations

import pytest
from benchmarks.__main__ import parse
from benchmarks.harness import BenchmarkError
from benchmarks.rounds import NO_RATIO, OURS, measure, ratio_cell, ratios, turns


def test_neighbours_change_places_in_every_other_round() -> None:
    """What drifts in one direction hits the first and the last of a round alike."""
    order = [name for _, name in turns(["a", "b", "c"], 3)]
    assert order == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is twice as fast in the second round changes no ratio."""
    values = {OURS: [10.0, 20.0], "other": [5.0, 10.0]}
    assert ratios(values, "other") == [2.0, 2.0]
    assert ratio_cell(values, OURS) == "1"


def test_without_ours_there_is_no_ratio() -> None:
    """Peers can be compared without this service in the run."""
    assert ratio_cell({"other": [5.0]}, "other") == NO_RATIO


def test_a_turn_that_went_wrong_takes_all_figures_of_its_server() -> None:
    """Figures of the rounds before an error are not shown, and a line says why."""

    def fails_in_the_second(number: int) -> float:
        if number == 2:
            raise BenchmarkError("answered 500\nand the log")
        return 1.0

    done = measure({"good": float, "bad": fails_in_the_second}, 3, str)
    assert done.figures == {"good": [1.0, 2.0, 3.0]}
    assert done.notes == ["bad: no figures, answered 500"]


def test_names_keep_the_order_of_the_tables() -> None:
    """However they are given on the command line."""
    asked = parse(["--peers", "mosec, ogpu-service", "--cases", "echo"])
    assert asked.peers == ["ogpu-service", "mosec"]
    assert asked.cases == ["echo"]
    assert asked.rounds == 3


@pytest.mark.parametrize(
    "wrong", [["--peers", "nobody"], ["--cases", ""], ["--rounds", "0"], ["--seconds", "-1"]]
)
def test_what_means_nothing_is_refused(wrong: list[str]) -> None:
    """Before anything is installed or started."""
    with pytest.raises(SystemExit):
        parse(wrong)
