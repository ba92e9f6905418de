"""``python -m ogpu.service``: which module of that name is in place; and a container's health."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .config import SDK_VERSION
from .healthcheck import ALIVE, READY, healthcheck

_LONGEST_WAIT_S = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        prog="python -m ogpu.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # paths are not to be wrapped
    )
    parser.add_argument(
        "--version", action="version", version=f"ogpu-service {SDK_VERSION} ({here})"
    )
    commands = parser.add_subparsers(dest="command")
    _add_healthcheck(commands.add_parser("healthcheck", help="ask the service whether it is alive"))
    chosen = parser.parse_args(arguments)
    if chosen.command == "healthcheck":
        return healthcheck(chosen.url, chosen.timeout, chosen.path)
    parser.print_help()
    return 0


def _add_healthcheck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        help="where the service is; default: http://, and OGPU_HOST and OGPU_PORT as it reads them",
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=3.0, metavar="S", help="seconds to wait (default: 3)"
    )
    parser.add_argument(
        "--ready",
        dest="path",
        action="store_const",
        const=READY,
        default=ALIVE,
        help="ask whether a task would run now, instead of whether the service is alive",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_WAIT_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to an hour")
    return seconds
