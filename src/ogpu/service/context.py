"""What a handler may use while it runs: ``current_task()``, ``RecycleWorker``, ``TaskTimeout``.

Runs in a worker. A worker runs one task, or one batch, at a time, so that this is a fact about the
process, and any thread that the handler starts may ask for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime, timezone

from .errors import NoCurrentTaskError

Report = Callable[[float, str | None], None]

# What subprocesses of a handler know their task by; deployed sources read it already.
ADDRESS_VARIABLE = "OGPU_TASK_ADDRESS"


class CurrentTask:
    """The task that this worker runs."""

    __slots__ = ("_address", "_attempt", "_deadline_at", "_deadline_s", "_function", "_report")

    def __init__(
        self,
        address: str,
        function: str,
        attempt: int,
        deadline_at: float | None,
        deadline_s: float | None,
        report: Report,
    ) -> None:
        self._address = address
        self._function = function
        self._attempt = attempt
        self._deadline_at = deadline_at
        self._deadline_s = deadline_s
        self._report = report

    @property
    def address(self) -> str:
        """The task's address, as in the path of its POST."""
        return self._address

    @property
    def function(self) -> str:
        """The name of the handler."""
        return self._function

    @property
    def attempt(self) -> int:
        """1, or more where the service was lost, or had to stop, while the task ran."""
        return self._attempt

    @property
    def deadline(self) -> datetime | None:
        """When the worker is killed, or, with a grace, the handler asked to stop (UTC).

        None: never.
        """
        if self._deadline_at is None:
            return None
        return datetime.fromtimestamp(self._deadline_at, timezone.utc)

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline, 0 when it has passed; None: there is none."""
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - time.monotonic())

    def progress(self, fraction: float, message: str | None = None) -> None:
        """Tell whoever watches how far the task is. Never waits; ten times a second at most.

        What is said too soon after the last is sent a moment later, if nothing newer was said by
        then. It tells nobody after the end of the task, or from a forked child.

        Args:
            fraction: between 0 and 1; what lies outside is taken for the nearer end.
            message: what the task is doing, up to 1,000 characters.

        Raises:
            TypeError: ``fraction`` is not a number, or ``message`` not a text.
            ValueError: ``fraction`` is not a number (NaN).

        Example:
            >>> ogpu.service.current_task().progress(epoch / epochs, f"epoch {epoch}")
        """
        if not isinstance(fraction, (int, float)):
            raise TypeError(f"progress() takes a number between 0 and 1 (got {fraction!r})")
        if message is not None and not isinstance(message, str):
            raise TypeError(f"the message of progress() is a text (got {message!r})")
        if isinstance(fraction, float) and math.isnan(fraction):  # an int may be beyond floats
            raise ValueError("progress() takes a number between 0 and 1 (got NaN)")
        self._report(float(min(max(fraction, 0), 1)), message)


_current: list[CurrentTask] = []
_is_batch = False


def current_task() -> CurrentTask:
    """Return the task that runs in this worker.

    Raises:
        NoCurrentTaskError: none does: this is @init, the import of the source, or another process;
            or a batch runs, of which ``current_tasks()`` tells.

    Example:
        >>> key = f"uploads/{ogpu.service.current_task().address}.png"
    """
    if not _current:
        raise NoCurrentTaskError(
            "no task runs here: current_task() is for handlers, and for what they call"
        )
    if _is_batch:
        raise NoCurrentTaskError(
            "a batch runs here: current_tasks() returns its tasks, in the order of the inputs"
        )
    return _current[0]


def current_tasks() -> list[CurrentTask]:
    """Return the tasks of the batch that runs in this worker, in the order of its inputs.

    In a handler without ``batch_size`` that is the one task; where none runs the list is empty.

    Example:
        >>> for task, item in zip(ogpu.service.current_tasks(), items): ...
    """
    return list(_current)


def set_current_tasks(tasks: list[CurrentTask], *, is_batch: bool = False) -> None:
    """Say which tasks run in this process (called by the worker's loop)."""
    global _current, _is_batch
    _current, _is_batch = tasks, is_batch


class TaskTimeout(BaseException):
    """Raised in a handler at its deadline, where there is a grace (``expose(grace=5)``).

    The task has timed out, whatever the handler does then: what it returns is dropped. The grace is
    for cleaning up, and a handler that ends within it, with no thread or process of it left, spares
    its worker the kill.

    It is no ``Exception``, so that ``except Exception`` does not take it for a failure, and it is
    raised once, in the main thread. A call into C code that a signal does not end is not
    interrupted. Where an ``async def`` handler awaits, it is an ``asyncio.CancelledError`` as well.

    Example:
        >>> try:
        ...     train(model)
        ... except ogpu.service.TaskTimeout:
        ...     save_checkpoint(model)
        ...     raise
    """


class RecycleWorker(Exception):  # noqa: N818 - says what is to be done
    """Have this worker replaced when its task is over.

    Raised by a handler, it fails the task as any exception does. Called without being raised, it
    lets the task go on and succeed.

    Args:
        why: is logged.

    Example:
        >>> if torch.cuda.memory_reserved() > LIMIT:
        ...     ogpu.service.RecycleWorker("the cache has grown too large")
    """

    def __init__(self, why: str = "") -> None:
        super().__init__(why)
        global _recycle_wanted  # noqa: PLW0603 - a fact about the process
        _recycle_wanted = str(why) or "the handler asked for it"


_recycle_wanted: str | None = None


def recycle_wanted() -> str | None:
    """Return why this process is to be replaced, or None (asked by the worker's loop)."""
    return _recycle_wanted
