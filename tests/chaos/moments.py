"""How each fault is played at each moment: one function for each moment, one for each strike.

A moment is made, not waited for: a process that is to be caught in the middle of something is
stopped there (the worker before it reads its order, the front before it reads the answer), the
fault comes, and it goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime

from support.processes import is_gone, open_descriptors
from support.waiting import wait_until

from .faults import Inside, Moment, Outside, Row
from .stage import Client, Stage, is_stopped, stop

# More than the channel, its buffers in the front and a pipe can hold, so a part of it waits.
LARGE_BYTES = 3 * 2**20


@dataclass
class Play:
    """One row being played; ``innocents`` begins the load beside it."""

    stage: Stage
    row: Row
    address: str
    begin_innocents: Callable[[], None]
    clients: ExitStack
    guilty: list[str] = field(default_factory=list)
    client: Client | None = None

    # --- what all moments need

    @property
    def is_inside(self) -> bool:
        return isinstance(self.row.fault, Inside)

    def post(self, moment: str, *, fault: str | None = None, size_bytes: int = 0) -> None:
        """Send the guilty task, and keep its client."""
        wanted = fault or (self.row.fault.value if self.is_inside else "waits")
        body = {"text": self.address, "fault": wanted, "moment": moment, "size_bytes": size_bytes}
        path = f"/run/{self.row.function}/{self.address}"
        leaves = self.row.fault is Outside.CLIENT_LEAVES
        self.client = self._send("POST", path, body, "prefer: wait=60\r\n" if leaves else "")
        if not leaves:
            assert self.client.read_status() == 202
        self.guilty.append(self.address)

    def wait_running(self) -> int:
        """Wait until the guilty task runs, and return the pid of its worker."""

        def pid() -> int | None:
            response = self.stage.server.http.get(f"/tasks/{self.address}")
            worker = response.json().get("worker") if response.status_code == 200 else None
            return worker and worker["pid"]

        return wait_until(pid, f"{self.address} runs") or 0

    def deadline(self) -> float:
        text = self.stage.server.task(self.address)["deadline"]
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()

    def cancel(self) -> None:
        self._send("DELETE", f"/tasks/{self.address}")

    def _send(self, *request: object) -> Client:
        return self.clients.enter_context(self.stage.send_raw(*request))  # type: ignore[arg-type]

    # --- strikes: what others do

    def strike(self, pid: int) -> None:
        """Do what the row's fault says; ``pid``: the worker that it is for."""
        fault, stage = self.row.fault, self.stage
        if fault is Outside.SIGSTOP:
            stop(pid)
        elif fault in SIGNALS:
            os.kill(pid, SIGNALS[fault])
        elif fault is Outside.TEMPLATE_SIGKILL:
            os.kill(stage.template, signal.SIGKILL)
        elif fault is Outside.TEMPLATE_SIGSTOP:
            stop(stage.template)
        elif fault is Outside.CANCEL:
            self.cancel()
        elif fault is Outside.CLIENT_LEAVES:
            self._leave()
        elif fault is Outside.RECEIVER_RESETS:
            stage.sink.answers = [0, 0, 200]
        elif fault is Outside.FRONT_PAUSED:
            over = self.deadline()
            with stage.paused(stage.front.pid):
                wait_until(lambda: time.time() > over, "the deadline is over")
        else:
            raise AssertionError(f"nobody knows how to strike with {fault}")

    def _leave(self) -> None:
        if self.client is None:  # nothing was asked: in the middle of a request, then
            self.client = self._send("POST", f"/run/act/{self.address}", {}, "x-half: ")
        self.client.close()


SIGNALS = {
    Outside.SIGKILL: signal.SIGKILL,
    Outside.SIGSEGV: signal.SIGSEGV,
    Outside.SIGABRT: signal.SIGABRT,
    Outside.SIGTERM: signal.SIGTERM,
}
# An idle worker shows none of these (who is blocked in recv(2) on a socket that another thread
# closes goes on reading): only the next task finds out.
_UNNOTICED = (Outside.SIGSTOP, Inside.SIGSTOP, Inside.CLOSE_ALL)
# Nobody is dead after these, so there is a mark to wait for.
_RETURNING = (
    Inside.FORGE, Inside.FLOOD, Inside.CLOSE_OUTPUT, Inside.DESCRIPTORS, Inside.MEMORY,
    Inside.KILL_SIBLING, Inside.KILL_TEMPLATE, Inside.STOP_TEMPLATE, *_UNNOTICED,
)  # fmt: skip
# After these a stopped worker is not to go on.
_LASTING = (Outside.SIGSTOP, Outside.CANCEL, Outside.FRONT_PAUSED)


