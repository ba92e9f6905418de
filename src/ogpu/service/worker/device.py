"""Whether the GPU still works for this process after a task that failed. PyTorch alone, so far.

Runs in a worker. Some CUDA errors are sticky: after a failed assertion or an illegal access in a
kernel every later call of the process fails, and only another process helps. A plain lack of memory
is none of them.

1. A task has failed, or was stopped, and PyTorch has a CUDA context here (nobody imports it for
   this).
2. What the task held is collected; after an out-of-memory error the cache of PyTorch's allocator is
   given back, so that the next task meets as much memory as in a new worker.
3. Each device that was used is waited for, for PROBE_LIMIT_S together, in a thread, which may hang.
   An error tells that the device, or our context on it, is broken. Silence tells that it hangs; or
   that it still computes, where the handler was stopped.
"""

from __future__ import annotations

import gc
import sys
import threading
from types import ModuleType

from .. import wire
from ..logger import logger

PROBE_LIMIT_S = 5.0
# What CUDA, HIP and NVML say where there is no device any more.
_LOST = (
    "no cuda-capable device",
    "no rocm-capable device",
    "busy or unavailable",
    "device is lost",
    "gpu is lost",
    "fallen off the bus",
)


def probe_after(answer: wire.Done | wire.Failed, *, was_stopped: bool) -> wire.RecycleReason | None:
    """Return why the worker cannot go on with its GPU, or None: it can, or uses none.

    Where this look itself goes wrong nothing is known, and the worker goes on.
    """
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return None
        gc.collect()
        is_full = isinstance(answer, wire.Failed) and "OutOfMemoryError" in (answer.traceback or "")
        probe = _Probe(torch, empty_cache=is_full)
        probe.start()
        probe.join(PROBE_LIMIT_S)
        if probe.is_alive():
            logger.warning("The GPU has not answered for %g s after a task", PROBE_LIMIT_S)
            return wire.RecycleReason.LEFTOVERS if was_stopped else wire.RecycleReason.DEVICE_LOST
        return None if probe.error is None else _meaning(probe.error)
    except Exception as error:  # noqa: BLE001 - the module may be anything of that name
        return _meaning(error)


class _Probe(threading.Thread):
    """Waits for the devices to have done all their work; ``error`` is what that came to."""

    def __init__(self, torch: ModuleType, *, empty_cache: bool) -> None:
        super().__init__(name="ogpu-device-probe", daemon=True)
        self.error: BaseException | None = None
        self._cuda = torch.cuda
        self._empty_cache = empty_cache
        present = self._cuda.current_device()  # a fact about this thread, not about the new one
        # Another one that has no memory has not been used; to wait for it would make a context.
        self._devices = [
            index
            for index in range(self._cuda.device_count())
            if index == present or self._cuda.memory_reserved(index)
        ]

    def run(self) -> None:
        try:
            for index in self._devices:
                self._cuda.synchronize(index)
            if self._empty_cache:
                self._cuda.empty_cache()
        except BaseException as error:  # noqa: BLE001 - told to the thread that waits
            self.error = error


def _meaning(error: BaseException) -> wire.RecycleReason | None:
    text = str(error).lower()
    if not isinstance(error, RuntimeError):  # what PyTorch raises is one
        logger.warning("The GPU cannot be looked at after a task: %r", error)
        return None
    if "out of memory" in text:
        return None
    logger.warning("The GPU cannot be used any more by this worker: %s", error)
    is_lost = any(sign in text for sign in _LOST)
    return wire.RecycleReason.DEVICE_LOST if is_lost else wire.RecycleReason.DEVICE_ERROR
