"""A handler that never returns: told, gone, and the time to the next good result.

1. In every round each peer's server is started with one worker and a timeout of 1 s, and asked
   until it answers.
2. For each way to hang, hang.py lets a handler hang, four times in a round. What a peer never comes
   back from is asked once, in the first round, and its server is killed and started again.
3. "Before the deadline" is a peer that runs tasks beside a hung one, in another thread.
4. The same with torch imported by the handlers' module, for those who came back from something.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from ..called import exchanging
from ..candidate import Candidate
from ..peers.pebble import PebbleTuned
from ..peers.peer import Peer
from ..report import spread
from ..rounds import NO_RATIO, OURS, Rounds, measure
from .case import Case, Options, Result, Table, able, twice
from .hang import GONE_LIMIT_S, NEXT_LIMIT_S, Hang, hang_once

_NAME = "hung"
_TIMEOUT_S = 1
_REPEAT = 4
_MEANWHILE_MS = -100  # some milliseconds: its clock started before the handler, with the request
_GOAL_MS = 20
_GOAL_TORCH_MS = 40
_NOT_GONE = f"no ({GONE_LIMIT_S:g} s)"
_NEVER = f"never ({NEXT_LIMIT_S:g} s)"
_RATIO = "ours / this one, of what both come back from"
_HELLO = {"text": "hello"}
KINDS = {
    "sleep": "time.sleep",
    "regex": "regular expression",
    "c_call": "C call, GIL held",
    "grandchild": "waits for a process of its own",
}
Turn = dict[str, list[Hang]]


def _run(peers: Sequence[Peer], options: Options) -> Result:
    result = Result()
    chosen = able(peers, _NAME, options, result.notes)
    plain = _measure(chosen, options, imported="")
    result.notes += plain.notes
    _add(result, plain, "plain")
    result.notes += _goals(plain.figures, "", _GOAL_MS)
    backs = [peer for peer in chosen if _comes_back(plain.figures.get(peer.label, []))]
    left_out: list[str] = []
    backs = able(backs, _NAME, options, left_out, torch=True)
    with_torch = _measure(backs, options, imported="torch")
    result.notes += [f"with torch: {note}" for note in left_out + with_torch.notes]
    _add(result, with_torch, "torch")
    result.notes += _goals(with_torch.figures, " with torch", _GOAL_TORCH_MS)
    return result


def _measure(peers: Sequence[Peer], options: Options, imported: str) -> Rounds[Turn]:
    turns = {peer.label: _Turns(peer, imported).turn for peer in peers}
    return measure(turns, options.rounds, _tell)


class _Turns:
    """A peer's turns; it remembers what the peer never came back from."""

    def __init__(self, peer: Peer, imported: str) -> None:
        self._peer = peer
        self._imported = imported
        self._lost: set[str] = set()

    def turn(self, number: int) -> Turn:
        del number
        with tempfile.TemporaryDirectory(prefix="ogpu-benchmark-") as folder, ExitStack() as stack:
            mark = Path(folder) / "hung"
            candidate: Candidate | None = None
            done: Turn = {}
            for kind in KINDS:
                if kind in self._lost:
                    continue
                if candidate is None:
                    candidate = twice(lambda: self._started(stack, mark))
                done[kind] = self._hang(candidate, kind, mark)
                if kind in self._lost:
                    candidate.server.kill()
                    stack.close()
                    candidate = None
            return done

    def _started(self, stack: ExitStack, mark: Path) -> Candidate:
        variables = {
            "BENCHMARK_MARK": str(mark),
            "BENCHMARK_TIMEOUT_S": str(_TIMEOUT_S),
            "BENCHMARK_IMPORT": self._imported,
            "OMP_NUM_THREADS": "1",
        }
        with ExitStack() as own:  # what a failed start has entered ends here
            candidate = own.enter_context(
                exchanging(self._peer, "hang", 1, variables, torch=bool(self._imported))
            )
            candidate.wait_until_answered(_HELLO, _HELLO)
            stack.push(own.pop_all())
        return candidate

    def _hang(self, candidate: Candidate, kind: str, mark: Path) -> list[Hang]:
        hangs = []
        for _ in range(_REPEAT):
            hangs.append(hang_once(candidate, kind, mark, _TIMEOUT_S))
            if not hangs[-1].is_over:
                self._lost.add(kind)
                break
        return hangs


def _comes_back(turns: Sequence[Turn]) -> bool:
    return any(hang.is_over for turn in turns for many in turn.values() for hang in many)


def _tell(turn: Turn) -> str:
    return "; ".join(f"{kind}: next {_next(many)}" for kind, many in turn.items())


