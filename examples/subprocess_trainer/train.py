"""One rank of the training: linear regression by gradient descent, in step with the other ranks.

Runs in a process of its own, started by launch.py, which sets RANK, WORLD_SIZE and MESH (the
descriptors of pipes: in rank 0 one for each other rank, elsewhere one to rank 0). It is data
parallel, as real trainings are, only smaller:

1. Each rank makes its share of the data. All begin with the weights of the checkpoint, if any.
2. In each epoch every rank sends its gradient to rank 0, and gets the mean of all of them back.
3. Rank 0 prints how far it is, and writes the checkpoint now and then, and at the end.
4. SIGTERM: rank 0 ends the epoch, writes the checkpoint, and tells the others to end.
5. A loss that is no number, or a rank that is gone: the rank says so, and its exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from array import array
from multiprocessing.connection import Connection
from pathlib import Path

TRUE_WEIGHTS = [0.5 * (index - 7) for index in range(16)]
SAMPLES = 500  # of each rank
NOISE = 0.1
REPORT_EVERY_S = 0.2
CHECKPOINT_EVERY_S = 5.0

Sample = tuple[list[float], float]


class Stop:
    """Whether somebody wants this training to stop."""

    wanted = False

    def want(self, *_: object) -> None:
        self.wanted = True


def main() -> None:
    options = _options()
    rank = int(os.environ["RANK"])
    stop = Stop()
    # Ranks other than 0 end when rank 0 says so: all have to stop after the same epoch.
    wish = stop.want if rank == 0 and not options.stubborn else signal.SIG_IGN
    signal.signal(signal.SIGTERM, wish)
    mesh = [Connection(int(descriptor)) for descriptor in os.environ["MESH"].split(",")]
    try:
        if rank == 0:
            _lead(mesh, options, stop)
        else:
            _follow(mesh[0], rank, options)
    except (EOFError, ConnectionError):
        sys.exit(f"rank {rank}: another rank is gone")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    return parser.parse_args()


def _lead(others: list[Connection], options: argparse.Namespace, stop: Stop) -> None:
    """Be rank 0."""
    samples = _make_samples(0)
    first_epoch, weights = _read_checkpoint(options.checkpoint)
    loss = math.nan
    reported_at = saved_at = time.monotonic()
    epoch = first_epoch
    while epoch < options.epochs and not stop.wanted:
        parts = [_gradient(weights, samples)]
        parts += [array("d", other.recv_bytes()) for other in others]
        # The last number of each part is the loss.
        *gradient, loss = (sum(numbers) / len(parts) for numbers in zip(*parts, strict=True))
        if not math.isfinite(loss):
            sys.exit(f"rank 0: epoch {epoch + 1}: the loss is {loss}; try a lower learning rate")
        for other in others:
            other.send_bytes(array("d", gradient).tobytes())
        weights = _descend(weights, gradient, options.learning_rate)
        epoch += 1
        now = time.monotonic()
        if now - reported_at >= REPORT_EVERY_S or epoch in (first_epoch + 1, options.epochs):
            print(f"epoch {epoch}/{options.epochs} loss {loss:.6g}", flush=True)
            reported_at = now
        if now - saved_at >= CHECKPOINT_EVERY_S:
            _write_checkpoint(options.checkpoint, epoch, weights, loss)
            saved_at = now
    if epoch > first_epoch:
        _write_checkpoint(options.checkpoint, epoch, weights, loss)
    print(f"rank 0: the checkpoint has epoch {epoch}", flush=True)
    for other in others:
        other.recv_bytes()  # what it has sent for the next epoch; unread, it would break the pipe
        other.send_bytes(b"")  # no gradient: the end


def _follow(leader: Connection, rank: int, options: argparse.Namespace) -> None:
    """Be one of the other ranks."""
    samples = _make_samples(rank)
    _, weights = _read_checkpoint(options.checkpoint)
    while True:
        leader.send_bytes(_gradient(weights, samples).tobytes())
        mean = leader.recv_bytes()
        if not mean:
            return
        weights = _descend(weights, list(array("d", mean)), options.learning_rate)


def _make_samples(rank: int) -> list[Sample]:
    chance = random.Random(rank)
    samples = []
    for _ in range(SAMPLES):
        point = [chance.gauss(0, 1) for _ in TRUE_WEIGHTS]
        value = sum(w * x for w, x in zip(TRUE_WEIGHTS, point, strict=True))
        samples.append((point, value + chance.gauss(0, NOISE)))
    return samples


def _gradient(weights: list[float], samples: list[Sample]) -> array[float]:
    """Return the gradient of the mean squared error, and the error itself behind it."""
    totals = [0.0] * (len(weights) + 1)
    for point, value in samples:
        difference = sum(w * x for w, x in zip(weights, point, strict=True)) - value
        for index, x in enumerate(point):
            totals[index] += 2 * difference * x
        totals[-1] += difference * difference
    return array("d", (total / len(samples) for total in totals))


def _descend(weights: list[float], gradient: list[float], learning_rate: float) -> list[float]:
    return [w - learning_rate * g for w, g in zip(weights, gradient, strict=True)]


def _read_checkpoint(path: Path) -> tuple[int, list[float]]:
    """Return the epochs that are done, and the weights."""
    try:
        checkpoint = json.loads(path.read_text())
    except FileNotFoundError:
        return 0, [0.0] * len(TRUE_WEIGHTS)
    return checkpoint["epoch"], checkpoint["weights"]


def _write_checkpoint(path: Path, epoch: int, weights: list[float], loss: float) -> None:
    """Write it whole or not at all: a kill may come at any moment."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"epoch": epoch, "loss": loss, "weights": weights}))
    unfinished.replace(path)


if __name__ == "__main__":
    main()
