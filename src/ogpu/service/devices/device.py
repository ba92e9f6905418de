"""What is known of a GPU: as values, which say nothing of where they come from.

Runs in the front.
"""

from __future__ import annotations

from dataclasses import dataclass

NVIDIA, AMD = "nvidia", "amd"
_GIB = 1 << 30


class DeviceLostError(Exception):
    """Raised when a GPU that was here says that it is gone; the message says which."""


@dataclass(frozen=True)
class Found:
    """A GPU that is here, whether the container wants it to be used or not.

    ``uuid`` is what the vendor's variable may name it by. ``source`` is where its memory is read:
    NVML's UUID, or a folder of sysfs. Either is None where nobody tells.
    """

    name: str | None = None
    uuid: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Device:
    """A GPU that workers may use; ``visible_as`` is what the vendor's variable has to say for it.

    Example:
        >>> str(Device("nvidia", "0"))
        'nvidia:0'
    """

    vendor: str
    visible_as: str
    name: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.vendor}:{self.visible_as}"


@dataclass(frozen=True)
class Memory:
    """How full the memory of a device is, whoever uses it."""

    used_bytes: int
    total_bytes: int


def in_words(device: Device, memory: Memory | None) -> str:
    """Return a device as the log shows it: ``nvidia:0 (NVIDIA H100 80GB HBM3, 80 GiB)``."""
    facts = [device.name, None if memory is None else f"{memory.total_bytes / _GIB:.0f} GiB"]
    known = ", ".join(fact for fact in facts if fact)
    return f"{device} ({known})" if known else str(device)
