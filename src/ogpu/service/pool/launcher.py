"""The front's side of the template: order workers, hear of their deaths.

Runs in the front. Launched and Gone arrive in order for each worker; what they mean is the
supervisor's business.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Protocol

from .. import wire
from ..config import Settings
from ..errors import WireError
from ..logger import logger


class LaunchEvents(Protocol):
    """Who wants to know what the template says."""

    def on_launched(self, launched: wire.Launched, descriptors: list[int]) -> None:
        """Take a worker's channel, output and pidfd, in that order, and own them."""

    def on_launch_failed(self, failed: wire.LaunchFailed) -> None:
        """Take notice that a worker could not be made."""

    def on_gone(self, gone: wire.Gone) -> None:
        """Take notice that a worker and all that it started are gone."""

    def on_template_lost(self) -> None:
        """Take notice that the template is gone; its workers die with it."""


class Launcher:
    """Talks to one template.

    Args:
        pid: the template, a child of this process.
        control: this side's end of its control socket.
        method: ``fork`` or ``spawn``, how workers are to be made.
        settings: what of them a worker has to know.
    """

    def __init__(self, pid: int, control: socket.socket, method: str, settings: Settings) -> None:
        self.method = method
        self._pid = pid
        self._control = control
        self._settings = settings
        self._may_spin = len(os.sched_getaffinity(0)) > settings.slots
        self._events: LaunchEvents | None = None

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
        try:
            self._control.send(wire.encode_header(order))
        except OSError as error:
            # The template's end is seen by whoever listens; there is nobody else to ask.
            logger.error("The template takes no orders: %s", error)

    def listen(self, events: LaunchEvents) -> None:
        """Begin to hear the template, on the running event loop."""
        self._events = events
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control, self._hear)

    async def shut_down(self, timeout_s: float) -> None:
        """Have the template kill every worker and end; kill it where it does not."""
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        if not await _ends_within(self._pid, timeout_s):
            logger.error("The template (pid %d) does not end; killing it", self._pid)
            os.kill(self._pid, signal.SIGKILL)  # our child, not waited for: the pid is its own
            await _ends_within(self._pid, timeout_s)

    def _hear(self) -> None:
        assert self._events is not None
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, wire.MAX_PACKET_BYTES, 3)
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
    os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it has ended: this only reaps it
    return True
