"""``@prepare``: what all workers share is loaded once, before there is a worker.

Runs in the template, while the front imports its libraries. Where a fork is not safe it runs in
each fresh interpreter, before @init (``prepare_here``), and none of this is needed.

1. The template dies with the front: it does not listen while code of the source runs. Stop signals
   are the front's business, as always.
2. Numeric libraries are held at one thread (``one_thread.py``): more would not survive the fork.
3. @prepare runs. What it prints goes where the service's own log goes.
4. tqdm's leftovers of a progress bar are removed, and garbage is collected: what is left is shared
   with every worker, for as long as nobody writes to it.
5. It failed: the front is told, and this process leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from .. import wire
from ..handler import get_prepare_handler
from ..logger import logger
from ..processes import become_subreaper, die_with_parent
from . import output
from .failure import message_of, traceback_of
from .one_thread import one_thread

# Ctrl-C and a closing terminal reach the whole foreground group; only the front acts on them, and
# ends the template.
FRONTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_MONITOR_LIMIT_S = 1.0


def prepare_to_fork(control: socket.socket, front: int) -> bool:
    """Run @prepare in the template, if the source has one; return whether it has.

    Where it fails this does not return.
    """
    if get_prepare_handler() is None:
        return False
    die_with_parent(front)
    become_subreaper()  # what it loses is ended with the workers, or with the front
    output.buffer_by_line()
    try:
        with _deaf_to_signals(), one_thread():
            prepare_here()
    except BaseException as error:  # noqa: BLE001 - told to the front, which decides
        text = wire.MAX_PACKET_TEXT_CHARS
        failed = wire.PrepareFailed(
            type(error).__name__[-text:], message_of(error)[-text:], traceback_of(error)[-text:]
        )
        output.flush()
        with contextlib.suppress(OSError):  # the front is gone, and wants to know nothing
            control.sendall(wire.encode_header(failed))
        os._exit(1)
    _end_progress_bars()
    gc.collect()
    return True


def prepare_here() -> None:
    """Run @prepare in this process, if the source has one, and wait for what it awaits."""
    function = get_prepare_handler()
    if function is None:
        return
    pid, started = os.getpid(), time.perf_counter()
    try:
        if inspect.iscoroutinefunction(function):
            asyncio.run(function())
        else:
            function()
    except BaseException:
        if os.getpid() != pid:
            os._exit(1)
        raise
    finally:
        output.flush()
    if os.getpid() != pid:
        os._exit(0)  # a child that @prepare forked
    logger.info("@prepare took %.2f s", time.perf_counter() - started)


@contextlib.contextmanager
def _deaf_to_signals() -> Iterator[None]:
    """Take no notice of what is for the front alone; blocked afterwards, until it is ignored.

    By a handler that does nothing. What is ignored (SIG_IGN) stays so in all that @prepare starts,
    over fork and exec (signal(7)): nobody could terminate it, and ``with multiprocessing.Pool()``
    would wait for ever at its end.
    """
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in FRONTS_SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup means what the source starts, too
            _silenced[number] = handler
            signal.signal(number, _do_nothing)
            signal.siginterrupt(number, False)  # nor does a call of C code fail by it (EINTR)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FRONTS_SIGNALS)  # the front held some for the fork
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, FRONTS_SIGNALS)
        _silenced.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


# While @prepare runs: the handlers that a child which it forks is to have.
_silenced: dict[signal.Signals, Any] = {}
_forking = threading.local()  # the mask of a thread that forks


def _do_nothing(_: int, __: FrameType | None) -> None:
    """Take a signal that is the front's business."""


def _before_fork() -> None:
    # A signal that comes before the child has its handlers would be lost.
    if _silenced:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _silenced)


def _after_fork() -> None:
    mask = vars(_forking).pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    for number, handler in _silenced.items():
        if signal.getsignal(number) is _do_nothing:  # @prepare has not set its own
            signal.signal(number, handler)
    _silenced.clear()
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)


def _end_progress_bars() -> None:
    """Remove what a progress bar of tqdm leaves behind, and what a fork must not share.

    Its monitor thread would be a hazard, though all it does is redraw bars; the next bar starts
    another one. Its lock is a semaphore that processes share, and that a worker which is killed
    while it draws a bar would hold for ever, for all of them.
    """
    for thread in threading.enumerate():
        if type(thread).__module__ == "tqdm._monitor":
            thread.was_killed.set()  # type: ignore[attr-defined]  # TMonitor.exit(), with a bound
            thread.join(_MONITOR_LIMIT_S)
    if "tqdm.std" in sys.modules:
        for bar in _with_subclasses(sys.modules["tqdm.std"].tqdm):
            if "_lock" in vars(bar):
                bar.set_lock(threading.RLock())


def _with_subclasses(kind: Any) -> Iterator[Any]:  # noqa: ANN401 - tqdm has no types
    yield kind
    for below in kind.__subclasses__():
        yield from _with_subclasses(below)
