"""The burial of workers: they are reaped, and what they have left is killed.

Runs in the template, which is their parent, and so the only one that can reap them.

1. SIGCHLD: a worker is dead, but not reaped, so its pid is still its own. Kill its process group,
   reap it, then kill every orphan. Workers are subreapers: what a worker's process tree loses stays
   below that worker while it lives, and comes here when it dies. So any child here that is not a
   living worker is what a dead one has left, however it tried to escape (setsid, double fork,
   another environment).
2. Nothing of it is left: say Gone. A process that SIGKILL cannot end keeps its own worker from
   being Gone, and no other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import wire
from ..processes import own_children


@dataclass
class _Burial:
    """Workers that died together, and the orphans that keep them from being Gone."""

    dead: list[wire.Gone] = field(default_factory=list)
    orphans: set[int] = field(default_factory=set)


class Burials:
    """Knows the children of this process, and buries those that were workers.

    ``workers`` are those that were born here, by pid, and ``standbys`` those that may become one;
    ``tell`` says Gone to the front, ``bury_standby`` takes a pid and an exit code.
    """

    def __init__(
        self, tell: Callable[[wire.Gone], None], bury_standby: Callable[[int, int], None]
    ) -> None:
        self.workers: dict[int, wire.Launched] = {}
        self.standbys: set[int] = set()
        self._tell = tell
        self._bury_standby = bury_standby
        self._sources = own_children()  # what the source started when it was imported here
        self._burials: list[_Burial] = []  # orphans are known by pid, too: we alone reap

    @property
    def is_over(self) -> bool:
        """True when there are no workers any more, and nothing that any has left."""
        return not self.workers and not self.standbys and not self._burials

    def bury(self) -> None:
        """Reap every child that has ended, and kill what dead workers have left."""
        burial = _Burial()
        while self._reap(burial):
            pass
        orphans = (b.orphans for b in self._burials)
        known = self._sources.union(self.workers, self.standbys, *orphans)
        while True:
            found = own_children() - known - burial.orphans
            burial.orphans |= found
            for pid in found:
                self._kill(pid)
            # A worker that died before the look at the children has orphans among those found.
            if not self._reap(burial):
                break
        if burial.dead or burial.orphans:
            self._burials.append(burial)
        for done in [b for b in self._burials if not b.orphans]:
            self._burials.remove(done)
            for gone in done.dead:
                self._tell(gone)

    def kill_all(self) -> None:
        """Kill the workers, and what the source started in this process."""
        for pid in [*self.workers, *self.standbys, *(self._sources & own_children())]:
            self._kill(pid)

    def _reap(self, burial: _Burial) -> bool:
        """Reap one child that has ended; return False when there is none."""
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        if ended is None:
            return False
        pid = ended.si_pid
        worker = self.workers.pop(pid, None)
        is_standby = pid in self.standbys
        if worker is not None or is_standby:
            # No such group: it died before setsid(). No permission: it runs as another user.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if is_standby:
            self.standbys.discard(pid)
            self._bury_standby(pid, code)
        if worker is not None:
            burial.dead.append(wire.Gone.with_code(worker.slot, worker.generation, code))
        for earlier in self._burials:
            if pid in earlier.orphans:
                # What it had itself is found next, and belongs to the same dead worker.
                earlier.orphans.discard(pid)
                burial.dead += earlier.dead
                earlier.dead = []
                burial.orphans |= earlier.orphans
                earlier.orphans = set()
        burial.orphans.discard(pid)
        self._sources.discard(pid)  # it is reaped, and its pid may be given to anybody
        return True

    @staticmethod
    def _kill(pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)  # our child, and not reaped: the pid is its own
        except PermissionError as error:  # it runs as another user: Gone waits for its own end
            sys.stderr.write(f"cannot kill process {pid}, left by a worker: {error}\n")