def _add(result: Result, rounds: Rounds[Turn], variant: str) -> None:
    """Put one variant's figures into tables and JSON."""
    with_torch = ", with torch imported" if variant == "torch" else ""
    cells = {
        f"Deadline → next good result{with_torch}, ms, median (greatest)": _next,
        f"What its client is told{with_torch}, and when, ms after the deadline": _told,
        f"The work is gone{with_torch}, ms after the deadline": _gone,
    }
    for caption, cell in cells.items():
        rows = [
            [
                name,
                *(cell([hang for turn in turns for hang in turn.get(kind, [])]) for kind in KINDS),
                *([_ratio_cell(rounds.figures, name)] if cell is _next else []),
            ]
            for name, turns in rounds.figures.items()
        ]
        header = ["server", *KINDS.values(), *([_RATIO] if cell is _next else [])]
        result.tables.append(Table(f"{caption}:", header, rows))
    result.figures[variant] = {
        name: [
            {kind: [asdict(one) for one in many] for kind, many in turn.items()} for turn in turns
        ]
        for name, turns in rounds.figures.items()
    }


def _goals(figures: Mapping[str, Sequence[Turn]], variant: str, goal_ms: float) -> list[str]:
    """Say of each way to hang whether we come back from it as soon as is aimed at."""
    ours = figures.get(OURS, [])
    notes = []
    for kind, words in KINDS.items():
        hangs = [hang for turn in ours for hang in turn.get(kind, [])]
        if hangs:
            median = statistics.median(hang.next_ms or math.inf for hang in hangs)
            reached = "reached" if median <= goal_ms else "**not reached**"
            notes.append(
                f"Goal: next good result{variant}, {words}, p50 at most {goal_ms} ms: "
                f"{reached} ({median:.1f})"
            )
    if ratios := _ratios(figures, PebbleTuned.label):
        ratio = statistics.median(ratios)
        notes.append(
            f"Goal: next good result{variant} at most 1 times that of {PebbleTuned.label}: "
            f"{'reached' if ratio <= 1 else '**not reached**'} ({ratio:.2f})"
        )
    return notes


def _ratio_cell(figures: Mapping[str, Sequence[Turn]], name: str) -> str:
    if name == OURS:
        return "1"
    ratios = _ratios(figures, name)
    return spread(ratios, ".2f") if ratios else NO_RATIO


def _ratios(figures: Mapping[str, Sequence[Turn]], name: str) -> list[float]:
    """Return our p50 over another's, round by round, where there is one."""
    pairs = zip(figures.get(OURS, []), figures.get(name, []), strict=False)  # one may have none
    return [ratio for ours, other in pairs if (ratio := next_ratio(ours, other)) is not None]


def next_ratio(ours: Turn, other: Turn) -> float | None:
    """Return our p50 over another's, of the ways to hang that both have come back from.

    None where there is none: not from a single one, or its work goes on beside the next task.
    """
    both = [kind for kind in ours if _all_after(ours[kind]) and _all_after(other.get(kind, []))]
    if not both:
        return None
    ours_ms, other_ms = (
        statistics.median(hang.next_ms or 0.0 for kind in both for hang in turn[kind])
        for turn in (ours, other)
    )
    return ours_ms / other_ms


def _all_after(hangs: Sequence[Hang]) -> bool:
    """Whether each of them has ended, and a good result has followed, after its deadline."""
    return bool(hangs) and all(hang.is_over and (hang.next_ms or 0) > 0 for hang in hangs)


def _next(hangs: Sequence[Hang]) -> str:
    return times_cell([hang.next_ms for hang in hangs], _NEVER)


def _gone(hangs: Sequence[Hang]) -> str:
    times = [hang.gone_ms for hang in hangs]
    if not any(hang.has_child for hang in hangs):
        return times_cell(times, _NOT_GONE)
    children = times_cell([hang.child_gone_ms for hang in hangs], _NOT_GONE)
    return f"{times_cell(times, _NOT_GONE)}; its process {children}"


def _told(hangs: Sequence[Hang]) -> str:
    words = sorted({hang.told for hang in hangs if hang.told is not None})
    told = times_cell([hang.told_ms for hang in hangs], _NEVER)
    return f"{' or '.join(words)}: {told}" if words else told


def times_cell(times: Sequence[float | None], never: str) -> str:
    """Write the median and the greatest; of several that never came, how many."""
    if not times:
        return NO_RATIO
    came = [time for time in times if time is not None]
    if not came:
        return never
    if max(came) < _MEANWHILE_MS:
        return "before the deadline"
    cell = f"{statistics.median(came):.1f} ({max(came):.1f})"
    missing = len(times) - len(came)
    return f"{cell}; {never}: {missing} of {len(times)}" if missing else cell


CASE = Case(_NAME, "A hung handler: told, gone, next good result", _run)
