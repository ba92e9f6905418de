"""Numeric libraries are held to one thread while @prepare runs.

Runs in the template. A thread of theirs would not survive the fork: OpenMP's (libgomp) leave a
child that hangs in its first parallel region (pytorch#17199).

1. Those that are loaded already are told by call; those that @prepare loads read it in the
   environment. This is done over what the user has set, who means the workers.
2. Afterwards each has the number again that it had, or, where it was loaded meanwhile, that it
   would have taken. None starts a thread for that which a fork does not survive, but PyTorch: 2.13
   starts its threads with the first call. So it is told in each worker (``threads.py``), as is what
   the worker's share of the cores is.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from . import threads
from .threads import VARIABLES


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Hold the libraries that are loaded, and those to come, at one thread."""
    # Where there is a @prepare alone: it takes 20 ms to import.
    from threadpoolctl import ThreadpoolController  # noqa: PLC0415

    wanted = {name: os.environ.get(name) for name in VARIABLES.values()}
    loaded, torch_threads = ThreadpoolController(), _hold_torch()
    os.environ.update(dict.fromkeys(wanted, "1"))
    try:
        with loaded.limit(limits=1):
            yield
    finally:
        for name, value in wanted.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        known = {library.filepath for library in loaded.lib_controllers}
        for library in ThreadpoolController().lib_controllers:
            if library.filepath not in known:
                variable = VARIABLES.get(library.internal_api, "")
                library.set_num_threads(_number(wanted, variable))
        _let_go_of_torch(torch_threads or _number(wanted, VARIABLES["openmp"]))


def _hold_torch() -> int | None:
    """Tell PyTorch; return how many threads it had, or None: it is not loaded.

    MKL is linked into it, where threadpoolctl does not find it, and at its first use PyTorch gives
    OpenMP the number that MKL has.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    number: int = torch.get_num_threads()
    torch.set_num_threads(1)
    return number


def _let_go_of_torch(number: int) -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() == 1:  # @prepare has not set another number
        threads.give_torch_later(number)


def _number(wanted: Mapping[str, str | None], variable: str) -> int:
    """Return how many threads a library takes by itself."""
    # OMP_NUM_THREADS holds for all, and may be a list, one number for each level of nesting.
    text = wanted.get(variable) or wanted[VARIABLES["openmp"]] or ""
    first = text.partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else len(os.sched_getaffinity(0))
