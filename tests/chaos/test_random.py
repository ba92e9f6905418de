"""Everything in the table at once, at random: `make chaos` for minutes, a few seconds otherwise.

A failure prints its seed; CHAOS_SEED=… makes the same choices again (the processes' own timing is
never the same). CHAOS_SECONDS says for how long.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from chaos.census import check_nothing_left, settled_census
from chaos.mix import Clients, Striker, complaints
from chaos.stage import Stage
from support.crash_load import settle
from support.fronts import pause

SECONDS = float(os.environ.get("CHAOS_SECONDS") or 6)
SEED = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))


@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_everything_at_once(tmp_path: Path, method: str) -> None:
    """Every accepted task ends as it may, with its own result; then nothing is left of it all."""
    settings = {"OGPU_START_METHOD": method, "OGPU_QUEUE_SIZE": 10_000, "OGPU_INIT_TIMEOUT": 10}
    stage = Stage(tmp_path, **settings)
    try:
        stage.open()
        play(stage)
    except BaseException as error:
        stage.give_up()
        log = stage.server.log[-6000:]
        raise AssertionError(f"CHAOS_SEED={SEED} ({method}): {error}\n{log}") from error
    stage.close()


def play(stage: Stage) -> None:
    rng = random.Random(SEED)
    before = settled_census(stage)
    striker = Striker(stage, rng)
    over = time.monotonic() + SECONDS
    latest = over + SECONDS + 30
    with Clients(stage, SEED) as clients:
        # A machine that is busy with something else strikes less often, so it gets more time.
        while time.monotonic() < over or striker.strikes.total() <= SECONDS:
            assert time.monotonic() < latest, f"only {striker.strikes.total()} strikes"
            pause(rng.uniform(0.05, 0.4))
            striker.strike()
    for unclaimed in (stage.place / "init").iterdir():
        unclaimed.unlink()
    stage.sink.answers = [200]
    settle(stage.server, 60)
    stage.wait_whole(60)
    check_nothing_left(stage, before)
    wrong = complaints(stage, clients.sent, striker.hits)
    assert not wrong + clients.refused, "\n".join(wrong + clients.refused)
    # That it was a test: enough was asked for and was struck, and most innocents never knew.
    ends = Counter(stage.server.task(s.address)["state"] for s in clients.sent if s.accepted)
    print(striker.strikes, ends)
    assert striker.strikes.total() > SECONDS
    assert ends["succeeded"] > 2 * SECONDS
    assert len(ends) > 2
