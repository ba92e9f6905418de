"""From the start of a server to its first good result, with two workers.

1. A peer's program is started, and asked every 2 ms until a handler has answered.
2. At once it is killed. A first start of each reads files that the others find in memory, and is
   not measured.
3. Once with a handler that needs nothing, once with one whose module imports torch and whose
   workers load a small model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import report
from ..called import exchanging
from ..goals import at_most, for_each
from ..peers.peer import Peer
from ..rounds import Rounds, measure, ratio_cell
from .case import Case, Options, Result, Table, able, twice

_NAME = "boot"
_WORKERS = 2
_POLL_S = 0.002
_BODY = {"text": "hello"}


@dataclass(frozen=True)
class _Variant:
    handlers: str
    words: str
    has_torch: bool


_VARIANTS = (
    _Variant("echo", "plain", False),
    _Variant("torch_model", "with torch", True),
)


def _run(peers: Sequence[Peer], options: Options) -> Result:
    result = Result()
    for variant in _VARIANTS:
        chosen = able(peers, _NAME, options, result.notes, torch=variant.has_torch)
        turns = {peer.label: _turn(peer, variant) for peer in chosen}
        rounds = measure(turns, options.rounds, lambda boot_s: f"{boot_s:.2f} s")
        result.notes += [f"{variant.words}: {note}" for note in rounds.notes]
        result.notes += [
            f"{variant.words}: {peer.label} has {_workers(peer)} worker"
            for peer in chosen
            if _workers(peer) < _WORKERS
        ]
        result.tables.append(_table(rounds, variant))
        result.figures[variant.words] = rounds.figures
        if variant.has_torch:
            result.notes += at_most("boot with torch", rounds.figures, peers, for_each(peers, 1))
    return result


def _workers(peer: Peer) -> int:
    return min(_WORKERS, peer.most_workers or _WORKERS)


def _turn(peer: Peer, variant: _Variant) -> Callable[[int], float]:
    def turn(number: int) -> float:
        if number == 1:
            twice(lambda: _boot_s(peer, variant))
        return twice(lambda: _boot_s(peer, variant))

    return turn


def _boot_s(peer: Peer, variant: _Variant) -> float:
    began = time.perf_counter()
    variables = {"OMP_NUM_THREADS": "1"}
    with exchanging(
        peer, variant.handlers, _workers(peer), variables, torch=variant.has_torch
    ) as candidate:
        candidate.wait_until_exchanged(_BODY, _BODY, _POLL_S)
        took_s = time.perf_counter() - began
        candidate.server.kill()
    return took_s


def _table(rounds: Rounds[float], variant: _Variant) -> Table:
    rows = [
        [name, report.spread(boots, ".2f"), ratio_cell(rounds.figures, name)]
        for name, boots in rounds.figures.items()
    ]
    header = ["server", "start → first result s, median (range)", "ours / this one"]
    return Table(f"{_WORKERS} workers, {variant.words}:", header, rows)


CASE = Case(_NAME, "Boot: start to first good result", _run)
