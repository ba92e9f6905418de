"""The rooms of the front that HTTP looks at and acts on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..events import TaskEvents
from ..journal import Journal
from ..metrics import Metrics
from ..pool.supervisor import Supervisor
from .waiters import Waiters

if TYPE_CHECKING:
    from ..outbox.outbox import Outbox


@dataclass(frozen=True)
class Rooms:
    """What the calls look at and act on."""

    journal: Journal
    supervisor: Supervisor
    outbox: Outbox | None
    events: TaskEvents
    metrics: Metrics
    waiters: Waiters
