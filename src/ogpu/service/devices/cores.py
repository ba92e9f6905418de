"""How many cores this process may use: its affinity, or the limit of its cgroup.

Runs in the front, once. ``docker run --cpus=2`` shows all the cores of the host, and takes the time
of two; libraries that start a thread for each core that they see then wait for each other.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..cgroups import Cgroup, cgroup_of, read_text


def allowed_cores(proc: Path = Path("/proc/self")) -> int:
    """Return the number of cores, rounded up."""
    seen = len(os.sched_getaffinity(0))
    try:
        cgroup = cgroup_of(proc, "cpu")
    except (OSError, ValueError):  # no cgroup that is seen from here: no limit that is known
        return seen
    quotas = [quota for folder in cgroup.folders if (quota := _quota(cgroup, folder)) is not None]
    return max(1, min([seen, *(math.ceil(quota) for quota in quotas)]))


def _quota(cgroup: Cgroup, folder: Path) -> float | None:
    """Return the cores that a cgroup gets (cpu.max in cgroup-v2.rst; CFS quota in version 1)."""
    try:
        if cgroup.version == 2:
            quota, period = read_text(folder / "cpu.max").split()
        else:
            quota, period = (
                read_text(folder / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")
            )
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # the root has none
        return None
