"""The front's side of the template: order workers, hear of their deaths.

Runs in the front. Launched and Gone arrive in order for each worker; what they mean is the
supervisor's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .. import wire
from ..config import Settings
from ..errors import WireError
from ..logger import logger
from ..processes import kill_child, own_children


class LaunchEvents(Protocol):
    """Who wants to know what the template says."""

    def on_launched(self, launched: wire.Launched, descriptors: list[int]) -> None:
        """Take a worker's channel, output and pidfd, in that order, and own them."""

    def on_launch_failed(self, failed: wire.LaunchFailed) -> None:
        """Take notice that a worker could not be made."""

    def on_gone(self, gone: wire.Gone) -> None:
        """Take notice that a worker and all that it started are gone."""

    def guard(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a callback, and take notice of a defect in it."""

    def on_template_lost(self) -> None:
        """Take notice that the template is gone; its workers die with it."""


class Launcher:
    """Talks to one template.

    Args:
        pid: the template, a child of this process.
        control: this side's end of its control socket.
        method: ``fork`` or ``spawn``, how workers are to be made.
        settings: what of them a worker has to know.
        not_ours: the children that this process had before the template.
    """

    def __init__(
        self,
        pid: int,
        control: socket.socket,
        method: str,
        settings: Settings,
        not_ours: set[int],
    ) -> None:
        self.method = method
        self._pid = pid
        self._not_ours = not_ours
        self._control = control
        self._settings = settings
        self._may_spin = len(os.sched_getaffinity(0)) > settings.slots
        self._events: LaunchEvents | None = None
        self._unsent: deque[bytes] = deque()

    def launch(self, slot: int, generation: int) -> None:
        """Order a worker. May be called before ``listen``: the template works in the meantime."""
        order = wire.Launch(
            slot,
            generation,
            self.method,
            self._settings.max_result_bytes,
            self._settings.log_level,
            self._may_spin,
        )
        self._unsent.append(wire.encode_header(order))
        self._send()

    def _send(self) -> None:
        """Send the orders that wait, as many as the socket takes; the rest when it takes more."""
        loop = None if self._events is None else asyncio.get_running_loop()
        try:
            while self._unsent:
                self._control.send(self._unsent[0])
                self._unsent.popleft()
        except BlockingIOError:
            assert loop is not None  # it blocks until there is a loop to wait on
            loop.add_writer(self._control, self._send)
            return
        except OSError as error:
            # The template's end is seen by whoever listens; there is nobody else to ask.
            logger.error("The template takes no orders: %s", error)
        if loop is not None:
            loop.remove_writer(self._control)

    def listen(self, events: LaunchEvents) -> None:
        """Begin to hear the template, on the running event loop."""
        self._events = events
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control, events.guard, self._hear)

    async def shut_down(self, timeout_s: float) -> None:
        """Have the template kill every worker and end; kill it where it does not."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._control)
        loop.remove_writer(self._control)
        self._control.close()
        if not await _ends_within(self._pid, timeout_s):
            logger.error("The template (pid %d) does not end; killing it", self._pid)
            kill_child(self._pid)
            await _ends_within(self._pid, timeout_s)
        await self._kill_orphans(timeout_s)

    async def _kill_orphans(self, timeout_s: float) -> None:
        """Kill what workers have left, where the template could not: it all has come to us.

        The front is a subreaper as well. What the source itself started in this process, before
        start(), is not ours to end.
        """
        loop = asyncio.get_running_loop()
        limit = loop.time() + timeout_s
        while orphans := own_children() - self._not_ours - {self._pid}:
            for pid in orphans:
                with contextlib.suppress(PermissionError):  # it runs as another user
                    kill_child(pid)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it does not wait
            if loop.time() > limit:
                logger.error("These processes cannot be killed: %s", sorted(orphans))
                return
            await asyncio.sleep(0.005)

    def _hear(self) -> None:
        assert self._events is not None
        try:
            packet, descriptors, _, _ = socket.recv_fds(
                self._control, wire.MAX_PACKET_BYTES, 3, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except ConnectionResetError:
            packet, descriptors = b"", []
        if not packet:
            asyncio.get_running_loop().remove_reader(self._control)
            self._events.on_template_lost()
            return
        message = wire.decode_header(packet)
        match message:
            case wire.Launched():
                self._events.on_launched(message, descriptors)
            case wire.LaunchFailed():
                self._events.on_launch_failed(message)
            case wire.Gone():
                self._events.on_gone(message)
            case _:
                raise WireError(f"a template does not say {message}")


async def _ends_within(pid: int, timeout_s: float) -> bool:
    """Wait until a child of this process has ended, and reap it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def on_readable() -> None:
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(pidfd, on_readable)
    try:
        await asyncio.wait([ended], timeout=timeout_s)
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    if not ended.done():
        return False
    with contextlib.suppress(ChildProcessError):  # the source ignores SIGCHLD
        os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it has ended: this only reaps it
    return True
