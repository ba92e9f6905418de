"""The cases, in the order in which they run."""

from . import backlog, batching, boot, delivery, echo, hung, memory, payload
from .case import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        echo.CASE,
        payload.CASE,
        delivery.CASE,
        hung.CASE,
        boot.CASE,
        memory.CASE,
        batching.CASE,
        backlog.CASE,
    )
}
