"""The template: a single-threaded process that makes workers, buries them, and runs nothing else.

Runs as a child of the front: forked from it at start(), or as a fresh interpreter, where a fork is
not safe or where the first template was lost. Every worker is its child, whichever way it was made.

1. Launch arrives: make the channel and the output pipe, fork; the child leads its own session and
   becomes the worker (method fork) or executes a fresh interpreter (method spawn). The front's
   ends, the file for the worker's stacks and its pidfd go to the front with Launched.
2. SIGCHLD: a worker is dead, but not reaped, so its pid is still its own. Kill its process group,
   reap it, then kill every orphan. Workers are subreapers: what a worker's process tree loses stays
   below that worker while it lives, and comes here when it dies. So any child here that is not a
   living worker is what a dead one has left, however it tried to escape (setsid, double fork,
   another environment).
3. Nothing of it is left: say Gone. A process that SIGKILL cannot end keeps its own worker from
   being Gone, and no other.
4. The control socket ends: the front is dead or done. Kill all, wait (bounded), exit.

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
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import setproctitle

from .. import wire
from ..errors import WireError
from ..processes import (
    become_subreaper,
    die_with_parent,
    own_children,
    wake_at_parents_death,
)
from . import output, spawned, stacks
from .loop import run_worker

SignalHandler = Callable[[int, FrameType | None], Any] | int

# Ctrl-C and a closing terminal reach the whole foreground group; only the front acts on them, and
# ends this process.
_FRONTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SHUTDOWN_LIMIT_S = 10.0


def fork_template() -> tuple[int, socket.socket]:
    """Fork the template from this process (the front; it must have one thread only).

    Returns the template's pid and the front's end of the control socket.
    """
    fronts_end, templates_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # what is buffered here would be written once more by each worker
    pid = os.fork()
    if pid:
        templates_end.close()
        return pid, fronts_end
    try:
        fronts_end.close()
        Template(templates_end, "fork").serve()
    except BaseException:  # noqa: BLE001 - this process must not return into the source's code
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def exec_template(prepared: str, start_method: str) -> tuple[int, socket.socket]:
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
        command = spawned.template_command(templates_end.fileno(), prepared, start_method)
        try:
            return os.posix_spawn(command[0], command, os.environ), fronts_end
        except OSError:
            fronts_end.close()
            raise


@dataclass(frozen=True)
class _Worker:
    slot: int
    generation: int
    pid: int


@dataclass
class _Burial:
    """Workers that died together, and the orphans that keep them from being Gone."""

    dead: list[wire.Gone] = field(default_factory=list)
    orphans: set[int] = field(default_factory=set)


class Template:
    """The template's loop.

    Args:
        control: its end of the socket to the front.
        method: ``fork`` or ``spawn``, how it makes workers.
        prepared: what spawned workers need in order to import the source.
        hazard: why the method is ``spawn``, where ``fork`` was wanted.
    """

    def __init__(
        self,
        control: socket.socket,
        method: str,
        prepared: str | None = None,
        hazard: str | None = None,
    ) -> None:
        self._control = control
        self._method = method
        self._prepared = prepared
        self._hazard = hazard
        self._temp_base: Path | None = None
        self._pid = os.getpid()
        self._sources = own_children()  # what the source started when it was imported here
        self._workers: dict[int, _Worker] = {}  # by pid, and so are the orphans: we alone reap
        self._burials: list[_Burial] = []
        self._signal_handlers: dict[signal.Signals, SignalHandler] = {}
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
        self._tell(wire.TemplateReady(self._method, self._hazard))
        try:
            while self._step(None):
                pass
        finally:  # whatever happens here, nothing outlives this process
            self._shut_down()

    def _take_signals(self) -> None:
        self._wakeups.setblocking(False)
        self._wake.setblocking(False)
        # A source may ignore SIGCHLD, or reap in a handler of its own: not here.
        taken: dict[signal.Signals, SignalHandler] = dict.fromkeys(_FRONTS_SIGNALS, signal.SIG_IGN)
        taken[signal.SIGCHLD] = _be_woken
        for number, handler in taken.items():
            before = signal.signal(number, handler)
            self._signal_handlers[number] = signal.SIG_DFL if before is None else before
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
                self._bury()
        return front_is_there

    def _obey(self) -> bool:
        try:
            packet = self._control.recv(wire.MAX_PACKET_BYTES)
        except ConnectionResetError:  # the front died with news from here unread
            return False
        if not packet:
            return False
        order = wire.decode_header(packet)
        if not isinstance(order, wire.Launch):
            raise WireError(f"a template cannot do {order}")
        try:
            self._launch(order)
        except OSError as error:
            self._tell(wire.LaunchFailed(order.slot, order.generation, str(error)))
        return True

    # --- making workers

    def _launch(self, order: wire.Launch) -> None:
        if order.temp_dir is not None:
            self._temp_base = Path(order.temp_dir).parent
        with ExitStack() as ours:  # what is made here is closed here, in this process
            fronts_channel, workers_channel = map(ours.enter_context, socket.socketpair())
            output_read, output_write = os.pipe()
            ours.callback(os.close, output_read)
            ours.callback(os.close, output_write)
            stacks_fd = stacks.make_file()
            ours.callback(os.close, stacks_fd)
            pid = os.fork()
            if pid == 0:
                # Held open here, it would keep the worker from ever seeing the front's end close.
                fronts_channel.close()
                os.close(output_read)
                self._become_worker(order, workers_channel, output_write, stacks_fd)
            try:
                pidfd = os.pidfd_open(pid)
                ours.callback(os.close, pidfd)
                launched = wire.Launched(order.slot, order.generation, pid)
                self._tell(launched, [fronts_channel.fileno(), output_read, stacks_fd, pidfd])
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            self._workers[pid] = _Worker(order.slot, order.generation, pid)

    def _become_worker(
        self, order: wire.Launch, channel: socket.socket, output_fd: int, stacks_fd: int
    ) -> NoReturn:
        """Live as a worker: the new process runs this, and nothing after it."""
        try:
            die_with_parent(self._pid)
            os.setsid()
            become_subreaper()
            output.take_over(output_fd)
            _be_the_first_to_go()
            signal.set_wakeup_fd(-1)
            for number, handler in self._signal_handlers.items():
                signal.signal(number, handler)
            _use_temp_dir(order.temp_dir)
            if self._method == "spawn":
                assert self._prepared is not None
                for descriptor in (channel.fileno(), stacks_fd):
                    os.set_inheritable(descriptor, True)
                command = spawned.worker_command(channel.fileno(), stacks_fd, self._prepared, order)
                os.execv(command[0], command)  # noqa: S606 - our own command, no shell
            self._drop_descriptors()
            stacks.arm(stacks_fd)
            setproctitle.setproctitle(f"ogpu-service: worker {order.slot}")
            os._exit(run_worker(order, channel))
        except BaseException:  # noqa: BLE001 - seen by the front as this worker's output and death
            traceback.print_exc()
        finally:
            os._exit(70)

    def _drop_descriptors(self) -> None:
        """Close what is the template's: in a worker, the control socket would hide its end."""
        for owned in (self._control, self._selector, self._wakeups, self._wake):
            owned.close()

    # --- burying them

    def _bury(self) -> None:
        """Reap every child that has ended, and kill what dead workers have left."""
        burial = _Burial()
        while self._reap(burial):
            pass
        known = self._sources.union(self._workers, *(b.orphans for b in self._burials))
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

    def _reap(self, burial: _Burial) -> bool:
        """Reap one child that has ended; return False when there is none."""
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        if ended is None:
            return False
        pid = ended.si_pid
        worker = self._workers.pop(pid, None)
        if worker is not None:
            # No such group: it died before setsid(). No permission: it runs as another user.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if worker is not None:
            code = os.waitstatus_to_exitcode(status)
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

    # --- the end

    def _tell(self, message: wire.Message, descriptors: list[int] | None = None) -> None:
        # The front is gone: the next read of the control socket says so, too.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._control, [wire.encode_header(message)], descriptors or [])

    def _shut_down(self) -> None:
        self._selector.unregister(self._control)
        for pid in [*self._workers, *(self._sources & own_children())]:
            self._kill(pid)
        limit = time.monotonic() + _SHUTDOWN_LIMIT_S
        while (self._workers or self._burials) and time.monotonic() < limit:
            self._step(0.1)
            self._bury()
        front_is_there = self._can_tell()
        self._drop_descriptors()
        if self._temp_base is not None and not front_is_there:  # else it does so itself
            shutil.rmtree(self._temp_base, ignore_errors=True)

    def _can_tell(self) -> bool:
        """Tell whether the front still hears: it closes its socket last, or with its death."""
        try:
            ready = wire.TemplateReady(self._method, self._hazard)
            self._control.send(wire.encode_header(ready), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _be_the_first_to_go() -> None:
    """Let the kernel kill this process, and not front or template, when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(
            "500", encoding="ascii"
        )  # proc_pid_oom_score_adj(5)


def _use_temp_dir(temp_dir: str | None) -> None:
    if temp_dir is not None:
        os.environ["TMPDIR"] = temp_dir
        tempfile.tempdir = None  # what it was is remembered, if the source has asked for it


def _be_woken(_: int, __: FrameType | None) -> None:
    """Do nothing: the number has been written to the wake-up descriptor."""
