"""The template: a single-threaded process that makes workers, buries them, and runs nothing else.

Runs as a child of the front: forked from it at start(), or as a fresh interpreter, where a fork is
not safe or where the first template was lost. Every worker is its child, whichever way it was made.

0. The source's @prepare runs, where it has one (``preparing.py``). What makes a fork unsafe is
   looked for then; where something does, this process becomes a fresh interpreter, with the same
   children and the same socket, which gives back what was loaded.
1. Launch arrives: a worker is made (``birth.py``), by a fork of this process, or, where it imported
   nothing or a fork is not safe, as a fresh interpreter. Standby arrives: in the second case such
   an interpreter is started for the next Launch.
2. SIGCHLD: a worker is dead. It is reaped, and what it has left is killed (``burial.py``); when
   nothing of it is left, the front is told.
3. The control socket ends: the front is dead or done. Kill all, wait (bounded), exit.

If the template itself is killed, the kernel kills the workers (PR_SET_PDEATHSIG), and the front,
to which their orphans go, kills those.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

import setproctitle

from .. import wire
from ..errors import WireError
from ..processes import become_subreaper, wake_at_parents_death
from . import spawned
from .birth import Births, SignalHandler
from .burial import Burials
from .hazards import fork_hazard
from .preparing import FRONTS_SIGNALS, prepare_to_fork

_SHUTDOWN_LIMIT_S = 10.0


def fork_template(source: spawned.Source, start_method: str) -> tuple[int, socket.socket]:
    """Fork the template from this process (the front; it must have one thread only).

    Returns the template's pid and the front's end of the control socket.
    """
    front = os.getpid()
    fronts_end, templates_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # what is buffered here would be written once more by each worker
    # A collection writes to every object that it looks at, and so would copy all that the source
    # has imported, once more for the front: 0.1 s and 30 MiB with PyTorch.
    gc.freeze()
    pid = os.fork()
    if pid:
        templates_end.close()
        return pid, fronts_end
    try:
        fronts_end.close()
        be_template(templates_end, front, source, start_method)
    except BaseException:  # noqa: BLE001 - this process must not return into the source's code
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def exec_template(source: spawned.Source, start_method: str) -> tuple[int, socket.socket]:
    """Start the template as a fresh interpreter; safe with any threads.

    For ``spawn`` it imports nothing; for ``fork``, and for ``auto``, which looks for hazards then,
    it imports the source, as a spawned worker does. Returns the template's pid and the front's end
    of the control socket.

    Raises:
        OSError: there is no room for another process.
    """
    fronts_end, templates_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with templates_end:
        templates_end.set_inheritable(True)
        command = spawned.template_command(templates_end.fileno(), source, start_method)
        try:
            return os.posix_spawn(command[0], command, os.environ), fronts_end
        except OSError:
            fronts_end.close()
            raise


def be_template(
    control: socket.socket,
    front: int,
    source: spawned.Source,
    start_method: str,
    *,
    is_fresh: bool = False,
) -> None:
    """Live as a template that forks; in a process that has imported the source.

    ``is_fresh``: nobody has looked for hazards in this process yet.
    """
    is_prepared = prepare_to_fork(control, front)
    hazard = fork_hazard(is_prepared=is_prepared) if is_prepared or is_fresh else None
    if hazard is not None and start_method == "auto":
        spawn_instead(control, source, hazard)
    Template(control, "fork", source, hazard).serve()


def spawn_instead(control: socket.socket, source: spawned.Source, hazard: str) -> NoReturn:
    """Become a template that spawns, as a fresh interpreter: what was loaded here is given back."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - they are numbers
        with contextlib.suppress(OSError):  # the one that lists them is closed already
            os.set_inheritable(descriptor, descriptor in (0, 1, 2, control.fileno()))
    hazard = hazard.replace("\0", "")  # no argument can hold one
    command = spawned.template_command(control.fileno(), source, "spawn", hazard, os.getppid())
    os.execv(command[0], command)  # noqa: S606 - our own command, no shell


