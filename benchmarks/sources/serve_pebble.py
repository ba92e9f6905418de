"""The chosen handler in pebble's pool of processes; there is no web server (lines.py).

As it comes: workers are forked from a process that knows no handler; the initializer imports it.
With BENCHMARK_TUNED=1 it is imported, and prepared, before the first fork, and pebble's clocks are
as short as they can be: its loops look every millisecond, and SIGKILL follows SIGTERM at once.
"""

import os
import sys

import handlers
from pebble import CONSTS, ProcessPool

import lines

IS_TUNED = os.environ.get("BENCHMARK_TUNED") == "1"
TIMEOUT_S = float(os.environ.get("BENCHMARK_TIMEOUT_S", "30"))


def initialize() -> None:
    chosen = handlers.chosen()
    if not IS_TUNED and hasattr(chosen, "prepare"):
        chosen.prepare()
    chosen.load()


def handle(data: str) -> str:
    chosen = handlers.chosen()
    return str(chosen.handle(chosen.Input.model_validate_json(data)).model_dump_json())


def main() -> None:
    if IS_TUNED:
        CONSTS.sleep_unit = 0.001
        CONSTS.term_timeout = 0
        if hasattr(chosen := handlers.chosen(), "prepare"):
            chosen.prepare()
    pool = ProcessPool(int(os.environ["BENCHMARK_WORKERS"]), initializer=initialize)
    lines.serve(lambda data: pool.schedule(handle, args=[data], timeout=TIMEOUT_S).result())


if __name__ == "__main__":
    sys.exit(main())
