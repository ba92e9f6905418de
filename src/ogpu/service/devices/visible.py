"""Which of the GPUs that are here may be used: what ``CUDA_VISIBLE_DEVICES`` and its like say.

Runs in the front; pure. The rules are CUDA's (CUDA C++ Programming Guide, "CUDA Environment
Variables") and PyTorch's (``torch.cuda._parse_visible_devices``), since libraries will read what is
made of it here by the same rules:

1. Not set: all of them, in the vendor's order. Empty, or ``-1`` first: none.
2. The first entry says what all are: numbers, UUIDs (``GPU-…``; a beginning will do, where it
   belongs to one alone), or MIG instances (``MIG-…``).
3. The first entry that means nothing ends the list: those before it count.
4. One that is named twice: the whole list counts for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from .device import AMD, NVIDIA, Device, Found

_NUMBER = re.compile(r"\+?([0-9]{1,9})")
_Entry = tuple[str, Found | None]  # as a worker is to be told, and what is known of it


def visible_nvidia(found: Sequence[Found], environment: Mapping[str, str]) -> list[Device]:
    """Return the NVIDIA devices that a process with this environment would see, in its order."""
    entries = select(environment.get("CUDA_VISIBLE_DEVICES"), found)
    if environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") != "PCI_BUS_ID" and len(found) > 1:
        # The user's order is not the one in which they were found: a number may mean any of them.
        entries = [(text, None if text.isdigit() else one) for text, one in entries]
    return [_device(NVIDIA, entry) for entry in entries]


def visible_amd(found: Sequence[Found], environment: Mapping[str, str]) -> list[Device]:
    """Return the AMD devices that a process with this environment would see, in its order.

    ROCR_VISIBLE_DEVICES comes first, and HIP counts what that leaves. An empty HIP_VISIBLE_DEVICES
    is as good as none; HIP reads CUDA_VISIBLE_DEVICES then.
    """
    left = select(environment.get("ROCR_VISIBLE_DEVICES"), found)
    wanted = environment.get("HIP_VISIBLE_DEVICES") or environment.get("CUDA_VISIBLE_DEVICES")
    entries = select(wanted, [one or Found(uuid=text) for text, one in left])
    return [_device(AMD, entry) for entry in entries]


def select(wanted: str | None, found: Sequence[Found]) -> list[_Entry]:
    """Return the entries of a list of visible devices that count."""
    if wanted is None:
        return [(str(index), one) for index, one in enumerate(found)]
    texts = [text.strip() for text in wanted.split(",")]
    read = _reader(texts[0], found)
    entries: list[_Entry] = []
    for text in texts:
        entry = read(text)
        if entry is None:
            break
        if any(entry[0] == other[0] or _is_same(entry[1], other[1]) for other in entries):
            return []
        entries.append(entry)
    return entries


def as_written(wanted: str) -> list[str]:
    """Return the entries of a list where nobody knows which devices there are."""
    texts = [text.strip() for text in wanted.split(",")]
    stop = next((i for i, text in enumerate(texts) if not text or text[0] == "-"), len(texts))
    return texts[:stop]


def _reader(first: str, found: Sequence[Found]) -> Callable[[str], _Entry | None]:
    if first.startswith("MIG-"):
        return _mig
    if first.startswith("GPU-"):
        return lambda text: _by_uuid(text, found)
    return lambda text: _by_number(text, found)


def _by_number(text: str, found: Sequence[Found]) -> _Entry | None:
    match = _NUMBER.match(text)  # "1gpu" is 1, as for C's strtoul
    if match is None or int(match[1]) >= len(found):
        return None
    index = int(match[1])
    return str(index), found[index]


def _by_uuid(text: str, found: Sequence[Found]) -> _Entry | None:
    if not text.startswith("GPU-"):
        return None
    if all(one.uuid is None for one in found):
        return text, None
    matches = [one for one in found if one.uuid and one.uuid.lower().startswith(text.lower())]
    return (text, matches[0]) if len(matches) == 1 else None


def _mig(text: str) -> _Entry | None:
    """Take an instance as it is named: only the driver knows them. NVML reads it by that name."""
    return (text, Found(uuid=text, source=text)) if text.startswith("MIG-") else None


def _is_same(one: Found | None, other: Found | None) -> bool:
    return one is not None and one is other


def _device(vendor: str, entry: _Entry) -> Device:
    text, one = entry
    return Device(vendor, text) if one is None else Device(vendor, text, one.name, one.source)
