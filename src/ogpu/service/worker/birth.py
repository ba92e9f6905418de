"""How a worker is born: its channel, its output, its stacks, and a fork.

Runs in the template; ``_live`` goes on in the new process.

1. Make the channel, the output pipe and the file for the stacks, and fork. The child leads its own
   session, is killed when this process dies, and keeps what its processes lose.
2. Method fork: it is the worker. Method spawn: it executes a fresh interpreter (``spawned.py``).
3. The front's ends of all three, and the worker's pidfd, go to the front with Launched. Where the
   system has no room for one of them, nothing is left of the attempt.

A standby is born likewise, before it is needed, and its ends are kept here: it imports the source,
where it was not forked from a process that had, and waits at its channel. With the next Launch,
that order is written there, and 3. follows: a fork, and what a new process has to do before it can
take an order, are not waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import setproctitle

from .. import wire
from ..errors import WireError
from ..processes import become_subreaper, die_with_parent, state_of
from . import output, spawned, stacks, threads
from .loop import run_worker

SignalHandler = Callable[[int, FrameType | None], Any] | int
Tell = Callable[[wire.Launched, list[int]], None]

_STANDBY_PIPE_BYTES = 1024 * 1024  # what anybody may have (pipe-max-size in pipe(7))


@dataclass(frozen=True)
class _Newborn:
    """A process that was just made, and this side's ends of what it has; closed with ``ends``."""

    pid: int
    channel: socket.socket
    output_fd: int
    stacks_fd: int
    pidfd: int
    ends: ExitStack

    def kill(self) -> None:
        """Kill it. It is a child that was not reaped, so that its pid is its own."""
        os.kill(self.pid, signal.SIGKILL)


