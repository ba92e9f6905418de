"""Start the ranks of a training and wait for them, as `torchrun` and `accelerate launch` do.

    python launch.py --ranks 2 train.py OPTIONS OF TRAIN.PY

1. Start the ranks, each in a session of its own, as torchrun does: a signal to the launcher's
   process group does not reach them.
2. Pass SIGTERM on to them.
3. When one of them fails, end the others. The exit code is the first that is not 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Event

POLL_S = 0.02
# What the others have, after one has failed: they notice by themselves that it is gone.
END_LIMIT_S = 2.0

Rank = subprocess.Popen[bytes]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a script and its options")
    options = parser.parse_args()
    stop = Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # first: one may come at any moment
    sys.exit(_wait(_start(options.command, options.ranks), stop))


def _start(command: list[str], count: int) -> list[Rank]:
    pipes = [Pipe() for _ in range(count - 1)]
    leader_ends = [leader for leader, _ in pipes]
    ranks = []
    for number in range(count):
        ends = [pipes[number - 1][1]] if number else leader_ends
        ranks.append(_start_rank(command, number, count, ends))
    for pipe in pipes:
        for end in pipe:
            end.close()  # or a rank would not notice that another one is gone
    return ranks


def _start_rank(command: list[str], number: int, count: int, ends: list[Connection]) -> Rank:
    descriptors = [end.fileno() for end in ends]
    mesh = ",".join(map(str, descriptors))
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "RANK": str(number), "WORLD_SIZE": str(count), "MESH": mesh},
        pass_fds=descriptors,
        start_new_session=True,
    )


def _wait(ranks: list[Rank], stop: Event) -> int:
    """Return 0 when all ranks have ended well, or the first other exit code."""
    told = False
    while True:
        if stop.is_set() and not told:
            told = True
            for rank in ranks:
                rank.terminate()
        codes = [rank.poll() for rank in ranks]
        if failed := [code for code in codes if code]:
            limit = time.monotonic() + END_LIMIT_S
            while time.monotonic() < limit and any(rank.poll() is None for rank in ranks):
                time.sleep(POLL_S)
            for rank in ranks:
                rank.kill()
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
