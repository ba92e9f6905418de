"""What can go wrong, as types. Everything the package raises or records is in this file.

Exceptions:

    ServiceError
    ├── SettingsError        a setting is invalid; the message names the variable      exit code 2
    ├── JournalError         the journal cannot be opened, read or written              exit code 2
    ├── PlatformError        this system lacks what the pool needs                      exit code 2
    ├── FirstInitError       no worker has ever become ready, and the first one failed  exit code 3
    ├── PoolBrokenError      the pool cannot be kept alive any more                     exit code 4
    ├── WireError            a peer sent something that is not a frame of this protocol
    └── NoCurrentTaskError   current_task() was called where no task runs

What a task's ``error`` says is data, not an exception: ``TaskError`` with a ``FailureReason``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ServiceError(Exception):
    """Base of what this package raises; ``exit_code`` is what start() exits with."""

    exit_code = 1


class SettingsError(ServiceError):
    """Raised at start() when a setting is invalid; the message names the variable and the fix."""

    exit_code = 2


class JournalError(ServiceError):
    """Raised when the journal cannot be opened (at start), read or written; the message says why.

    At run time it is answered with 503: nothing that is not on disk was accepted.
    """

    exit_code = 2


class PlatformError(ServiceError):
    """Raised at start() when the system lacks what the pool needs (Linux with pidfd)."""

    exit_code = 2


class FirstInitError(ServiceError):
    """Raised when the first worker of a start fails, so that nothing has ever worked."""

    exit_code = 3


class PoolBrokenError(ServiceError):
    """Raised when the pool cannot be kept alive, for instance when the template has died."""

    exit_code = 4


class WireError(ServiceError):
    """Raised when a peer sends bytes that are not a frame of this protocol, or one too large."""


class NoCurrentTaskError(ServiceError, RuntimeError):
    """Raised by current_task() outside a handler: in @init, at import, after the task's end."""


class FailureReason(str, Enum):
    """Why a task did not succeed. The set is closed: clients may switch over it."""

    EXCEPTION = "exception"
    INVALID_OUTPUT = "invalid_output"
    WORKER_DIED = "worker_died"
    OUT_OF_MEMORY = "out_of_memory"
    INTERRUPTED = "interrupted"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True)
class TaskError:
    """The evidence about a task that did not succeed.

    ``exception`` is the type's name, ``traceback`` its text; ``signal`` and ``exit_code`` are
    numbers and say how the worker ended, where it ended; ``stack`` is what its threads were doing
    then; ``output`` is the end of what it printed.
    """

    reason: FailureReason
    message: str
    exception: str | None = None
    traceback: str | None = None
    signal: int | None = None
    exit_code: int | None = None
    stack: str | None = None
    output: str | None = None
