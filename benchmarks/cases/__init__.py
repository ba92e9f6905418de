"""The cases, in the order in which they run."""

from . import backlog, delivery, echo
from .case import Case

CASES: dict[str, Case] = {case.name: case for case in (echo.CASE, delivery.CASE, backlog.CASE)}