class Template:
    """The template's loop.

    Args:
        control: its end of the socket to the front.
        method: ``fork`` or ``spawn``, how it makes workers.
        source: what spawned workers need in order to import the source.
        hazard: why a fork is not safe, where one was wanted.
    """

    def __init__(
        self, control: socket.socket, method: str, source: spawned.Source, hazard: str | None
    ) -> None:
        self._control = control
        self._ready = wire.TemplateReady(method, hazard)
        self._temp_base: Path | None = None
        self._births = Births(method, source, self._tell, self._drop_descriptors)
        self._burials = Burials(self._tell, self._bury_standby)
        self._selector = selectors.DefaultSelector()
        self._wakeups, self._wake = socket.socketpair()

    def serve(self) -> None:
        """Work until the front is gone."""
        become_subreaper()
        wake_at_parents_death()
        self._take_signals()
        setproctitle.setproctitle("ogpu-service: template")
        # Objects that exist now are shared with every worker; a collection would write to them all.
        gc.freeze()
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._wakeups, selectors.EVENT_READ)
        self._tell(self._ready)
        try:
            while self._step(None):
                pass
        finally:  # whatever happens here, nothing outlives this process
            self._shut_down()

    def _take_signals(self) -> None:
        self._wakeups.setblocking(False)
        self._wake.setblocking(False)
        # A source may ignore SIGCHLD, or reap in a handler of its own: not here.
        taken: dict[signal.Signals, SignalHandler] = dict.fromkeys(FRONTS_SIGNALS, signal.SIG_IGN)
        taken[signal.SIGCHLD] = _be_woken
        before = {number: signal.signal(number, handler) for number, handler in taken.items()}
        self._births.signal_handlers = {
            number: signal.SIG_DFL if handler is None else handler
            for number, handler in before.items()
        }
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)  # the front held some for the fork

    def _step(self, timeout_s: float | None) -> bool:
        """Handle what has happened; return False when the front is gone."""
        front_is_there = True
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._control:
                front_is_there = self._obey()
            else:
                with contextlib.suppress(BlockingIOError):
                    self._wakeups.recv(4096)
                self._burials.bury()
        return front_is_there

    def _obey(self) -> bool:
        try:
            packet = self._control.recv(wire.MAX_PACKET_BYTES)
        except ConnectionResetError:  # the front died with news from here unread
            return False
        if not packet:
            return False
        match order := wire.decode_header(packet):
            case wire.Launch():
                self._launch(order)
            case wire.Standby():
                self._make_standby(order)
            case _:
                raise WireError(f"a template cannot do {order}")
        return True

    def _launch(self, order: wire.Launch) -> None:
        if order.temp_dir is not None:
            self._temp_base = Path(order.temp_dir).parent
        try:
            born = self._births.make(order)
        except OSError as error:
            self._tell(wire.LaunchFailed(order.slot, order.generation, str(error)))
            return
        self._burials.standbys.discard(born.pid)
        self._burials.workers[born.pid] = born

    def _make_standby(self, order: wire.Standby) -> None:
        try:
            pid = self._births.make_standby(order)
        except OSError as error:
            self._tell(wire.StandbyLost(f"it could not be made: {error}"))
            return
        if pid is not None:
            self._burials.standbys.add(pid)

    def _bury_standby(self, pid: int, code: int) -> None:
        self._tell(wire.StandbyLost(self._births.bury_standby(pid, code)))

    # --- the end

    def _tell(self, message: wire.Message, descriptors: list[int] | None = None) -> None:
        # The front is gone: the next read of the control socket says so, too.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._control, [wire.encode_header(message)], descriptors or [])

    def _drop_descriptors(self) -> None:
        """Close what is the template's: in a worker, the control socket would hide its end."""
        for owned in (self._control, self._selector, self._wakeups, self._wake):
            owned.close()

    def _shut_down(self) -> None:
        self._selector.unregister(self._control)
        self._burials.kill_all()
        limit = time.monotonic() + _SHUTDOWN_LIMIT_S
        while not self._burials.is_over and time.monotonic() < limit:
            self._step(0.1)
            self._burials.bury()
        front_is_there = self._can_tell()
        self._drop_descriptors()
        if self._temp_base is not None and not front_is_there:  # else it does so itself
            shutil.rmtree(self._temp_base, ignore_errors=True)

    def _can_tell(self) -> bool:
        """Tell whether the front still hears: it closes its socket last, or with its death."""
        try:
            self._control.send(wire.encode_header(self._ready), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _be_woken(_: int, __: FrameType | None) -> None:
    """Do nothing: the number has been written to the wake-up descriptor."""
