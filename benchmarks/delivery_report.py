"""What benchmarks.deliveries has found, in tables, in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from . import report, wrk
from .delivery_load import Deliveries
from .peer_frozen import FROZEN_VERSION

DURABLE = "ogpu-service, durable"
MEMORY = "ogpu-service, :memory:"
FROZEN = f"frozen ogpu {FROZEN_VERSION}"
ALONE = "load and sink alone"
_FROZEN_GOAL = 6.0  # least ratio of ours, durable, to each
_MEMORY_GOAL = 0.75


@dataclass(frozen=True)
class Turn:
    """What one candidate's turn gave."""

    seen: Deliveries
    others_cpus: float


Turns = dict[str, list[Turn]]
Loads = dict[str, list[wrk.Load]]
Rates = dict[str, list[float]]


def deliveries_table(turns: Turns, concurrency: int) -> str:
    header = [
        "server",
        f"delivered/s at {concurrency}, median (range)",
        "durable / this one, median (range)",
        "accepted → delivered p50 ms",
        "p99 ms",
        "CPUs used by load and sink",
        "by others, max",
    ]
    rates = _delivered(turns)
    rows = [
        [
            *_rate_cells(rates, name),
            _middle(turn.seen.p50_ms for turn in many),
            _middle(turn.seen.p99_ms for turn in many),
            _middle(turn.seen.load_cpus for turn in many),
            f"{max(turn.others_cpus for turn in many):.2f}",
        ]
        for name, many in turns.items()
    ]
    return report.table(header, rows)


def waiting_table(loads: Loads, concurrency: int) -> str:
    header = [
        "Prefer: wait=30, no callback",
        f"requests/s at {concurrency}, median (range)",
        "durable / this one, median (range)",
        "p99 ms",
        "CPUs used by others, max",
    ]
    rates = _answered(loads)
    rows = [
        [
            *_rate_cells(rates, name),
            _middle(load.p99_us / 1000 for load in many),
            f"{max(load.others_cpus for load in many):.2f}",
        ]
        for name, many in loads.items()
    ]
    return report.table(header, rows)


def verdict(turns: Turns, loads: Loads, facts: dict[str, Any]) -> str:
    """Say which goals were reached, and whether the durable one has kept anything at all."""
    delivered = _delivered(turns)
    found = [_goal("delivered/s of :memory:", _MEMORY_GOAL, _ratios(delivered, MEMORY))]
    if FROZEN in turns:
        ratios = _ratios(delivered, FROZEN)
        found.insert(0, _goal("delivered/s of the frozen module", _FROZEN_GOAL, ratios))
    if loads:
        ratios = _ratios(_answered(loads), MEMORY)
        found.append(_goal("requests/s of :memory: with Prefer: wait", _MEMORY_GOAL, ratios))
    text = "Goals for durable: " + "; ".join(found) + "."
    if not facts["journal_bytes"][DURABLE]:
        text += "\n\n**Nothing was kept in OGPU_STATE_DIR: there is no journal at this commit.**"
    if facts["disk"]["filesystem"] == "tmpfs":
        text += "\n\n**The state was on tmpfs, where keeping it costs little: set TMPDIR.**"
    return text


def figures(turns: Turns, loads: Loads) -> dict[str, Any]:
    """Return every single figure, and the medians of the ratios."""
    return {
        "durable_to_each": _medians(_delivered(turns)),
        "waiting_durable_to_each": _medians(_answered(loads)),
        "rounds": {name: [asdict(turn) for turn in many] for name, many in turns.items()},
        "waiting_rounds": {name: [asdict(load) for load in many] for name, many in loads.items()},
    }


def _delivered(turns: Turns) -> Rates:
    return {name: [turn.seen.delivered_per_s for turn in many] for name, many in turns.items()}


def _answered(loads: Loads) -> Rates:
    return {name: [load.requests_per_s for load in many] for name, many in loads.items()}


def _ratios(rates: Rates, name: str) -> list[float]:
    """Return ours, durable, over another's, round by round."""
    return [ours / other for ours, other in zip(rates[DURABLE], rates[name], strict=True)]


def _medians(rates: Rates) -> dict[str, float]:
    return {name: median(_ratios(rates, name)) for name in rates if name != DURABLE}


def _rate_cells(rates: Rates, name: str) -> list[str]:
    ratio = "1" if name == DURABLE else report.spread(_ratios(rates, name), ".2f")
    return [name, report.spread(rates[name], ".0f"), ratio]


def _middle(values: Iterable[float]) -> str:
    return f"{median(values):.2f}"


def _goal(what: str, least: float, ratios: Sequence[float]) -> str:
    found = median(ratios)
    outcome = "reached" if found >= least else "**not reached**"
    return f"at least {least:g} times the {what}, {outcome} ({found:.2f})"
