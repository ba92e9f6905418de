"""Templates that die one after the other, or before there is a worker: each slot has one worker."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from chaos.census import check_nothing_left, settled_census, strangers
from chaos.faults import Inside
from chaos.stage import Stage
from support.waiting import wait_until


@pytest.fixture
def stage(tmp_path: Path, nothing_left_over: None) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.give_up()


def test_slots_are_filled_once_when_the_first_template_dies(stage: Stage) -> None:
    """It dies in the first @init: the other slots wait for the first worker, as ever."""
    (stage.place / "init" / "waits").touch()
    wait_until(stage.mark("init", "acting").exists, "the first @init runs")
    first = stage.template
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: stage.find_template() not in (None, first), "another template")
    stage.open()
    wait_until(lambda: not strangers(stage), "there is a worker in each slot, and no other", 2)
    stage.close()


def test_templates_that_die_one_after_the_other(stage: Stage) -> None:
    """The next one dies while what the last one has left is buried: the service goes on."""
    stage.open()
    before = settled_census(stage)
    for number in range(2):
        stage.wait_whole()
        raise_a_family(stage, f"family-{number}")
        dead = stage.template
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda d=dead: stage.find_template() not in (None, d), "another one", 30, 0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(stage.template, signal.SIGKILL)
        stage.server.run("echo", f"after-{number}")
    check_nothing_left(stage, before)
    stage.close()


def raise_a_family(stage: Stage, address: str) -> None:
    """Have an idle worker with fifty children, which take a moment to be killed and reaped."""
    body = {"moment": "idle", "fault": Inside.FORK_FIFTY.value}
    pid = stage.server.run("act", address, body)["worker"]["pid"]
    stage.tell_go(address)
    wait_until(lambda: len(psutil.Process(pid).children()) == 50, "fifty children")
