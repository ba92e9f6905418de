"""A folder for temporary files for each worker, which goes when the worker is gone.

A worker that was the standby has two: what the import of the source has made is in the standby's.

Runs in the front. All of a service's folders are in one, which the template removes where the front
was killed, and the next start where both were: its lock file is then locked by nobody.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from ..logger import logger

# Short: the path of a Unix socket has 107 characters at most (unix(7)), and some live in here.
_PREFIX = "ogpu-"
_LOCK = "lock"


class ScratchFolders:
    """Owns the folder of one service.

    Where there is no place for temporary files (a read-only file system), workers get none of their
    own, and the log says so.
    """

    def __init__(self) -> None:
        self._base: Path | None = None
        self._lock_fd = -1
        self._standbys = 0  # how many folders a standby has had
        self._of_standby: Path | None = None  # which is used for the next one, if one is lost
        self._taken: dict[tuple[int, int], Path] = {}  # by the worker that was the standby
        try:
            place = Path(tempfile.gettempdir())
            _sweep(place)
            base = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            self._lock_fd = _locked(base)
            self._base = base
        except OSError as error:
            logger.warning("Workers have no folders of their own for temporary files: %s", error)

    def make(self, slot: int, generation: int) -> str | None:
        """Make a worker's folder and return its path; None: there is no place for it."""
        if self._base is None:
            return None
        return _made(self._base / f"{slot}-{generation}", f"Worker {slot}")

    def make_for_standby(self) -> str | None:
        """Make the folder of a standby, where there is none, and return its path, as ``make``."""
        if self._base is None:
            return None
        if self._of_standby is None:
            self._standbys += 1
            folder = self._base / f"standby-{self._standbys}"
            if _made(folder, "The standby") is not None:
                self._of_standby = folder
        return str(self._of_standby) if self._of_standby else None

    def take_from_standby(self, slot: int, generation: int) -> None:
        """Let the folder of the standby go with the worker that it has become."""
        if self._of_standby is not None:
            self._taken[slot, generation] = self._of_standby
            self._of_standby = None

    def remove(self, slot: int, generation: int) -> None:
        """Remove the folder of a worker that is gone. Slow where much is in it."""
        if self._base is not None:
            _remove(self._base / f"{slot}-{generation}")
        if (taken := self._taken.pop((slot, generation), None)) is not None:
            _remove(taken)

    def close(self) -> None:
        """Remove all of them."""
        if self._base is not None:
            _remove(self._base)
            self._base = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _made(folder: Path, whose: str) -> str | None:
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        logger.warning("%s has no folder for temporary files: %s", whose, error)
        return None
    return str(folder)


def _locked(folder: Path) -> int:
    """Make a locked lock file; it has its name only then, for others look for it."""
    unnamed = folder / "lock.new"
    lock_fd = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # A forked child does not hold it (fcntl(2)).
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / _LOCK)
    except OSError:
        os.close(lock_fd)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return lock_fd


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%s cannot be removed", folder)


def _sweep(place: Path) -> None:
    """Remove the folders of services that were killed together with their templates."""
    for folder in place.glob(f"{_PREFIX}*"):
        try:
            lock_fd = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # not ours: no such file, or another user's
            continue
        try:
            fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its service lives
            continue
        else:
            _remove(folder)
        finally:
            os.close(lock_fd)
