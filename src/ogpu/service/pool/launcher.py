"""The front's side of the template: order workers, hear of their deaths, make another template.

Runs in the front. Launched and Gone arrive in order for each worker; what they mean is the business
of ``lives.py`` and ``deaths.py``. A template is replaced when it has ended, and ended when it has
been stopped (SIGSTOP): nothing would be launched or buried any more. Until it is ready it runs code
of the source, hears nothing, and has no workers; OGPU_INIT_TIMEOUT bounds that.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .. import wire
from ..config import Settings
from ..errors import WireError
from ..handler import get_prepare_handler
from ..logger import logger
from ..processes import kill_child, own_children, state_of
from .evidence import describe_end
from .memory import NOT_ASKED, OutOfMemoryCounter
from .pidfd import ended_within, kill_children, reap, reap_ended

Template = tuple[int, socket.socket]  # its pid, and this side's end of its control socket

# A stopped template is killed when it is seen twice: Ctrl-Z and `fg` stop and continue the front as
# well, and one look may come between the two.
WATCH_EVERY_S = 1.0
_END_LIMIT_S = 5.0
_LOOK_AGAIN_S = 0.005


class LaunchEvents(Protocol):
    """Who wants to know what the template says."""

    def on_launched(self, launched: wire.Launched, descriptors: list[int]) -> None:
        """Take a worker's channel, output, stacks and pidfd, in that order, and own them."""

    def on_launch_failed(self, failed: wire.LaunchFailed) -> None:
        """Take notice that a worker could not be made."""

    def on_gone(self, gone: wire.Gone) -> None:
        """Take notice that a worker and all that it started are gone."""

    def guard(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a callback, and take notice of a defect in it."""

    def on_template_lost(self) -> None:
        """Take notice that the template is gone; its workers die with it."""


class Launcher:
    """Talks to one template at a time.

    Args:
        template: the first one, a child of this process.
        make_template: makes another one.
        settings: what of them a worker has to know.
        sources: the children that the source had in this process before the first template.
    """

    def __init__(
        self,
        template: Template,
        make_template: Callable[[], Template],
        settings: Settings,
        sources: set[int],
    ) -> None:
        self._pid, self._control = template
        # Before the first worker: what is counted from here on may be its death.
        self.memory = OutOfMemoryCounter()
        self._make_template = make_template
        self._sources, self._not_ours = set(sources), set(sources)
        self._settings = settings
        self._events: LaunchEvents | None = None
        self._unsent: deque[bytes] = deque()
        self.method: str | None = None  # how workers are made, once the template is ready
        self._is_up, self.is_ready = True, False
        self.why_unready: str | None = None  # of a template that ended before it was ready
        self._import_timer: asyncio.TimerHandle | None = None
        self._hunted_s = -WATCH_EVERY_S  # when orphans were looked for last

    def launch(
        self, slot: int, generation: int, temp_dir: str | None, environment: dict[str, str]
    ) -> None:
        """Order a worker, with variables of its own.

        May be called before ``listen``: the template works in the meantime.
        """
        order = wire.Launch(
            slot,
            generation,
            self._settings.max_result_bytes,
            self._settings.max_worker_rss_bytes,
            temp_dir,
            self._settings.wanted_log_level,
            environment,
        )
        self._unsent.append(wire.encode_header(order))
        if self._is_up:
            self._send()

    @property
    def may_have_standby(self) -> bool:
        """True while there is a template that takes orders."""
        return self._is_up and self.is_ready

    def order_standby(self, temp_dir: str | None, environment: dict[str, str]) -> None:
        """Have a process wait for the next order, unless one does already."""
        self._unsent.append(wire.encode_header(wire.Standby(temp_dir, environment)))
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
            # Its end is seen by whoever listens; the order is given to the next one.
            logger.error("The template takes no orders: %s", error)
        if loop is not None:
            loop.remove_writer(self._control)

    def listen(self, events: LaunchEvents) -> None:
        """Begin to hear the template, on the running event loop."""
        self._events = events
        self._control.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control, events.guard, self._hear)
        limit_s = self._settings.init_timeout
        if limit_s is not None:
            self._import_timer = loop.call_later(limit_s, self._on_import_timeout, limit_s)

    async def watch(self) -> None:
        """Until cancelled: kill a template that is stopped, and reap what nobody else does.

        A child that is seen twice, while the template lives, is no worker's: as PID 1 of a
        container the front is the parent of all that lost theirs. It is not to be killed.
        """
        before, seen = "R", set[int]()
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if not self._is_up or loop.time() - self._hunted_s < WATCH_EVERY_S:
                before, seen = "R", set()
                continue
            try:
                reap_ended(but=self._sources | {self._pid})
                children, state = own_children() - {self._pid}, state_of(self._pid)
            except OSError as error:
                logger.warning("Nobody can look after the template for now: %s", error)
                continue
            match before, state:
                case "T", "T":
                    logger.error("The template (pid %d) is stopped; killing it", self._pid)
                    self._kill_template()
                case (("Z" | ""), ("Z" | "")):
                    # A child that was stopped before it became a worker holds its socket open.
                    self._on_lost()
                case _, ("Z" | ""):
                    pass  # its socket is about to say so
                case _:
                    self._sources &= children  # the pid of one that is gone may be given again
                    self._not_ours = self._sources | (children & (seen | self._not_ours))
                    seen = children
            before = state

    # --- the end of a template, and the next one

    async def end_template(self, timeout_s: float = _END_LIMIT_S) -> None:
        """Hang up, on which it kills every worker and ends; kill it where it does not.

        This side of the socket stays open until then: so it knows that the front lives.
        """
        if self._is_up:
            self._stop_talking()
            self._control.shutdown(socket.SHUT_WR)
        if not self.is_ready:
            self._kill_template()
        if not await ended_within(self._pid, timeout_s):
            logger.error("The template (pid %d) does not end; killing it", self._pid)
            self._kill_template()
            await ended_within(self._pid, timeout_s)
        code = reap(self._pid)
        if self.why_unready is None and not self.is_ready:
            self.why_unready = self._describe_end(code)
        self._control.close()

    def _describe_end(self, code: int | None) -> str:
        gone = wire.Gone.with_code(0, 0, code)
        was_killed = gone.signal == signal.SIGKILL
        memory = self.memory.explain_death() if was_killed else NOT_ASKED
        return f"the template {describe_end(gone, memory)} before it was ready"

    def start_template(self) -> None:
        """Make another template, which gets the orders that wait.

        Raises:
            OSError: the system has no room for another process, for now.
        """
        assert self._events is not None
        self._pid, self._control = self._make_template()
        self._is_up, self.is_ready = True, False
        self.method = self.why_unready = None
        logger.warning("Another template is being made (pid %d)", self._pid)
        self.listen(self._events)
        self._send()

    def _on_import_timeout(self, limit_s: float) -> None:
        what = "imported the source within OGPU_INIT_TIMEOUT"
        if get_prepare_handler() is not None:
            what = "imported the source and run @prepare within OGPU_INIT_TIMEOUT"
        self.why_unready = f"the template has not {what} ({limit_s:g} s)"
        logger.error("The template (pid %d) has not %s; killing it", self._pid, what)
        self._kill_template()

    def _kill_template(self) -> None:
        try:
            kill_child(self._pid)
        except PermissionError as error:  # the source has changed its user
            logger.error("The template (pid %d) cannot be killed: %s", self._pid, error)

    def kill_orphans(self, but: set[int]) -> set[int]:
        """Kill what workers have left, where their template is dead; return what is left still.

        It all has come to the front, a subreaper as well. What the source itself started in this
        process, before start(), is not ours to end; nor is what was here while the template lived.
        """
        self._hunted_s = asyncio.get_running_loop().time()
        return kill_children(self._not_ours | {self._pid} | but)

    async def shut_down(self, timeout_s: float) -> None:
        """End the template, its workers and whatever they left; for good."""
        await self.end_template(timeout_s)
        loop = asyncio.get_running_loop()
        limit = loop.time() + timeout_s
        while left := self.kill_orphans(set()):
            if loop.time() > limit:
                logger.error("These processes cannot be killed: %s", sorted(left))
                return
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _stop_talking(self) -> None:
        loop = asyncio.get_running_loop()
        self._is_up = False
        self._unsent.clear()
        self._stop_import_timer()
        loop.remove_reader(self._control)
        loop.remove_writer(self._control)

    def _stop_import_timer(self) -> None:
        if self._import_timer is not None:
            self._import_timer.cancel()
            self._import_timer = None

    # --- what it says

    def _hear(self) -> None:
        assert self._events is not None
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, wire.MAX_PACKET_BYTES, 4)
        except BlockingIOError:
            return
        except ConnectionResetError:
            # It died with orders unread, which the kernel says before what it has sent itself; and
            # libuv does not call a reader again after an error.
            while self._is_up:
                self._hear()
            return
        if not packet:
            self._on_lost()
            return
        for descriptor in descriptors:
            # Not for the next template. CPython's recv_fds drops MSG_CMSG_CLOEXEC (up to 3.13).
            os.set_inheritable(descriptor, False)
        self._take(wire.decode_header(packet), descriptors)

    def _take(self, message: wire.Message, descriptors: list[int]) -> None:
        assert self._events is not None
        match message:
            case wire.TemplateReady():
                self._on_ready(message)
            case wire.PrepareFailed():
                logger.error("@prepare failed:\n%s", message.traceback.rstrip())
                self.why_unready = f"its @prepare failed:\n{message.traceback.rstrip()}"
            case wire.Launched():
                self._events.on_launched(message, descriptors)
            case wire.StandbyLost():
                logger.warning(
                    "The standby is lost; the next worker starts afresh: %s", message.why
                )
            case wire.LaunchFailed():
                self._events.on_launch_failed(message)
            case wire.Gone():
                self._events.on_gone(message)
            case _:
                raise WireError(f"a template does not say {message}")

    def _on_lost(self) -> None:
        assert self._events is not None
        self._stop_talking()
        self._events.on_template_lost()

    def _on_ready(self, ready: wire.TemplateReady) -> None:
        self._stop_import_timer()
        self.is_ready, self.method = True, ready.method
        if ready.hazard is not None and ready.method == "spawn":
            logger.warning("Workers are spawned, since a fork is not safe: %s", ready.hazard)
        elif ready.hazard is not None:
            logger.warning(
                "Workers are forked (OGPU_START_METHOD), though that is not safe: %s", ready.hazard
            )
        logger.info("Workers are made by %s (template: pid %d)", ready.method, self._pid)
