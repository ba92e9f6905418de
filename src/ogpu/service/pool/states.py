"""What the pool as a whole is doing. Runs in the front; the supervisor says which it is."""

from __future__ import annotations

from enum import Enum


class PoolState(str, Enum):
    """What the pool as a whole is doing."""

    STARTING = "starting"  # no worker has been ready yet
    READY = "ready"
    DRAINING = "draining"
    BROKEN = "broken"


class Admission(Enum):
    """Whether new tasks are welcome."""

    OPEN = "open"
    PAUSED = "paused"  # POST /drain: what was accepted goes on; POST /resume opens again
    CLOSED = "closed"  # the service stops
