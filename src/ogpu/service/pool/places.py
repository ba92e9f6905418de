"""What slots are filled from, and where: made at start(), before there is an event loop.

Runs in the front.
"""

from __future__ import annotations

from typing import NamedTuple

from ..devices.devices import Devices
from .launcher import Launcher
from .scratch import ScratchFolders


class Places(NamedTuple):
    """The launcher of workers, their folders for temporary files, and their devices."""

    launcher: Launcher
    scratch: ScratchFolders
    devices: Devices
