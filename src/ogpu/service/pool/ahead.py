"""Orders ahead: what a busy worker may take next, without a word from the front in between.

Runs in the front, on its event loop; the dispatcher asks it.

1. A worker runs a task of a function whose tasks are short, and others wait: the next orders are
   laid into a socket whose reading end the front has as well. Whoever reads an order has it.
2. The worker ends its task, takes the next order, and says so with its answer (``took``). That task
   runs from then on. Until then it waits, whoever asks.
3. It looked too early and took none: the next one goes to it by the channel.
4. Orders are taken back, and their tasks are first in line again: before the worker is killed, when
   one of them is cancelled, when another worker is free and nothing else waits, or when it may be
   (the running task takes longer than its like), and at the end.
5. What cannot be taken back, the worker has: it is about to say so. Where it dies before, it had
   not begun: ``return_all``.
"""

from __future__ import annotations

import time

from .. import wire
from ..config import Settings
from ..handler import Handler
from ..journal import Journal
from ..task import Task
from .batches import Batches
from .estimate import Estimate
from .orders import Orders
from .queue import TaskQueue
from .slot import Slot, SlotState

# How much work may be ahead. Of longer tasks none is: they gain nothing by it (an answer and the
# next order take 0.2 ms), and who waits for one might have run in another worker.
_SHORT_S = 0.005
_LEAST_RUN_S = 1e-5
# With one worker, an echo and 32 clients: 7,200 tasks/s without orders ahead, 7,700 with 4, 8,500
# with 8, 9,700 with 16, 11,000 with 32. The front reads many answers at once then.
_MOST_ORDERS = 64


class Ahead:
    """Which orders are ahead, and whose. ``waiting`` is how many tasks that are."""

    def __init__(
        self,
        slots: list[Slot],
        work: tuple[TaskQueue, Batches, Orders],
        journal: Journal,
        estimate: Estimate,
        rules: tuple[Settings, dict[str, Handler], dict[str, float]],
    ) -> None:
        self._slots = slots
        self._queue, self._batches, self._orders = work
        self._journal = journal
        self._estimate = estimate
        settings, handlers, graces_s = rules
        # A handler that is asked to stop must be the one that was meant, and a task that expires
        # must not have begun.
        self._functions = {
            name
            for name, handler in handlers.items()
            if handler.batching is None and not graces_s[name] and settings.queue_timeout is None
        }
        self.waiting = 0

    # --- giving

    def fill(self) -> None:
        """Let busy workers have the next orders, in turn, where that is of use."""
        rooms = [(slot, self._room(slot)) for slot in self._slots]
        while rooms and self._queue:
            rooms = [(slot, room - 1) for slot, room in rooms if room > 0 and self._give_next(slot)]

    def _give_next(self, slot: Slot) -> bool:
        """Let a busy worker have the next order, if it is one that can wait there."""
        task = self._batches.next_alone()
        if task is None or not self._can_follow(task):
            return False
        order, given = self._orders.ahead(task)
        assert slot.process is not None
        if not slot.process.ahead.put(order, given):
            return False
        self._queue.take([task])
        self._journal.note_given(task, is_given=True)
        slot.ahead[order.run] = task
        self.waiting += 1
        return True

    def _room(self, slot: Slot) -> int:
        if slot.state is not SlotState.BUSY or slot.recycle is not None or len(slot.tasks) != 1:
            return 0
        (task,) = slot.tasks.values()
        if not self._is_short(task.function) or self._is_overdue(slot):
            return 0
        run_s = max(self._estimate.run_of(task.function), _LEAST_RUN_S)
        room = min(_MOST_ORDERS, int(_SHORT_S / run_s)) - len(slot.ahead)
        if slot.max_tasks is not None:
            room = min(room, slot.max_tasks - slot.tasks_done - len(slot.tasks) - len(slot.ahead))
        return room

    def _can_follow(self, task: Task) -> bool:
        if task.input is None or len(task.input) > wire.MAX_AHEAD_BYTES:
            return False
        # One of an earlier front is recorded as running before it may run (``dispatcher.py``).
        return self._is_short(task.function) and not self._orders.must_be_stored(task)

    def _is_short(self, function: str) -> bool:
        return function in self._functions and self._estimate.run_of(function) < _SHORT_S

    # --- taken by the worker

    def begin(self, slot: Slot, run: int) -> Task:
        """Return the task of an order that the worker has taken."""
        self.waiting -= 1
        return slot.ahead.pop(run)

    # --- taking back

    def holder_of(self, task: Task) -> Slot | None:
        """Return the slot that a waiting task was laid down for."""
        if not self.waiting:
            return None
        return next((slot for slot in self._slots if task in slot.ahead.values()), None)

    def take_back(self, slot: Slot) -> bool:
        """Queue again, first in line, what a worker has not taken; return whether that was all."""
        if slot.ahead and slot.process is not None:
            self._queue_again(slot, slot.process.ahead.take_back(len(slot.ahead)))
        return not slot.ahead

    def take_back_first(self, slot: Slot) -> bool:
        """Queue the next task again, whose worker waits; False: it has taken it."""
        if not slot.ahead or slot.process is None:
            return True
        runs = slot.process.ahead.take_back(1)
        self._queue_again(slot, runs)
        return bool(runs)

    def take_back_all(self) -> None:
        """Queue again what no worker has taken."""
        for slot in self._slots:
            self.take_back(slot)

    def take_back_overdue(self) -> None:
        """Queue again what waits for a task that takes longer than its like."""
        if self.waiting and len(self._slots) > 1:
            for slot in self._slots:
                if slot.ahead and self._is_overdue(slot):
                    self.take_back(slot)

    def return_all(self, slot: Slot) -> None:
        """Queue again, first in line, what the worker of a slot that is gone has left."""
        self._queue_again(slot, list(slot.ahead))

    def _queue_again(self, slot: Slot, runs: list[int]) -> None:
        for run in reversed(runs):
            task = slot.ahead.pop(run)
            self._journal.note_given(task, is_given=False)
            self._queue.append_first(task)
            self.waiting -= 1

    def _is_overdue(self, slot: Slot) -> bool:
        """Tell whether another worker might be free sooner, if there is one."""
        return len(self._slots) > 1 and time.monotonic() - slot.began_s > _SHORT_S
