"""Large bodies, each in a file of its own beside the database.

Runs in the front, in the journal's thread. SQLite writes what is committed twice, page by page: to
the WAL, and from there to its place. In commits of eight, 1 MiB took 3.7 ms of a core that way and
0.6 in a file; 256 KiB 0.85 and 0.32, 128 KiB 0.32 and 0.26, 64 KiB 0.25 and 0.26 (ext4).

1. Before a commit, its large bodies are written under names that nobody looks for, all of them;
   then each is put on the disk and given its name, and so is the folder.
2. The commit follows: a row with an empty body, which no input and no result has, says that there
   is a file. Where the commit fails, its files are taken back.
3. A commit, or pruning, has deleted the row: the file is deleted after that.
4. The front dies in between: a file without a row is deleted by the next start, before its number
   is given to another task.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import JournalError
from ..logger import logger
from .folder import make_folder

_BEGUN = ".begun"


class FiledBody(NamedTuple):
    """A body that does not go into the database itself; ``table`` has the row that says so."""

    table: str
    number: int
    body: bytes


class Bodies(Protocol):
    """Where large bodies are."""

    @contextmanager
    def written(self, filed: list[FiledBody]) -> Iterator[None]:
        """Have bodies written before their rows are committed; take them back if that fails."""

    def read(self, table: str, number: int) -> bytes | None:
        """Return a body, or None where there is none."""

    def drop(self, table: str, numbers: Iterable[int]) -> None:
        """Delete bodies, if they are here: their rows are deleted."""


class MemoryBodies:
    """The bodies of a journal that is in memory: as they are, without a copy."""

    def __init__(self) -> None:
        self._bodies: dict[tuple[str, int], bytes] = {}

    @contextmanager
    def written(self, filed: list[FiledBody]) -> Iterator[None]:
        """See ``Bodies``."""
        yield
        self._bodies.update({(table, number): body for table, number, body in filed})

    def read(self, table: str, number: int) -> bytes | None:
        """See ``Bodies``."""
        return self._bodies.get((table, number))

    def drop(self, table: str, numbers: Iterable[int]) -> None:
        """See ``Bodies``."""
        for number in numbers:
            self._bodies.pop((table, number), None)


class FileBodies:
    """The bodies in a folder, which is made with the first of them.

    ``has_row`` tells of a table and a number whether there is a row that refers to a file.
    """

    def __init__(self, folder: Path, has_row: Callable[[str, int], bool]) -> None:
        self._folder = folder
        self._names: set[str] = set()  # of files with a row
        if folder.is_dir():
            self._sweep(has_row)

    def _sweep(self, has_row: Callable[[str, int], bool]) -> None:
        for file in self._folder.iterdir():
            table, _, number = file.name.partition("-")
            if number.isdecimal() and has_row(table, int(number)):
                self._names.add(file.name)
            else:
                self._delete(file)

    @contextmanager
    def written(self, filed: list[FiledBody]) -> Iterator[None]:
        """See ``Bodies``.

        Raises:
            JournalError: they cannot be written; nothing is left of them.
        """
        names = {f"{table}-{number}" for table, number, _ in filed}
        try:
            self._write(filed)
            yield
        except BaseException:
            # (One that has a row already was written once more, and is still needed.)
            for name in names - self._names:
                self._delete(self._folder / name)
            raise
        self._names |= names

    def _write(self, filed: list[FiledBody]) -> None:
        begun: list[tuple[int, Path]] = []
        try:
            if filed:
                make_folder(self._folder)
            for table, number, body in filed:
                path = self._folder / f"{table}-{number}{_BEGUN}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                begun.append((os.open(path, flags, 0o600), path))
                _write_all(begun[-1][0], body)
            for descriptor, path in begun:
                os.fdatasync(descriptor)
                # Memory that was not used before is dear (a virtual machine's most), and it is
                # rarely read: without this 1 MiB took up to 2.8 ms instead of 0.4.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                path.rename(path.with_suffix(""))
            if filed:
                _sync_folder(self._folder)
        except OSError as error:
            for _, path in begun:
                self._delete(path)
            raise JournalError(f"{self._folder} cannot be written: {error.strerror}") from error
        finally:
            for descriptor, _ in begun:
                os.close(descriptor)

    def read(self, table: str, number: int) -> bytes | None:
        """See ``Bodies``.

        Raises:
            JournalError: it cannot be read.
        """
        try:
            return (self._folder / f"{table}-{number}").read_bytes()
        except FileNotFoundError:
            logger.error("%s-%d is missing in %s", table, number, self._folder)
            return None
        except OSError as error:
            raise JournalError(f"{self._folder} cannot be read: {error.strerror}") from error

    def drop(self, table: str, numbers: Iterable[int]) -> None:
        """See ``Bodies``."""
        if not self._names:
            return
        for number in numbers:
            name = f"{table}-{number}"
            if name in self._names:
                self._names.remove(name)
                self._delete(self._folder / name)

    def _delete(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:  # the next start tries again
            logger.warning("%s cannot be deleted: %s", file, error.strerror)


def _write_all(descriptor: int, body: bytes) -> None:
    view = memoryview(body)
    while view:  # a disk that gets full takes a part first
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
