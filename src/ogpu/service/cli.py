"""``python -m ogpu.service``: which module of that name is in place, and which version."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .config import SDK_VERSION


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
    parser.parse_args(arguments)
    parser.print_help()
    return 0
