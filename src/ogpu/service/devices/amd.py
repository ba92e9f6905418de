"""AMD's GPUs: the nodes of the kernel driver (KFD) and its files in sysfs. No ROCm call anywhere.

Runs in the front, in the thread of ``watch.py``: reading sysfs may hang with the driver. The files
are described in the kernel's Documentation/gpu/amdgpu, and in amdkfd/kfd_topology.c.
"""

from __future__ import annotations

from pathlib import Path

from .device import Found, Memory


def find(root: Path) -> list[Found]:
    """Return the GPUs that KFD has and this container may use, in KFD's order, which is HIP's."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    if not (root / "dev/kfd").exists() or not nodes.is_dir():
        return []
    numbers = sorted(int(node.name) for node in nodes.iterdir() if node.name.isdigit())
    return [one for number in numbers if (one := _gpu(root, nodes / str(number))) is not None]


def _gpu(root: Path, node: Path) -> Found | None:
    try:
        lines = (node / "properties").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not permitted: a GPU that is another container's
        return None
    facts = {words[0]: words[1] for words in map(str.split, lines) if len(words) == 2}
    minor = facts.get("drm_render_minor", "0")
    # A CPU is a node as well, without SIMD units.
    if facts.get("simd_count", "0") == "0" or not (root / f"dev/dri/renderD{minor}").exists():
        return None
    folder = root / f"sys/class/drm/renderD{minor}/device"
    unique_id = facts.get("unique_id", "0")
    uuid = f"GPU-{int(unique_id):016x}" if unique_id.isdigit() and unique_id != "0" else None
    source = str(folder) if (folder / "mem_info_vram_total").exists() else None
    return Found(_name(folder), uuid, source)


def _name(folder: Path) -> str | None:
    try:
        return (folder / "product_name").read_text(
            encoding="utf-8", errors="replace"
        ).strip() or None
    except OSError:
        return None


def read(folder: str) -> Memory | None:
    """Return how full the memory of a GPU is; None: sysfs does not say."""
    try:
        used, total = (
            int(Path(folder, f"mem_info_vram_{which}").read_text(encoding="ascii"))
            for which in ("used", "total")
        )
    except (OSError, ValueError):
        return None
    return Memory(used, total)