class Births:
    """Makes workers.

    Args:
        method: ``fork`` or ``spawn``.
        source: what spawned workers need in order to import the source.
        tell: sends Launched to the front, with the descriptors.
        drop_descriptors: closes, in a worker, what is the template's.
    """

    def __init__(
        self, method: str, source: spawned.Source, tell: Tell, drop_descriptors: Callable[[], None]
    ) -> None:
        self.signal_handlers: Mapping[signal.Signals, SignalHandler] = {}  # those of the source
        self._method = method
        self._source = source
        self._tell = tell
        self._drop_descriptors = drop_descriptors
        self._parent = os.getpid()
        if method == "fork":
            threads.find_libraries()  # once, for all of them
        self._standby: _Newborn | None = None

    def make(self, order: wire.Launch) -> wire.Launched:
        """Make a worker.

        Raises:
            OSError: there is no room for it.
        """
        standby = self._take_standby(order)
        newborn = standby or self._fork(order)
        launched = wire.Launched(
            order.slot, order.generation, newborn.pid, was_standby=standby is not None
        )
        with newborn.ends:
            descriptors = (newborn.output_fd, newborn.stacks_fd, newborn.pidfd)
            try:
                self._tell(launched, [newborn.channel.fileno(), *descriptors])
            except OSError:
                newborn.kill()
                if standby is None:  # the standby is buried as any that has ended
                    os.waitpid(newborn.pid, 0)
                raise
        return launched

    # --- the standby

    def make_standby(self, order: wire.Standby) -> int | None:
        """Make a standby where there is none; return its pid.

        Raises:
            OSError: there is no room for it.
        """
        if self._standby is not None:
            return None
        self._standby = self._fork(order)
        if self._method == "spawn":
            # Nobody reads what an import prints, until it is needed: a full pipe would have it
            # wait.
            with contextlib.suppress(OSError):  # more than pipe-user-pages-soft, pipe(7)
                fcntl.fcntl(self._standby.output_fd, fcntl.F_SETPIPE_SZ, _STANDBY_PIPE_BYTES)
        return self._standby.pid

    def bury_standby(self, pid: int, code: int) -> str:
        """Forget a standby that has ended, and return how it did."""
        how = f"it was ended by signal {-code}" if code < 0 else f"it exited with code {code}"
        standby = self._standby
        if standby is None or standby.pid != pid:
            return "it was stopped, or ending, when it was needed"
        self._standby = None
        with standby.ends:
            return _last_words(standby.channel) or how

    def _take_standby(self, order: wire.Launch) -> _Newborn | None:
        """Let the standby have an order, whether it has imported the source already or not.

        None: there is none, or it is stopped, or ending.
        """
        standby, self._standby = self._standby, None
        if standby is None:
            return None
        try:
            if state_of(standby.pid) in ("R", "S", "D"):  # proc_pid_stat(5)
                standby.channel.sendall(wire.encode_frame(order))
                return standby
        except OSError:  # it has closed its channel
            pass
        standby.kill()
        standby.ends.close()
        return None

    # --- a new process

    def _fork(self, order: wire.Launch | wire.Standby) -> _Newborn:
        with ExitStack() as ours:  # what is made here is closed here, in this process
            fronts_channel, workers_channel = socket.socketpair()
            ours.enter_context(fronts_channel)
            output_read, output_write = os.pipe()
            ours.callback(os.close, output_read)
            stacks_fd = stacks.make_file()
            ours.callback(os.close, stacks_fd)
            with workers_channel:
                pid = os.fork()
                if pid == 0:
                    # Held open here, it would keep the worker from seeing the front's end close.
                    fronts_channel.close()
                    os.close(output_read)
                    self._live(order, workers_channel, output_write, stacks_fd)
            os.close(output_write)
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            ours.callback(os.close, pidfd)
            return _Newborn(pid, fronts_channel, output_read, stacks_fd, pidfd, ours.pop_all())

    def _live(
        self,
        order: wire.Launch | wire.Standby,
        channel: socket.socket,
        output_fd: int,
        stacks_fd: int,
    ) -> NoReturn:
        """Live as a worker, or as the standby: the new process runs this, and nothing after it."""
        try:
            die_with_parent(self._parent)
            os.setsid()
            become_subreaper()
            output.take_over(output_fd)
            _be_the_first_to_go()
            signal.set_wakeup_fd(-1)
            for number, handler in self.signal_handlers.items():
                signal.signal(number, handler)
            if self._method == "spawn":
                use_surroundings(order)
                for descriptor in (channel.fileno(), stacks_fd):
                    os.set_inheritable(descriptor, True)
                command = spawned.worker_command(channel.fileno(), stacks_fd, self._source, order)
                os.execv(command[0], command)  # noqa: S606 - our own command, no shell
            self._drop_descriptors()
            stacks.arm(stacks_fd)
            threads.hold_to_share(order.environment)  # which is the same for every slot
            if isinstance(order, wire.Standby):
                from .rehearsal import rehearse  # noqa: PLC0415 - its model takes a start 1 ms

                setproctitle.setproctitle("ogpu-service: standby")
                rehearse()
                order = spawned.wait_for_launch(channel)
            use_surroundings(order)
            setproctitle.setproctitle(f"ogpu-service: worker {order.slot}")
            os._exit(run_worker(order, channel))
        except BaseException:  # noqa: BLE001 - seen by the front as this worker's output and death
            traceback.print_exc()
        finally:
            os._exit(70)


def use_surroundings(order: wire.Launch | wire.Standby) -> None:
    """Use what an order gives to a process: variables, and a folder for temporary files."""
    os.environ.update(order.environment)  # before any import that the source makes here
    if order.temp_dir is not None:
        os.environ["TMPDIR"] = order.temp_dir
        tempfile.tempdir = None  # what it was is remembered, if the source has asked for it


def _last_words(channel: socket.socket) -> str | None:
    """Return why a standby could not import the source, or prepare it, if it has said so."""
    with contextlib.suppress(OSError, WireError):
        said = channel.recv(wire.MAX_HEADER_BYTES, socket.MSG_DONTWAIT)
        for message, _ in wire.FrameDecoder(0).feed(said):
            if isinstance(message, wire.InitFailed):
                return message.traceback[-wire.MAX_PACKET_TEXT_CHARS :].rstrip()
    return None


def _be_the_first_to_go() -> None:
    """Let the kernel kill this process, and not front or template, when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(
            "500", encoding="ascii"
        )  # proc_pid_oom_score_adj(5)
