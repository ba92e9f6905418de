"""This service beside its peers, on the same handlers, in one run.

1. Every peer is put into an environment of its own (environments.py), where it is not yet.
2. Case after case starts the peers that can do it, lets them take turns, and puts what was seen
   into tables and JSON. A peer that cannot be had or cannot do a case is left out, in one line that
   says why; one that gave a wrong answer or an error has no figures, in a line as well.
3. What was found is printed as markdown, with the machine, the versions and the commit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import report
from .cases import CASES
from .cases.case import Options, Result
from .disk import describe_disk
from .environments import default_cache
from .harness import BenchmarkError, run
from .peers import PEERS


def main() -> None:
    asked = parse(sys.argv[1:])
    options = Options(asked.rounds, asked.seconds, asked.cache)
    peers = [PEERS[name] for name in asked.peers]
    facts = {**report.environment(), "disk": describe_disk()}
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    for name in asked.cases:
        print(f"== {CASES[name].title}", file=sys.stderr)
        try:
            results[name] = CASES[name].run(peers, options)
        except BenchmarkError as error:
            failed[name] = str(error)
    facts["load_average_after"] = report.environment()["load_average"]
    text = _markdown(facts, options, results, failed)
    print(f"\n{text}")
    if asked.markdown is not None:
        asked.markdown.write_text(text + "\n", encoding="utf-8")
    report.write_json(asked.json, _content(asked, facts, results, failed))
    if failed:
        sys.exit(1)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    for what, known in (("peers", PEERS), ("cases", CASES)):
        parser.add_argument(
            f"--{what}",
            type=_names(known),
            default=list(known),
            help=f"some of {','.join(known)}; all of them where not given",
        )
    parser.add_argument("--rounds", type=_positive, default=3, help="turns of each server")
    parser.add_argument("--seconds", type=_positive, default=4, help="length of each load")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="where the environments are kept"
    )
    return parser.parse_args(arguments)


def _names(known: dict[str, Any]) -> Any:
    """Return what argparse makes of ``a,b``: the names, in the order in which they are known."""

    def names(given: str) -> list[str]:
        wanted = [name.strip() for name in given.split(",") if name.strip()]
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown} are not among {list(known)}")
        if not wanted:
            raise argparse.ArgumentTypeError("none is named")
        return [name for name in known if name in wanted]

    return names


def _positive(given: str) -> int:
    number = int(given)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _markdown(
    facts: dict[str, Any], options: Options, results: dict[str, Result], failed: dict[str, str]
) -> str:
    disk = facts["disk"]
    about = (
        f"{report.describe(facts)}; state on {disk['filesystem']}, where an fdatasync of 4 KiB "
        f"takes {disk['fdatasync_us']} µs; {options.rounds} rounds of {options.seconds} s"
    )
    parts = [about]
    if disk["filesystem"] == "tmpfs":
        parts.append("**The state was on tmpfs, where keeping it costs little: set TMPDIR.**")
    for name, result in results.items():
        parts.append(f"### {name}")
        for table in result.tables:
            parts += [table.caption, report.table(table.header, table.rows)]
        if result.notes:
            parts.append("\n".join(f"- {note}" for note in result.notes))
    parts += [f"### {name}\n\nNo figures: {reason}" for name, reason in failed.items()]
    return "\n\n".join(parts)


def _content(
    asked: argparse.Namespace,
    facts: dict[str, Any],
    results: dict[str, Result],
    failed: dict[str, str],
) -> dict[str, Any]:
    return {
        "environment": facts,
        "options": {name: getattr(asked, name) for name in ("peers", "cases", "rounds", "seconds")},
        "cases": {
            name: {"figures": result.figures, "notes": result.notes}
            for name, result in results.items()
        },
        "failed": failed,
        "packages": {
            name: packages for name in asked.peers if (packages := PEERS[name].packages())
        },
    }


if __name__ == "__main__":
    run(main)
