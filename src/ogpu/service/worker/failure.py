"""An exception of the source: put into words for the front, then let go of.

Runs in a worker. What crosses is text, never the exception; and once it is text, nothing of it is
kept, because the frames of its traceback keep everything alive that was in them: the tensors of a
handler that ran out of GPU memory, for one (pytorch#27600).
"""

from __future__ import annotations

import builtins
import traceback
from types import TracebackType

from .. import wire
from ..errors import FailureReason

# Python 3.11
_GROUP: tuple[type[BaseException], ...] = tuple(
    kind for kind in [getattr(builtins, "BaseExceptionGroup", None)] if kind
)
# Whose frames stand between the worker's loop and the source's code.
_OURS = (__package__, "asyncio")


def failed(
    order: wire.Run, reason: FailureReason, error: BaseException, *, with_traceback: bool = True
) -> wire.Failed:
    """Return the message that says how a task failed."""
    return wire.Failed(
        run=order.run,
        reason=reason.value,
        message=message_of(error),
        exception=_cut(type(error).__name__) if with_traceback else None,
        traceback=traceback_of(error) if with_traceback else None,
    )


def init_failed(error: BaseException) -> wire.InitFailed:
    """Return the message that says why a worker cannot start."""
    return wire.InitFailed(_cut(type(error).__name__), message_of(error), traceback_of(error))


def message_of(error: BaseException) -> str:
    """Return the exception's text, whatever its ``__str__`` does."""
    try:
        text = str(error)
    except BaseException as broken:  # noqa: BLE001 - a user's __str__ may raise anything
        text = f"(its text cannot be shown: {type(broken).__name__})"
    return _cut(text or type(error).__name__)


def traceback_of(error: BaseException) -> str:
    """Return the traceback as text, from the source's first frame on."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames):
        frames = frames.tb_next
    return _cut("".join(traceback.format_exception(type(error), error, frames)))


def let_go(error: BaseException) -> None:
    """Empty the frames of an exception, and of those that it came from, now that they are over.

    Whoever still holds the exception (itself in a variable of its own frames, or a future) then
    holds nothing else. Frames that still run are left as they are.
    """
    seen: set[int] = set()
    found: list[BaseException | None] = [error]
    while found:
        one = found.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        found += [one.__cause__, one.__context__]
        if isinstance(one, _GROUP):
            found += one.exceptions  # type: ignore[attr-defined]  # mypy reads it as Python 3.10


def _is_ours(frames: TracebackType) -> bool:
    name = str(frames.tb_frame.f_globals.get("__name__"))
    return any(name == ours or name.startswith(f"{ours}.") for ours in _OURS)


def _cut(text: str) -> str:
    """Keep the end, which says what happened, and what UTF-8 can say."""
    if len(text) > wire.MAX_TEXT_CHARS:
        text = "…" + text[-wire.MAX_TEXT_CHARS :]
    return text.encode("utf-8", "backslashreplace").decode()
