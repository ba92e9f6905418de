"""How a worker is born: its channel, its output, its stacks, and a fork.

Runs in the template; ``Births.make`` goes on in the new process.

1. Make the channel, the output pipe and the file for the stacks, and fork. The child leads its own
   session, is killed when this process dies, and keeps what its processes lose.
2. Method fork: it is the worker. Method spawn: it executes a fresh interpreter (``spawned.py``).
3. The front's ends of all three, and the worker's pidfd, go to the front with Launched. Where the
   system has no room for one of them, nothing is left of the attempt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import setproctitle

from .. import wire
from ..processes import become_subreaper, die_with_parent
from . import output, spawned, stacks, threads
from .loop import run_worker

SignalHandler = Callable[[int, FrameType | None], Any] | int
Tell = Callable[[wire.Launched, list[int]], None]


class Births:
    """Makes workers.

    Args:
        method: ``fork`` or ``spawn``.
        source: what spawned workers need in order to import the source.
        tell: sends Launched to the front, with the descriptors.
        drop_descriptors: closes, in a worker, what is the template's.
    """

    def __init__(
        self,
        method: str,
        source: spawned.Source,
        tell: Tell,
        drop_descriptors: Callable[[], None],
    ) -> None:
        self._method = method
        self._source = source
        self._tell = tell
        self._drop_descriptors = drop_descriptors
        self._parent = os.getpid()
        if method == "fork":
            threads.find_libraries()  # once, for all of them

    def make(
        self, order: wire.Launch, signal_handlers: Mapping[signal.Signals, SignalHandler]
    ) -> wire.Launched:
        """Make a worker, in which the signals have the handlers that they had for the source.

        Raises:
            OSError: there is no room for it.
        """
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
                self._live(order, signal_handlers, workers_channel, output_write, stacks_fd)
            try:
                pidfd = os.pidfd_open(pid)
                ours.callback(os.close, pidfd)
                launched = wire.Launched(order.slot, order.generation, pid)
                self._tell(launched, [fronts_channel.fileno(), output_read, stacks_fd, pidfd])
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            return launched

    def _live(
        self,
        order: wire.Launch,
        signal_handlers: Mapping[signal.Signals, SignalHandler],
        channel: socket.socket,
        output_fd: int,
        stacks_fd: int,
    ) -> NoReturn:
        """Live as a worker: the new process runs this, and nothing after it."""
        try:
            die_with_parent(self._parent)
            os.setsid()
            become_subreaper()
            output.take_over(output_fd)
            _be_the_first_to_go()
            signal.set_wakeup_fd(-1)
            for number, handler in signal_handlers.items():
                signal.signal(number, handler)
            os.environ.update(order.environment)  # before any import that the source makes here
            _use_temp_dir(order.temp_dir)
            if self._method == "spawn":
                for descriptor in (channel.fileno(), stacks_fd):
                    os.set_inheritable(descriptor, True)
                command = spawned.worker_command(channel.fileno(), stacks_fd, self._source, order)
                os.execv(command[0], command)  # noqa: S606 - our own command, no shell
            self._drop_descriptors()
            stacks.arm(stacks_fd)
            threads.hold_to_share(order.environment)
            setproctitle.setproctitle(f"ogpu-service: worker {order.slot}")
            os._exit(run_worker(order, channel))
        except BaseException:  # noqa: BLE001 - seen by the front as this worker's output and death
            traceback.print_exc()
        finally:
            os._exit(70)


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
