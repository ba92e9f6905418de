"""The GPUs that were here at the start, and whether they still are: by their device files alone.

Runs in the front. The files are looked at and never opened: a driver that hangs would have whoever
opens them hang as well.

A GPU that falls off the bus, or is taken from the container (a reload of systemd does that:
NVIDIA/nvidia-container-toolkit#48), does not come back to this container. No new worker can cure
it.
"""

from __future__ import annotations

from pathlib import Path

# NVIDIA's devices without its control files; AMD's (KFD is the one of all of them).
_PATTERNS = ("nvidia[0-9]*", "kfd", "dri/renderD*")
LOOK_EVERY_S = 1.0


class DeviceFiles:
    """Remembers the device files that are there when it is made.

    Example:
        >>> DeviceFiles().gone()
        ['/dev/nvidia1']
    """

    def __init__(self, folder: Path = Path("/dev")) -> None:
        self._files = sorted(file for pattern in _PATTERNS for file in folder.glob(pattern))

    def gone(self) -> list[str]:
        """Return those that are not there any more."""
        return [str(file) for file in self._files if not file.exists()]
