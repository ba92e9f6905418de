"""The cases, in the order in which they run."""

from . import backlog, batching, delivery, echo, payload
from .case import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in (echo.CASE, payload.CASE, delivery.CASE, backlog.CASE, batching.CASE)
}
