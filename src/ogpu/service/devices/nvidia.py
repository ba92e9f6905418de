"""NVIDIA's GPUs: what NVML says of them, or else the driver's files. No CUDA call anywhere.

Runs in the front, in the thread of ``watch.py``: any of these calls may hang with the driver.
``pynvml`` is NVIDIA's own binding (nvidia-ml-py, the extra ``[gpu]``).
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

from .device import DeviceLostError, Found, Memory

_DEVICE_FILE = re.compile(r"nvidia[0-9]+")
# What a driver without NVML's library, or a machine without a driver, says.
_NOTHING_HERE = ("NVML_ERROR_LIBRARY_NOT_FOUND", "NVML_ERROR_DRIVER_NOT_LOADED")


class NvmlError(Exception):
    """Raised when NVML cannot be used. ``is_absent``: it is not installed, which is no trouble."""

    def __init__(self, message: str, *, is_absent: bool) -> None:
        super().__init__(message)
        self.is_absent = is_absent


class Nvml:
    """NVML, initialised.

    Raises:
        NvmlError: it cannot be.
    """

    def __init__(self) -> None:
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise NvmlError(str(error), is_absent=True) from error
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise NvmlError(str(error), is_absent=_is_absent(self._nvml, error)) from error
        self._handles: dict[str, object] = {}

    def find(self) -> tuple[list[Found], list[str]]:
        """Return the GPUs in the order of their PCI buses, and what is to be said of others.

        Raises:
            NvmlError: it does not say.
        """
        found, notes = [], []
        try:
            count = int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError as error:
            raise NvmlError(str(error), is_absent=False) from error
        for index in range(count):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                name = _text(self._nvml.nvmlDeviceGetName(handle))
                uuid = _text(self._nvml.nvmlDeviceGetUUID(handle))
            except self._nvml.NVMLError as error:  # no permission: CUDA does not count it either
                notes.append(f"NVIDIA GPU {index} is left out: {error}")
                continue
            self._handles[uuid] = handle
            found.append(Found(name, uuid, uuid))
        return found, notes

    def read(self, uuid: str) -> Memory | None:
        """Return how full the memory of a GPU or a MIG instance is; None: it does not say.

        Raises:
            DeviceLostError: it is gone.
        """
        try:
            if uuid not in self._handles:
                self._handles[uuid] = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handles[uuid])
        except self._nvml.NVMLError as error:
            if error.value == self._nvml.NVML_ERROR_GPU_IS_LOST:
                raise DeviceLostError(f"NVML says: {error}") from error
            return None
        return Memory(int(memory.used), int(memory.total))


def find_by_driver(root: Path) -> list[Found]:
    """Return the GPUs that /proc/driver/nvidia describes and /dev has, in the order of the buses.

    Raises:
        OSError: they cannot be read.
    """
    found = []
    for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        minor, uuid = facts.get("Device Minor"), facts.get("GPU UUID", "?")
        if minor is not None and (root / f"dev/nvidia{minor}").exists():
            # The driver shows question marks until the GPU is used for the first time.
            found.append(Found(facts.get("Model"), None if "?" in uuid else uuid))
    return found


def find_by_files(root: Path) -> list[Found]:
    """Return as many nameless GPUs as /dev has device files: nothing that can hang is touched."""
    files = (root / "dev").glob("nvidia[0-9]*")
    return [Found() for file in files if _DEVICE_FILE.fullmatch(file.name)]


def _is_absent(nvml: ModuleType, error: Exception) -> bool:
    return getattr(error, "value", None) in [getattr(nvml, name) for name in _NOTHING_HERE]


def _text(name: str | bytes) -> str:  # bytes, before nvidia-ml-py 12
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
