"""The look at the GPU after a failed task, on a stand-in for PyTorch (the real one: tests/gpu)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from ogpu.service import wire
from ogpu.service.wire import RecycleReason
from ogpu.service.worker import device

FAILED = wire.Failed(1, "exception", "no luck", "ValueError", "Traceback …\nValueError: no luck")
OUT_OF_MEMORY = wire.Failed(1, "exception", "", "", "torch.OutOfMemoryError: CUDA out of memory")


class Torch:
    """What is used of PyTorch: two devices, of which one has been used."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.on_synchronize: Callable[[], object] = lambda: None
        self.cuda = SimpleNamespace(
            is_initialized=lambda: True,
            current_device=lambda: 0,
            device_count=lambda: 3,
            memory_reserved=lambda index: [0, 0, 4096][index],
            synchronize=self.synchronize,
            empty_cache=lambda: self.calls.append("empty_cache"),
        )

    def synchronize(self, index: int) -> None:
        self.calls.append(f"synchronize {index}")
        self.on_synchronize()


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Torch:
    stand_in = Torch()
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    return stand_in


@pytest.fixture
def hanging(torch: Torch, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that does not answer before the test is over."""
    over = threading.Event()
    torch.on_synchronize = over.wait
    monkeypatch.setattr(device, "PROBE_LIMIT_S", 0.05)
    yield
    over.set()


def raising(error: BaseException) -> Callable[[], object]:
    def synchronize() -> None:
        raise error

    return synchronize


def test_devices_that_were_used_are_waited_for(torch: Torch) -> None:
    """The present one, and those with memory; no other, since that would make a context there."""
    assert device.probe_after(FAILED, was_stopped=False) is None
    assert torch.calls == ["synchronize 0", "synchronize 2"]


def test_the_cache_is_given_back_after_an_out_of_memory_error(torch: Torch) -> None:
    assert device.probe_after(OUT_OF_MEMORY, was_stopped=False) is None
    assert torch.calls[-1] == "empty_cache"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CUDA error: device-side assert triggered", RecycleReason.DEVICE_ERROR),
        ("CUDA error: an illegal memory access was encountered", RecycleReason.DEVICE_ERROR),
        ("CUDA error: uncorrectable ECC error encountered", RecycleReason.DEVICE_ERROR),
        ("CUDA error: no CUDA-capable device is detected", RecycleReason.DEVICE_LOST),
        ("HIP error: no ROCm-capable device is detected", RecycleReason.DEVICE_LOST),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", RecycleReason.DEVICE_LOST),
        ("CUDA error: out of memory", None),
    ],
)
def test_what_an_error_means(torch: Torch, text: str, reason: RecycleReason | None) -> None:
    torch.on_synchronize = raising(RuntimeError(text))
    assert device.probe_after(FAILED, was_stopped=False) is reason


@pytest.mark.parametrize("error", [AttributeError("no such thing"), SystemExit(3)])
def test_a_look_that_goes_wrong_means_nothing(torch: Torch, error: BaseException) -> None:
    """What is no error of PyTorch says nothing about the device."""
    torch.on_synchronize = raising(error)
    assert device.probe_after(FAILED, was_stopped=False) is None


def test_something_else_of_that_name_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=None))
    assert device.probe_after(FAILED, was_stopped=False) is None


def test_without_a_context_nothing_is_touched(torch: Torch) -> None:
    torch.cuda.is_initialized = lambda: False
    assert device.probe_after(OUT_OF_MEMORY, was_stopped=False) is None
    assert torch.calls == []


@pytest.mark.usefixtures("hanging")
def test_silence_means_that_the_device_is_lost() -> None:
    assert device.probe_after(FAILED, was_stopped=False) is RecycleReason.DEVICE_LOST


@pytest.mark.usefixtures("hanging")
def test_silence_after_a_stopped_handler_means_that_it_left_work() -> None:
    """Its kernels may still run, and nothing stops them but the end of the process."""
    assert device.probe_after(FAILED, was_stopped=True) is RecycleReason.LEFTOVERS
