"""The journal's folder: made where it is missing, private, and one front's at a time.

Runs in the front, before the first worker is ordered, so that a second front on the same folder
ends before it loads a model onto a GPU that is in use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from ..errors import JournalError

_LOCK_FILE = "lock"
# The kernel gives a dead front's lock free when it has closed its files, a moment after its death.
_LOCK_WAIT_S = 2.0
_POLL_S = 0.02
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class StateFolder:
    """A locked folder.

    The lock is a record lock (fcntl_locking(2)): it is the process's own, so that neither the
    template nor a worker holds it when the front dies, and the kernel takes it back in any case.
    It would be lost if this process opened and closed the file once more; nobody else does.
    """

    def __init__(self, path: str) -> None:
        """Make the folder and lock it.

        Raises:
            JournalError: it cannot be made or written, or another front has it.
        """
        self.path = Path(path).absolute()
        try:
            make_folder(self.path)
            self._lock = os.open(
                self.path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise _unusable(self.path, error) from error
        try:
            self._acquire()
            os.truncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(self._lock)
            raise _unusable(self.path, error) from error
        except JournalError:
            os.close(self._lock)
            raise

    def private_file(self, name: str) -> Path:
        """Return the path of a file that its owner alone may read, made empty if it is missing."""
        path = self.path / name
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise _unusable(self.path, error) from error
        return path

    def close(self) -> None:
        """Give the folder free."""
        os.close(self._lock)

    def _acquire(self) -> None:
        limit = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise self._taken() from None
                time.sleep(_POLL_S)
            else:
                return

    def _taken(self) -> JournalError:
        owner = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        return JournalError(
            f"OGPU_STATE_DIR={self.path}: the service with pid {owner} uses this folder; "
            "stop it, or give this one a folder of its own"
        )


def make_folder(path: Path) -> None:
    """Make a folder that is there after a power cut, too."""
    if path.is_dir():
        return
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)  # SQLite does the same for the entries in the folder itself
    finally:
        os.close(parent)


def _unusable(path: Path, error: OSError) -> JournalError:
    advice = "give it a folder that it may write (or :memory:, and lose them with the process)"
    if error.errno in _FORBIDDEN:
        advice += f"; in a container: mount a volume there that belongs to user {os.geteuid()}"
    return JournalError(
        f"OGPU_STATE_DIR={path}: {error.strerror}; the service keeps its tasks there, so {advice}"
    )
