"""How much CPU others used while something was measured: a figure from a busy machine is none."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_TICKS_PER_S = 100  # USER_HZ, the unit of /proc/stat
_CPU_CLOCK = 2  # beside a pid: the clock that clock_getcpuclockid(3) names, which Python lacks


def watch_others(pid: int) -> Callable[[], float]:
    """Begin to watch; the function returned says how many CPUs others have used since, on average.

    Not others: the process ``pid``, all that it started, and children of this process that have
    ended since (wrk).
    """
    before_s, started = _others_s(pid), time.monotonic()
    return lambda: max(0.0, _others_s(pid) - before_s) / (time.monotonic() - started)


def _others_s(pid: int) -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return _busy_s() - _tree_s(pid) - ended.ru_utime - ended.ru_stime


def _busy_s() -> float:
    """Return the CPU time of the whole machine (proc_stat(5)): all but idle and iowait."""
    first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    user, nice, system, _, _, irq, softirq, *_ = (int(part) for part in first.split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


def _tree_s(pid: int) -> float:
    """Return the CPU time of a process and its descendants, threads that have ended included."""
    total = time.clock_gettime(~pid << 3 | _CPU_CLOCK)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            for child in (thread / "children").read_text(encoding="ascii").split():
                total += _tree_s(int(child))
    return total
