"""The look at which GPUs are here, and which of them the pool is to use.

``look`` runs in the thread of ``watch.py``, since drivers may hang; ``choose`` in the front.

1. NVIDIA's: from NVML, else from /proc/driver/nvidia, else by the number of device files.
2. AMD's, where there are none of NVIDIA's that may be used: from KFD.
3. What the container shows of them: CUDA_VISIBLE_DEVICES and its like (``visible.py``).
4. What OGPU_GPUS takes of those: all, none, or some by their places in that list.
5. No GPU is found by any of this (WSL2 and Jetson show none of these files), but OGPU_GPUS names
   some: that is believed, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SettingsError
from . import amd
from .device import AMD, NVIDIA, Device, DeviceLostError, Found, Memory
from .nvidia import Nvml, NvmlError, find_by_driver, find_by_files
from .visible import as_written, visible_amd, visible_nvidia

ROOT = Path("/")
NO_DEVICE = "-1"  # as a list of visible devices: none, for CUDA and HIP


@dataclass
class Sight:
    """What the look has come to.

    ``is_any_here`` is true where there is a GPU, visible or not. ``warnings`` and ``remarks`` are
    for the log. ``memory`` is how full the visible ones were.
    """

    visible: list[Device] = field(default_factory=list)
    is_any_here: bool = False
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    memory: dict[Device, Memory] = field(default_factory=dict)
    nvml: Nvml | None = None


def look(environment: Mapping[str, str], root: Path = ROOT) -> Sight:
    """Look for GPUs. It may hang with a driver."""
    sight = Sight()
    nvidia = _find_nvidia(sight, root)
    sight.visible = visible_nvidia(nvidia, environment)
    sight.is_any_here = bool(nvidia)
    if not sight.visible:
        amds = amd.find(root)
        sight.visible = visible_amd(amds, environment)
        sight.is_any_here = bool(nvidia or amds)
    for device in sight.visible:
        try:
            memory = read_memory(device, sight.nvml)
        except DeviceLostError as error:
            sight.warnings.append(f"{device} is lost ({error})")
            continue
        if memory is not None:
            sight.memory[device] = memory
    return sight


def look_at_files(environment: Mapping[str, str], root: Path = ROOT) -> Sight:
    """Look for GPUs by their device files alone, which cannot hang."""
    found = find_by_files(root)
    return Sight(visible_nvidia(found, environment), is_any_here=bool(found))


def read_memory(device: Device, nvml: Nvml | None) -> Memory | None:
    """Read how full the memory of a device is. It may hang with the driver.

    Raises:
        DeviceLostError: the device is gone.
    """
    if device.source is None:
        return None
    if device.vendor == AMD:
        return amd.read(device.source)
    return None if nvml is None else nvml.read(device.source)


def _find_nvidia(sight: Sight, root: Path) -> list[Found]:
    try:
        sight.nvml = Nvml()
        found, sight.warnings = sight.nvml.find()
    except NvmlError as error:
        sight.nvml = None
        found = _find_without_nvml(sight, root)
        words = f"NVML cannot be used ({error}): the memory of NVIDIA's GPUs is not read"
        if error.is_absent or not found:
            sight.remarks.append(words)
        else:
            sight.warnings.append(words)
    return found


def _find_without_nvml(sight: Sight, root: Path) -> list[Found]:
    try:
        return find_by_driver(root) or find_by_files(root)
    except OSError as error:
        sight.warnings.append(f"NVIDIA's driver does not tell which GPUs there are: {error}")
        return find_by_files(root)


def choose(
    sight: Sight,
    positions: tuple[int, ...] | None,
    environment: Mapping[str, str],
    root: Path = ROOT,
) -> list[Device]:
    """Return the devices that the pool is to use; ``positions`` is OGPU_GPUS, None for ``auto``.

    Raises:
        SettingsError: OGPU_GPUS names one that is not there.
    """
    if positions is None:
        return sight.visible
    visible = sight.visible
    if not sight.is_any_here:
        sight.warnings.append(
            "No GPU is found here, by NVML or by its device files; OGPU_GPUS is believed"
        )
        visible = _believed(positions, environment, root)
    beyond = [position for position in positions if position >= len(visible)]
    if beyond:
        seen = ", ".join(f"{place} = {device}" for place, device in enumerate(visible)) or "none"
        raise SettingsError(
            f"OGPU_GPUS={','.join(map(str, positions))}: there is no GPU {beyond[0]} among those "
            f"that this process may use ({seen}); it counts what CUDA_VISIBLE_DEVICES, "
            "HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES leave, from 0"
        )
    return [visible[position] for position in positions]


def _believed(
    positions: tuple[int, ...], environment: Mapping[str, str], root: Path
) -> list[Device]:
    vendor = AMD if (root / "dev/kfd").exists() else NVIDIA
    wanted = environment.get("CUDA_VISIBLE_DEVICES" if vendor == NVIDIA else "HIP_VISIBLE_DEVICES")
    if wanted is None:
        return [Device(vendor, str(position)) for position in range(max(positions) + 1)]
    return [Device(vendor, text) for text in as_written(wanted)]
