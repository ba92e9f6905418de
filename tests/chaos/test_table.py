"""Each fault at each moment where it makes sense: the guilty task ends, nobody else notices.

The rows share a server, until one fails: what a row breaks for the next one is a failure too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chaos.faults import ROWS, Inside, Moment, Outside, Row
from chaos.harness import play_row
from chaos.stage import Stage
from support.processes import descendants
from support.waiting import wait_until


class Stages:
    """The servers that rows share; a new one after a failure."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._stages: dict[float, Stage] = {}

    def get(self, row: Row) -> Stage:
        # This limit holds for the next template's imports, too, which take long on a busy machine.
        limit_s = 1 if row.hangs_in_init else 30
        if limit_s not in self._stages:
            stage = Stage(self._factory.mktemp("stage"), OGPU_INIT_TIMEOUT=limit_s)
            self._stages[limit_s] = stage
            stage.open()
        return self._stages[limit_s]

    def give_up(self) -> None:
        """Spare the next row what this one has spoilt."""
        for stage in self._stages.values():
            stage.give_up()
        self._stages.clear()

    def close(self) -> None:
        for stage in self._stages.values():
            stage.stop()
        wait_until(lambda: not descendants(), "no process is left", 5)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    shared = Stages(tmp_path_factory)
    yield shared
    try:
        shared.close()
    finally:
        shared.give_up()


@pytest.fixture(autouse=True)
def nothing_left_over() -> None:
    """Instead of the one in conftest.py: here the server stays, and the harness looks itself."""


def rows() -> list[object]:
    return [pytest.param(row, id=row.id) for row in ROWS]


@pytest.mark.parametrize("row", rows())
def test_the_invariants_hold_after(stages: Stages, row: Row) -> None:
    """Every task has ended as it may, the pool is whole, and nothing is left."""
    stage = stages.get(row)
    try:
        play_row(stage, row)
    except BaseException as error:
        log = stage.server.log
        stages.give_up()
        raise AssertionError(f"{row.id}: {error}\n{log[-4000:]}") from error


def test_the_table_is_complete() -> None:
    """Each fault is tried somewhere, each moment has faults, and no row is there twice."""
    assert len(set(ROWS)) == len(ROWS)
    assert {row.fault for row in ROWS} == {*Inside, *Outside}
    assert {row.moment for row in ROWS} == set(Moment)
