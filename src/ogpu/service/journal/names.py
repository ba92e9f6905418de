"""Which task a name means: the number of the newest one of each, of all that the database holds.

Runs in the front, on the event loop. In memory, with about 110 bytes a task: an index of addresses
in the database, which come in no order, changes a page of 4 KiB for nearly every task, and took
half of the time of a commit (100,000 tasks, 16 a commit: 32 and 18 µs a row).
"""

from __future__ import annotations


class Names:
    """The newest stored task of each name, by the name's hash."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._functions: set[str] = set()

    def note(self, function: str, address: str, number: int) -> None:
        """Take notice that the database has this task; they may be told of in any order."""
        name = hash((function, address))
        if self._numbers.get(name, 0) < number:
            self._numbers[name] = number
            self._functions.add(function)

    def forget(self, function: str, address: str, number: int) -> None:
        """Take notice that the database has this task no more."""
        name = hash((function, address))
        if self._numbers.get(name) == number:
            del self._numbers[name]

    def numbers(self, address: str, function: str | None) -> dict[str, int]:
        """Return the number of the newest task, by function, or of one function alone.

        It may be of another name with the same hash: look at the task.
        """
        functions = self._functions if function is None else (function,)
        found = {name: self._numbers.get(hash((name, address))) for name in functions}
        return {name: number for name, number in found.items() if number is not None}