def idle(play: Play) -> None:
    """Slot 0 is given the next task, so it is the one to strike."""
    stage, fault = play.stage, play.row.fault
    if play.is_inside:
        carrier = f"{play.address}-carrier"
        body = {"text": carrier, "fault": fault.value, "moment": "idle"}
        task = stage.server.run("act", carrier, body)
        assert task["state"] == "succeeded", task
        pid = task["worker"]["pid"]
        stage.tell_go(carrier)
        if fault in _RETURNING:
            wait_until(lambda: has_happened(play, carrier, pid), f"{fault} has happened")
        else:
            stage.wait_replaced(pid)
    else:
        play.strike(stage.pool()[0]["pid"])
    if fault in _UNNOTICED:
        play.post("in_handler", fault="nothing")
    play.begin_innocents()


def in_init(play: Play) -> None:
    """The next worker of slot 0 takes the fault; the other slot has the innocent tasks."""
    stage = play.stage
    # A worker that was of use is replaced at once, so no row waits for the back-off of another.
    stage.server.run("echo", f"{play.address}-useful")
    for mark in stage.place.glob("init.*"):
        mark.unlink()
    fault = play.row.fault.value if play.is_inside else "waits"
    (stage.place / "init" / fault).touch()
    os.kill(stage.pool()[0]["pid"], signal.SIGKILL)
    acting = stage.mark("init", "acting")
    pid = wait_until(lambda: acting.exists() and acting.read_text(), "@init acts")
    play.begin_innocents()
    if not play.is_inside:
        play.strike(int(pid))
        stage.tell_go("init")


def at_dispatch(play: Play) -> None:
    """The worker is stopped, so that the order lies unread in its channel."""
    pid = play.stage.pool()[0]["pid"]
    stop(pid)
    play.post("in_handler", fault="nothing")
    assert play.wait_running() == pid
    play.begin_innocents()
    play.strike(pid)
    if play.row.fault not in _LASTING:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def in_handler(play: Play) -> None:
    play.begin_innocents()
    play.post("in_handler")
    if not play.is_inside:
        play.stage.wait_mark(play.address, "acting")
        play.strike(play.wait_running())
        # Told to go on as the front does, the handler might answer before that sees the deadline.
        if play.row.fault not in (Outside.CANCEL, Outside.FRONT_PAUSED):
            play.stage.tell_go(play.address)


def while_answering(play: Play) -> None:
    """The front is stopped, so that the answer lies in the channel, as much of it as fits."""
    stage, address = play.stage, play.address
    play.post("while_answering", size_bytes=LARGE_BYTES)
    pid = play.wait_running()
    stage.wait_mark(address, "waiting")
    play.begin_innocents()
    with stage.paused(stage.front.pid):
        stage.tell_go(address)
        stage.wait_mark(address, "acting")
        if play.is_inside:
            wait_until(lambda: has_happened(play, address, pid), f"{play.row.fault} has happened")
        else:
            play.strike(pid)


def while_dying(play: Play) -> None:
    """The front is stopped; when it goes on, a cancel, the deadline and the fault are there."""
    stage, address = play.stage, play.address
    play.post("when_told")
    pid = play.wait_running()
    stage.wait_mark(address, "waiting")
    play.begin_innocents()
    if play.row.fault is Outside.TEMPLATE_PAUSED:
        with stage.paused(stage.template):
            play.cancel()
            stage.wait_end(address)
        return
    over = play.deadline()
    with stage.paused(stage.front.pid):
        play.cancel()
        if play.is_inside:
            stage.tell_go(address)
            wait_until(lambda: has_happened(play, address, pid), f"{play.row.fault} has happened")
        else:
            play.strike(pid)
        wait_until(lambda: time.time() > over, "the deadline is over")


def has_happened(play: Play, address: str, pid: int) -> bool:
    """Tell whether an inside fault shows; of a hang there is no more than its beginning."""
    if not play.stage.mark(address, "acting").exists():
        return False
    if play.row.fault in _QUIET or play.stage.mark(address, "acted").exists():
        return True
    return is_gone(pid) or is_stopped(pid) or open_descriptors(pid) <= _DESCRIPTORS_KEPT


# Of those below 1024 everything is closed; the worker has one above.
_DESCRIPTORS_KEPT = 1
# They neither end nor return, or wait for room in a channel that nobody reads.
_QUIET = (
    Inside.HANG_WITH_GIL, Inside.HANG_DEAF, Inside.FAMILY, Inside.FORK_FIFTY, Inside.GARBAGE,
    Inside.ANNOUNCE_4_GIB, Inside.DIE_IN_FRAME, Inside.FLOOD, Inside.FORGE,
)  # fmt: skip

PLAYS: dict[Moment, Callable[[Play], None]] = {
    Moment.IDLE: idle,
    Moment.IN_INIT: in_init,
    Moment.AT_DISPATCH: at_dispatch,
    Moment.IN_HANDLER: in_handler,
    Moment.WHILE_ANSWERING: while_answering,
    Moment.WHILE_DYING: while_dying,
}
