"""The template: a single-threaded process that makes workers, buries them, and runs nothing else.

Runs as a child of the front: forked from it at start(), or as a fresh interpreter where a fork is
not safe. Every worker is its child, whichever way it was made.

1. Launch arrives: make the channel and the output pipe, fork; the child leads its own session and
   becomes the worker (method fork) or executes a fresh interpreter (method spawn). The front's
   ends and the worker's pidfd go to the front with Launched.
2. A worker's pidfd becomes readable: it is dead, but not reaped, so its pid is still its own. Kill
   its process group, reap it, then kill every orphan. Workers are subreapers: what a worker's
   process tree loses stays below that worker while it lives, and comes here when it dies. So any
   child here that is not a living worker is what a dead one has left, however it tried to escape
   (setsid, double fork, another environment).
3. Nothing is left: say Gone. A process that SIGKILL cannot end keeps its worker from being Gone.
4. The control socket ends: the front is dead or done. Kill all, wait (bounded), exit.

If the template itself is killed, the kernel kills the workers (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import setproctitle

from .. import wire
from ..errors import WireError
from ..processes import become_subreaper, die_with_parent, own_children
from . import output, spawned
from .loop import run_worker

SignalHandler = Callable[[int, FrameType | None], Any] | int

# Ctrl-C reaches the whole foreground group; only the front acts on it, and ends this process.
_FRONTS_SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
        Template(templates_end, prepared=None).serve()
    except BaseException:  # noqa: BLE001 - this process must not return into the source's code
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def exec_template() -> tuple[int, socket.socket]:
    """Start the template as a fresh interpreter, which imports no source; safe with any threads.

    Returns the template's pid and the front's end of the control socket.
    """
    fronts_end, templates_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with templates_end:
        templates_end.set_inheritable(True)
        command = spawned.template_command(templates_end.fileno())
        return os.posix_spawn(command[0], command, os.environ), fronts_end


@dataclass(frozen=True)
class _Worker:
    slot: int
    generation: int
    pid: int


class Template:
    """The template's loop; ``prepared`` is what spawned workers need in order to import."""

    def __init__(self, control: socket.socket, prepared: str | None) -> None:
        self._control = control
        self._prepared = prepared
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}  # by pidfd
        self._orphans: dict[int, int] = {}  # pidfd: pid
        self._dead: list[wire.Gone] = []  # reaped; Gone is said when no orphan is left
        self._signal_handlers: dict[signal.Signals, SignalHandler] = {}

    def serve(self) -> None:
        """Work until the front is gone."""
        become_subreaper()
        for number in _FRONTS_SIGNALS:
            self._signal_handlers[number] = signal.signal(number, signal.SIG_IGN) or signal.SIG_DFL
        setproctitle.setproctitle("ogpu-service: template")
        # Objects that exist now are shared with every worker; a collection would write to them all.
        gc.freeze()
        self._selector.register(self._control, selectors.EVENT_READ)
        while self._step(None):
            pass
        self._shut_down()

    def _step(self, timeout_s: float | None) -> bool:
        """Handle what has happened; return False when the front is gone."""
        front_is_there = True
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._control:
                front_is_there = self._obey()
            elif key.fd in self._workers:
                self._bury_worker(key.fd)
            elif key.fd in self._orphans:
                self._bury_orphan(key.fd)
        return front_is_there

    def _obey(self) -> bool:
        packet = self._control.recv(wire.MAX_PACKET_BYTES)
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
        fronts_channel, workers_channel = socket.socketpair()
        output_read, output_write = os.pipe()
        try:
            pid = os.fork()
            if pid == 0:
                # Held open here, it would keep the worker from ever seeing the front's end close.
                fronts_channel.close()
                os.close(output_read)
                self._become_worker(order, workers_channel, output_write)
            pidfd = os.pidfd_open(pid)
            self._workers[pidfd] = _Worker(order.slot, order.generation, pid)
            self._selector.register(pidfd, selectors.EVENT_READ)
            launched = wire.Launched(order.slot, order.generation, pid)
            self._tell(launched, [fronts_channel.fileno(), output_read, pidfd])
        finally:
            fronts_channel.close()
            workers_channel.close()
            os.close(output_read)
            os.close(output_write)

    def _become_worker(
        self, order: wire.Launch, channel: socket.socket, output_fd: int
    ) -> NoReturn:
        """Live as a worker: the new process runs this, and nothing after it."""
        try:
            die_with_parent(self._pid)
            os.setsid()
            become_subreaper()
            output.take_over(output_fd)
            for number, handler in self._signal_handlers.items():
                signal.signal(number, handler)
            if order.method == "spawn":
                assert self._prepared is not None
                os.set_inheritable(channel.fileno(), True)
                command = spawned.worker_command(channel.fileno(), self._prepared, order)
                os.execv(command[0], command)  # noqa: S606 - our own command, no shell
            self._drop_descriptors()
            setproctitle.setproctitle(f"ogpu-service: worker {order.slot}")
            os._exit(run_worker(order, channel))
        except BaseException:  # noqa: BLE001 - seen by the front as this worker's output and death
            traceback.print_exc()
        finally:
            os._exit(70)

    def _drop_descriptors(self) -> None:
        """Close what is the template's: in a worker, the control socket would hide its end."""
        self._control.close()
        self._selector.close()
        for pidfd in (*self._workers, *self._orphans):
            os.close(pidfd)

    # --- burying them

    def _bury_worker(self, pidfd: int) -> None:
        worker = self._workers.pop(pidfd)
        # No such group: it died before setsid(). No permission: what is left runs as another user.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        self._forget(pidfd)
        _, status = os.waitpid(worker.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._dead.append(
            wire.Gone(
                worker.slot,
                worker.generation,
                exit_code=code if code >= 0 else None,
                signal=-code if code < 0 else None,
            )
        )
        self._kill_orphans()

    def _bury_orphan(self, pidfd: int) -> None:
        pid = self._orphans.pop(pidfd)
        self._forget(pidfd)
        os.waitpid(pid, 0)
        self._kill_orphans()  # its own children have come here by now

    def _kill_orphans(self) -> None:
        known = {worker.pid for worker in self._workers.values()} | set(self._orphans.values())
        for pid in own_children() - known:
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except PermissionError as error:  # it runs as another user: Gone waits for its own end
                sys.stderr.write(f"cannot kill process {pid}, left by a worker: {error}\n")
            self._orphans[pidfd] = pid
            self._selector.register(pidfd, selectors.EVENT_READ)
        if not self._orphans:
            for gone in self._dead:
                self._tell(gone)
            self._dead.clear()

    def _forget(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)

    # --- the end

    def _tell(self, message: wire.Message, descriptors: list[int] | None = None) -> None:
        try:
            socket.send_fds(self._control, [wire.encode_header(message)], descriptors or [])
        except OSError as error:
            # The front is gone: the next read of the control socket says so too. A launch must
            # not go on in that case, and its worker is found among ours when we shut down.
            if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
                raise

    def _shut_down(self) -> None:
        self._selector.unregister(self._control)
        for pidfd in self._workers:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        limit = time.monotonic() + _SHUTDOWN_LIMIT_S
        while (self._workers or self._orphans) and time.monotonic() < limit:
            self._step(0.1)
