"""Who gets what: the slots, the device that each of them sees, and its share of the cores.

Runs in the front, at start(); pure. The devices are dealt round: with two devices and three slots
the first device has slots 0 and 2.

What a slot gets is a set of environment variables, which its worker has before any import of its
own. Those that the user has set stay as they are, but for the lists of visible devices, which name
one of what they named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .device import AMD, Device
from .discovery import NO_DEVICE

OPENMP = "OMP_NUM_THREADS"
# These heed OpenMP's number, where they find none of their own.
_FOLLOWERS = (
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_TENSORFLOW = "TF_NUM_INTRAOP_THREADS"
ALLOW_GROWTH = "TF_FORCE_GPU_ALLOW_GROWTH"


@dataclass(frozen=True)
class SlotPlan:
    """What the workers of one slot get."""

    device: Device | None = None
    is_shared: bool = False  # another slot has the same device
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Wishes:
    """What the settings say: ``workers`` is None for ``auto``, ``hide_gpus`` is OGPU_GPUS=none."""

    workers: int | None
    workers_per_gpu: int
    hide_gpus: bool


def deal(
    wishes: Wishes, devices: Sequence[Device], cores: int, environment: Mapping[str, str]
) -> list[SlotPlan]:
    """Return the plan of each slot.

    Example:
        >>> [str(plan.device) for plan in deal(Wishes(3, 1, False), devices, 16, os.environ)]
        ['nvidia:0', 'nvidia:1', 'nvidia:0']
    """
    auto = wishes.workers_per_gpu * len(devices) or 1
    slots = wishes.workers or auto
    shared = share_threads(cores, slots, environment)
    if wishes.hide_gpus:
        shared |= {"CUDA_VISIBLE_DEVICES": NO_DEVICE, "HIP_VISIBLE_DEVICES": NO_DEVICE}
    if not devices:
        return [SlotPlan(environment=shared) for _ in range(slots)]
    plans = []
    for index in range(slots):
        place = index % len(devices)
        is_shared = slots > len(devices) + place  # there is a second one in its place
        own = _variables(devices[place], environment, is_shared=is_shared)
        plans.append(SlotPlan(devices[place], is_shared, shared | own))
    return plans


def share_threads(cores: int, slots: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that hold numeric libraries to a worker's share of the cores."""
    names = [OPENMP, *_FOLLOWERS, _TENSORFLOW]
    if environment.get(OPENMP):  # the user's holds for all that heed it
        names = [_TENSORFLOW]
    share = str(max(1, cores // slots))
    return {name: share for name in names if not environment.get(name)}


def _variables(
    device: Device, environment: Mapping[str, str], *, is_shared: bool
) -> dict[str, str]:
    if device.vendor == AMD:
        variables = {"HIP_VISIBLE_DEVICES": device.visible_as}
    else:
        # The order in which the devices were found, and in which their numbers are meant.
        order = environment.get("CUDA_DEVICE_ORDER") or "PCI_BUS_ID"
        variables = {"CUDA_VISIBLE_DEVICES": device.visible_as, "CUDA_DEVICE_ORDER": order}
    if is_shared and ALLOW_GROWTH not in environment:
        variables[ALLOW_GROWTH] = "true"  # TensorFlow takes the whole device otherwise
    return variables
