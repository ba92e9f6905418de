"""Numeric libraries that were loaded before the worker was made: held to its share of the cores.

Runs in a worker, before @init; ``find_libraries`` in the template as well. The share comes as
variables in the worker's environment (``devices/plan.py``), which libraries read when they are
loaded. That is too late where the source imported them before the fork; those are told by call.

1. The template looks which libraries are loaded, once for all its workers. Where there are none,
   neither it nor they pay for threadpoolctl (20 ms to import, 1 ms to look).
2. In the worker, PyTorch first: where its number is not the one that it takes by itself, the source
   has set it, and OpenMP and MKL, which it sets along, stay as they are.
3. Each library that would use more threads than the share is told the share. None is told to use
   more than it would, and none of which the user has set the variable.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

_OPENMP, _MKL = "OMP_NUM_THREADS", "MKL_NUM_THREADS"
# By threadpoolctl's names. MKL within PyTorch is linked in, and PyTorch's own call reaches it.
# (NumExpr, which has a variable as well, notices a fork by itself.)
VARIABLES = {
    "openmp": _OPENMP,
    "mkl": _MKL,
    "openblas": "OPENBLAS_NUM_THREADS",
    "blis": "BLIS_NUM_THREADS",
}
_FILES = (b"libgomp", b"libomp", b"libiomp", b"openblas", b"libmkl_rt", b"libblis")
_OWED: dict[str, int] = {}  # what is to be given to libraries in workers; filled in the template
_CPUS = Path("/sys/devices/system/cpu")


@functools.cache
def find_libraries() -> ThreadpoolController | None:
    """Look which libraries are loaded here; a process forked from this one has them, too."""
    maps = Path("/proc/self/maps").read_bytes()
    if not any(name in maps for name in _FILES):
        return None
    from threadpoolctl import ThreadpoolController  # noqa: PLC0415 - see the module's docstring

    return ThreadpoolController()


def give_torch_later(number: int) -> None:
    """Have every worker give PyTorch a number of threads that @prepare was not to have."""
    _OWED["torch"] = number


def hold_to_share(environment: Mapping[str, str]) -> None:
    """Tell the libraries that are loaded what the worker's own variables tell those to come.

    Args:
        environment: the variables that are the worker's own, and not the user's.
    """
    libraries = find_libraries()
    if libraries is None:
        return
    torch = sys.modules.get("torch")
    if torch is not None and "torch" in _OWED:
        torch.set_num_threads(_OWED["torch"])
    kept: tuple[str, ...] = ()
    if torch is not None and _OPENMP in environment and _MKL in environment:
        share = int(environment[_OPENMP])
        if _has_default(torch):
            if torch.get_num_threads() > share:
                torch.set_num_threads(share)
        else:
            kept = (_OPENMP, _MKL)
    for library in libraries.lib_controllers:
        variable = VARIABLES.get(library.internal_api, "")
        if variable not in environment or variable in kept:
            continue
        share = int(environment[variable])
        if library.get_num_threads() > share:
            library.set_num_threads(share)


def _has_default(torch: ModuleType) -> bool:
    """Tell whether PyTorch would use as many threads as it does where nobody tells it a number."""
    cpus = os.sched_getaffinity(0)
    # By MKL a thread for each core, by OpenMP one for each of its hardware threads.
    cores = {_siblings(cpu) for cpu in cpus}
    return torch.get_num_threads() in (len(cpus), len(cores), os.cpu_count())


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:  # not shown here (gVisor): each is a core of its own
        return str(cpu)
