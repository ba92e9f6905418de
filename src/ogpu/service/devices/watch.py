"""The one thread that talks to GPU drivers: it finds the devices, then reads how full they are.

Runs in the front, beside the event loop. NVML and sysfs may hang with a driver, for ever; neither
the loop nor the end of the process waits for this thread longer than it says.

1. The thread begins once the template is made, which so inherits nothing of NVML. It looks for the
   devices; start() waits for that, for FIND_LIMIT_S. A look that takes longer is given up: devices
   are counted by their files, and no memory is read.
2. The devices that are used are read each second, and when somebody asks. Who wants to know reads
   what was read last; nothing is known where that is older than STALE_S.
3. One says that it is lost: that is kept, for whoever ends the service.
4. The end of the service ends the thread, where it does not hang; else it ends with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence

from .device import Device, DeviceLostError, Memory
from .discovery import Sight, read_memory
from .nvidia import Nvml

# NVML takes a second for each GPU that no process keeps awake (persistence mode is off).
FIND_LIMIT_S = 20.0
READ_EVERY_S = 1.0
STALE_S = 3.0
_END_LIMIT_S = 0.5
_Question = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class DeviceThread:
    """Looks for devices, and reads their memory.

    Args:
        look: the look for devices; called in the thread.
        look_at_files: the one that cannot hang.
    """

    def __init__(self, look: Callable[[], Sight], look_at_files: Callable[[], Sight]) -> None:
        self._look = look
        self._look_at_files = look_at_files
        self._sight: Sight | None = None
        self._has_looked = threading.Event()
        self._devices: list[Device] = []
        # Each is a question to be answered after the next reading; None: the end.
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._memory: dict[Device, Memory] = {}  # replaced as a whole, never changed
        self._read_s = 0.0
        self.lost: str | None = None  # which device is gone, in words
        self._thread = threading.Thread(target=self._work, name="ogpu-devices", daemon=True)

    # --- called by the front

    def start(self) -> None:
        """Begin to look."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._sight = self._files_alone(f"no thread can be started ({error})")
            self._has_looked.set()

    def found(self, limit_s: float = FIND_LIMIT_S) -> Sight:
        """Wait for what the look has come to; where that takes too long, look at files alone."""
        if not self._has_looked.wait(limit_s):
            return self._files_alone(f"the GPU's driver has not answered within {limit_s:g} s")
        assert self._sight is not None
        return self._sight

    def watch(self, devices: Sequence[Device], sight: Sight) -> None:
        """Read these from now on."""
        self._memory = {d: sight.memory[d] for d in devices if d in sight.memory}
        self._read_s = time.monotonic()
        self._devices = list(self._memory)
        if not self._devices:
            self.close()  # there is nothing to read

    def memory_of(self, device: Device) -> Memory | None:
        """Return how full a device was when it was last read; None: nobody knows."""
        is_fresh = time.monotonic() - self._read_s < STALE_S
        return self._memory.get(device) if is_fresh else None

    async def read_again(self, limit_s: float) -> bool:
        """Have the devices read now; return False where that takes longer than it may."""
        loop = asyncio.get_running_loop()
        answered = loop.create_future()
        self._questions.put((loop, answered))
        await asyncio.wait([answered], timeout=limit_s)
        return answered.done()

    def close(self) -> None:
        """End the thread. Where it hangs it stays, and ends with the process."""
        self._questions.put(None)
        if self._thread.is_alive() and self._has_looked.is_set():
            self._thread.join(_END_LIMIT_S)

    def _files_alone(self, why: str) -> Sight:
        sight = self._look_at_files()
        if sight.is_any_here:
            sight.warnings.append(f"{why}: GPUs are counted by their device files alone")
        return sight

    # --- called by the thread

    def _work(self) -> None:
        try:
            self._sight = self._look()
        except Exception as error:  # noqa: BLE001 - a driver's library, or a file of it, may say anything
            self._sight = self._files_alone(f"the look for GPUs has failed ({error!r})")
        nvml = self._sight.nvml
        self._has_looked.set()
        while True:
            try:
                question = self._questions.get(timeout=READ_EVERY_S)
                if question is None:
                    return
            except queue.Empty:
                question = None
            self._read(nvml)
            if question is not None:
                _answer(*question)

    def _read(self, nvml: Nvml | None) -> None:
        memory: dict[Device, Memory] = {}
        for device in self._devices:
            try:
                found = read_memory(device, nvml)
            except DeviceLostError as error:
                self.lost = f"GPU {device} is lost ({error})"
                continue
            if found is not None:
                memory[device] = found
        if self._devices:
            self._memory, self._read_s = memory, time.monotonic()


def _answer(loop: asyncio.AbstractEventLoop, answered: asyncio.Future[None]) -> None:
    # The loop may have ended, and with it whoever asked.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_settle, answered)


def _settle(answered: asyncio.Future[None]) -> None:
    if not answered.done():
        answered.set_result(None)
