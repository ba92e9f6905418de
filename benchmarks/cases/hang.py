"""One hung handler: what its client is told, whether the work ends, when the next task is done.

1. A task makes the handler hang; the handler writes down which thread hangs since when. The
   deadline is that moment plus the timeout, for every peer.
2. At once another client asks for a good result, and asks again whenever it is refused, or has
   heard nothing for 2 s.
3. A pidfd on the hung process, and its list of threads, say when the work is gone: the process has
   ended, its thread has, or the handler was interrupted. The same for a process that it started.
4. What has not come by then is waited for so long: 5 s for the work, 8 s for the rest.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..candidate import Answer, Candidate
from ..harness import BenchmarkError

GONE_LIMIT_S = 5.0
NEXT_LIMIT_S = 8.0
_BEGIN_LIMIT_S = 60.0
_POLL_S = 0.005
_AGAIN_S = 0.002
_PATIENCE_S = 2.0
_EARLY_S = 0.02
_NEXT = {"text": "next"}


@dataclass(frozen=True)
class Hang:
    """What followed one hung handler, in milliseconds after its deadline; None: it never came."""

    told: str | None
    told_ms: float | None
    gone_ms: float | None
    child_gone_ms: float | None
    has_child: bool
    next_ms: float | None

    @property
    def is_over(self) -> bool:
        """Whether all has come but the end of a grandchild, which the harness sees to."""
        return None not in (self.told_ms, self.gone_ms, self.next_ms)


class _Asking(threading.Thread):
    """A client: asks once, or until it has the output that it wants."""

    def __init__(self, candidate: Candidate, text: str, limit_s: float, *, again: bool) -> None:
        super().__init__(daemon=True)
        self._candidate = candidate
        self._text = text
        self._until = time.monotonic() + limit_s
        self._again = again
        self.answer: Answer | None = None
        self.start()

    def run(self) -> None:
        while (left_s := self._until - time.monotonic()) > 0:
            try:
                patience_s = min(left_s, _PATIENCE_S) if self._again else left_s
                answer = self._candidate.exchange({"text": self._text}, patience_s)
            except (OSError, http.client.HTTPException) as error:
                answer = Answer(time.time(), None, f"connection cut ({type(error).__name__})")
            if answer is None:
                continue
            if not self._again or answer.output == {"text": self._text}:
                self.answer = answer
                return
            time.sleep(_AGAIN_S)


def hang_once(candidate: Candidate, kind: str, mark: Path, timeout_s: float) -> Hang:
    """Have the handler hang, and see what comes of it.

    Raises:
        BenchmarkError: it did not begin.
    """
    for path in (mark, mark.with_suffix(".ended"), mark.with_suffix(".child")):
        path.unlink(missing_ok=True)
    limit_s = timeout_s + NEXT_LIMIT_S
    hung, who = _begun(candidate, kind, mark, limit_s)
    following = _Asking(candidate, _NEXT["text"], limit_s, again=True)
    deadline = who["at"] + timeout_s
    with _pidfd(int(who["pid"])) as work, _child(mark, kind) as child:
        gone = _Gone(who, work, mark.with_suffix(".ended"))
        child_gone = None if child is None else _Gone(None, child, None)
        while _is_awaited([gone, child_gone], [hung, following], time.time() - deadline):
            awaited = [
                one.pidfd
                for one in (gone, child_gone)
                if one is not None and one.at is None and one.pidfd is not None
            ]
            # Nothing to look for before the deadline but the end of a process, which wakes us.
            select.select(awaited, [], [], max(_POLL_S, deadline - time.time() - _EARLY_S))
        if child is not None and child_gone is not None and child_gone.at is None:
            signal.pidfd_send_signal(child, signal.SIGKILL)
    return _told(deadline, hung, following, gone, child_gone)


class _Gone:
    """Looks whether a process, or one thread of it, has ended; keeps the first moment."""

    def __init__(self, who: dict[str, float] | None, pidfd: int | None, ended: Path | None) -> None:
        self._thread = None if who is None else Path(f"/proc/{who['pid']}/task/{who['thread']}")
        self.pidfd = pidfd
        self._ended = ended
        self.at: float | None = time.time() if pidfd is None else None

    def look(self) -> None:
        has_ended = self.pidfd is not None and select.select([self.pidfd], [], [], 0)[0]
        if self.at is None and (
            has_ended or (self._thread is not None and not self._thread.exists())
        ):
            self.at = time.time()
        if self.at is None and self._ended is not None and self._ended.exists():
            self.at = float(json.loads(self._ended.read_text(encoding="ascii"))["at"])


def _is_awaited(things: list[_Gone | None], clients: list[_Asking], after_s: float) -> bool:
    are_here = [client.answer is not None for client in clients]
    for thing in things:
        if thing is not None:
            thing.look()
    are_gone = [thing is None or thing.at is not None for thing in things]
    return (after_s < GONE_LIMIT_S and not all(are_gone)) or (
        after_s < NEXT_LIMIT_S and not all(are_here)
    )


def _told(
    deadline: float, hung: _Asking, following: _Asking, gone: _Gone, child: _Gone | None
) -> Hang:
    def after_ms(at: float | None) -> float | None:
        return None if at is None else (at - deadline) * 1000

    told, good = hung.answer, following.answer
    return Hang(
        told=None if told is None else told.words,
        told_ms=None if told is None else after_ms(told.at),
        gone_ms=after_ms(gone.at),
        child_gone_ms=None if child is None else after_ms(child.at),
        has_child=child is not None,
        next_ms=None if good is None else after_ms(good.at),
    )


def _begun(
    candidate: Candidate, kind: str, mark: Path, limit_s: float
) -> tuple[_Asking, dict[str, float]]:
    """Ask until the handler has begun: Cog refuses for a moment what comes after an answer."""
    until = time.monotonic() + _BEGIN_LIMIT_S
    while time.monotonic() < until:
        asking = _Asking(candidate, kind, _BEGIN_LIMIT_S + limit_s, again=False)
        while time.monotonic() < until and asking.answer is None:
            if mark.exists():
                return asking, json.loads(mark.read_text(encoding="ascii"))
            time.sleep(_AGAIN_S)
    raise BenchmarkError(candidate.server.with_log("the handler has not begun"))


@contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """Open a process; none where it has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


@contextmanager
def _child(mark: Path, kind: str) -> Iterator[int | None]:
    """Open the process that the handler has started, where it is of that kind."""
    if kind != "grandchild":
        yield None
        return
    path, limit = mark.with_suffix(".child"), time.monotonic() + _BEGIN_LIMIT_S
    while not path.exists() and time.monotonic() < limit:
        time.sleep(_AGAIN_S)
    with _pidfd(int(json.loads(path.read_text(encoding="ascii"))["pid"])) as pidfd:
        yield pidfd
