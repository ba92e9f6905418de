"""Which cgroup this process is in, and where its files are seen (cgroups(7)).

A leaf of the house: it imports nothing of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Cgroup:
    """Where a cgroup is seen: its folder, below ``mount_point``, in version 1 or 2."""

    version: int
    folder: PurePosixPath
    mount_point: PurePosixPath

    @property
    def folders(self) -> Iterator[Path]:
        """Its own folder, and those of the cgroups above it, as far as they are seen."""
        for folder in (self.folder, *self.folder.parents):
            yield Path(folder)
            if folder == self.mount_point:
                return


def cgroup_of(proc: Path, controller: str) -> Cgroup:
    """Return the cgroup that a process is in, for one controller.

    Args:
        proc: the folder of the process in /proc.
        controller: for example ``memory``, or ``cpu``.

    Raises:
        OSError: its files cannot be read.
        ValueError: it is in none, or no mount shows it; the message says which.
    """
    return find_cgroup(controller, read_text(proc / "cgroup"), read_text(proc / "mountinfo"))


def find_cgroup(controller: str, cgroups: str, mounts: str) -> Cgroup:
    """Find the cgroup of a process from its /proc files ``cgroup`` and ``mountinfo``.

    Raises:
        ValueError: it is in none, or no mount shows it; the message says which.
    """
    version, path = _path(controller, cgroups)
    for mount in mounts.split("\n"):
        # proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields;
        # then, after a hyphen, the file system's type, the source, and its own options.
        place, _, kind = mount.partition(" - ")
        fields, kinds = place.split(" "), kind.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if version == 2:
            has_controller = kinds[0] == "cgroup2"
        else:
            has_controller = kinds[0] == "cgroup" and controller in kinds[2].split(",")
        root, mount_point = (PurePosixPath(_unescape(field)) for field in fields[3:5])
        # A container sees a part of the hierarchy; and a root such as "/.." is one that was
        # mounted outside of this cgroup namespace (cgroup_namespaces(7)).
        if (
            has_controller
            and path.is_relative_to(root)
            and ".." not in path.relative_to(root).parts
        ):
            return Cgroup(version, mount_point / path.relative_to(root), mount_point)
    raise ValueError(f"no mount of cgroup v{version} shows the {controller} cgroup {path}")


def _path(controller: str, cgroups: str) -> tuple[int, PurePosixPath]:
    """Return version and path of the cgroup.

    Where both versions are mounted, the controller is in one of them: in v1 if a line there names
    it.
    """
    unified = None
    for line in cgroups.split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return 1, PurePosixPath(path)
        if (hierarchy, controllers) == ("0", "") and path:
            unified = PurePosixPath(path)
    if unified is None:
        raise ValueError(f"this process is in no {controller} cgroup")
    return 2, unified


def read_text(file: Path) -> str:
    """Read a file. A path in it that is no UTF-8 is not found then, but can be shown and stored."""
    return file.read_text(encoding="utf-8", errors="backslashreplace")


def _unescape(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
