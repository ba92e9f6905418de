"""What is known of a task's end, put into the words of the record. Pure functions.

What a worker says is not trusted: a handler can write to its channel. Texts are made of what UTF-8
can say, and a reason outside the closed set breaks the channel.
"""

from __future__ import annotations

import signal
from dataclasses import replace

from pydantic_core import from_json

from .. import wire
from ..errors import FailureReason, TaskError, WireError
from ..task import Outcome, Task, TaskState
from .memory import NOT_ASKED, MemoryEvidence
from .slot import ExitReason

_READ_THROUGH_BYTES = 64 * 1024


def succeeded(done: wire.Done, result: bytes) -> Outcome:
    """Return the end of a task whose handler returned a result.

    The result is given to clients as it is, so it has to be JSON. A large one is not read through
    for that (64 KiB take 0.04 to 0.3 ms); the checksum tells that nobody else wrote between its
    bytes.

    Raises:
        WireError: it is not what the worker has sent, or not JSON.
    """
    if wire.checksum(result) != done.checksum:
        raise WireError("a result does not have its checksum")
    if len(result) <= _READ_THROUGH_BYTES:
        try:
            from_json(result)
        except ValueError as error:
            raise WireError(f"a result is not JSON: {error}") from error
    return Outcome(TaskState.SUCCEEDED, result=result)


def failed_in_worker(failed: wire.Failed) -> Outcome:
    """Return the end of a task whose handler raised, or returned what is no result.

    Raises:
        WireError: the worker gives a reason that does not exist.
    """
    try:
        reason = FailureReason(failed.reason)
    except ValueError as error:
        raise WireError(f"unknown failure reason {failed.reason!r}") from error
    error_record = TaskError(
        reason,
        message=_text(failed.message) or "",
        exception=_text(failed.exception),
        traceback=_text(failed.traceback),
    )
    return Outcome(TaskState.FAILED, error=error_record)


def timed_out(task: Task, output: str | None, stack: str | None) -> Outcome:
    """Return the end of a task that passed its deadline; its worker is killed."""
    message = f"`{task.function}` timed out after {task.timeout_s:g} s; its worker was killed"
    return _killed(TaskState.TIMED_OUT, FailureReason.TIMED_OUT, message, output, stack)


def stopped_in_time(task: Task, answer: Outcome) -> Outcome:
    """Return the end of a task that passed its deadline, and stopped when it was asked to.

    What it returned is dropped; where it raised, that is kept as evidence.
    """
    given = answer.error or TaskError(FailureReason.TIMED_OUT, "")
    message = (
        f"`{task.function}` timed out after {task.timeout_s:g} s; it was asked to stop, and did"
    )
    error = replace(given, reason=FailureReason.TIMED_OUT, message=message)
    return Outcome(TaskState.TIMED_OUT, error=error)


def cancelled_in_queue(task: Task) -> Outcome:
    """Return the end of a task that somebody has cancelled before it ran."""
    message = f"`{task.function}` was cancelled before it ran"
    return Outcome(TaskState.CANCELLED, error=TaskError(FailureReason.CANCELLED, message))


def cancelled(task: Task, output: str | None, stack: str | None) -> Outcome:
    """Return the end of a task that somebody has cancelled while it ran; its worker is killed."""
    message = f"`{task.function}` was cancelled while it ran; its worker was killed"
    return _killed(TaskState.CANCELLED, FailureReason.CANCELLED, message, output, stack)


def _killed(
    state: TaskState, reason: FailureReason, message: str, output: str | None, stack: str | None
) -> Outcome:
    killed_by = int(signal.SIGKILL)
    error = TaskError(reason, message, signal=killed_by, stack=stack, output=output)
    return Outcome(state, error=error, output=output)


def input_lost(task: Task) -> Outcome:
    """Return the end of a queued task whose input is not in the journal: that is damaged."""
    message = f"the input of `{task.function}` is not in the journal any more"
    error = TaskError(FailureReason.EXCEPTION, message, exception="InputLost")
    return Outcome(TaskState.FAILED, error=error)


def expired(task: Task, timeout_s: float) -> Outcome:
    """Return the end of a task that has waited for a worker for too long."""
    message = f"`{task.function}` waited for more than {timeout_s:g} s (OGPU_QUEUE_TIMEOUT)"
    return Outcome(TaskState.EXPIRED, error=TaskError(FailureReason.EXPIRED, message))


def worker_died(
    task: Task,
    gone: wire.Gone,
    output: str | None,
    stack: str | None,
    *,
    channel_broken: bool,
    memory: MemoryEvidence,
) -> Outcome:
    """Return the end of a task whose worker ended while it ran it, and not for its deadline."""
    reason, advice = FailureReason.WORKER_DIED, ""
    how = describe_end(gone, memory)
    if memory.out_of_memory:
        reason = FailureReason.OUT_OF_MEMORY
        advice = (
            "; have it need less, run fewer workers (OGPU_WORKERS), or raise the memory limit of "
            "the container"
        )
    elif channel_broken:
        how = "closed its channel to the service, or wrote garbage to it, and was killed"
    error = TaskError(
        reason,
        f"worker {gone.slot} {how} while it ran `{task.function}`{advice}",
        signal=gone.signal,
        exit_code=gone.exit_code,
        stack=stack,
        output=output,
    )
    return Outcome(TaskState.FAILED, error=error, output=output)


def interrupted(task: Task, gone: wire.Gone, why: str) -> Outcome:
    """Return the end of a task that lost its worker several times, and was not to blame for it."""
    message = (
        f"attempt {task.attempt} was interrupted: the worker {describe_end(gone)} {why}, "
        "and OGPU_MAX_ATTEMPTS allows no other"
    )
    error = TaskError(FailureReason.INTERRUPTED, message, None, None, gone.signal, gone.exit_code)
    return Outcome(TaskState.FAILED, error=error)


def recycle_reason(text: str) -> ExitReason:
    """Return why a worker wants to be replaced.

    Raises:
        WireError: it gives a reason that does not exist.
    """
    try:
        return ExitReason(wire.RecycleReason(text).value)
    except ValueError as error:
        raise WireError(f"unknown reason to be recycled {text!r}") from error


def with_output(outcome: Outcome, output: str | None) -> Outcome:
    """Add the last lines of output."""
    error = outcome.error and replace(outcome.error, output=output)
    return replace(outcome, error=error, output=output)


def describe_end(gone: wire.Gone, memory: MemoryEvidence = NOT_ASKED) -> str:
    """Say how a process ended: by which signal and for want of what, or with which exit code."""
    if gone.exit_code is not None:
        return f"exited with code {gone.exit_code}"
    if gone.signal is None:
        return "ended, nobody knows how"
    try:
        how = f"was ended by {signal.Signals(gone.signal).name}"
    except ValueError:  # real-time signals have no names
        how = f"was ended by signal {gone.signal}"
    if memory.out_of_memory is None:
        return f"{how} (whether it ran out of memory cannot be told: {memory.why_unknown})"
    if memory.out_of_memory:
        limit = memory.limit_bytes
        known = "no limit is known" if limit is None else f"the limit is {limit / 2**20:,.0f} MiB"
        return f"ran out of memory ({known}) and {how}"
    return how


def _text(value: object) -> str | None:
    if value is None:
        return None
    return str(value).encode("utf-8", "backslashreplace").decode()[: wire.MAX_TEXT_CHARS + 1]
