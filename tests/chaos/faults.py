"""The table: which fault is tried at which moment, and how the guilty task may end. Data alone.

What `Inside` faults do is in tests/sources/chaos_faults.py, what `Outside` ones do in strikes.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Moment(str, Enum):
    """Where in a worker's life the fault comes."""

    IDLE = "idle"  # it waits for an order
    IN_INIT = "in_init"
    AT_DISPATCH = "at_dispatch"  # the order has been sent, and nobody has read it
    IN_HANDLER = "in_handler"
    WHILE_ANSWERING = "while_answering"  # a part of a large answer is in the channel
    WHILE_DYING = "while_dying"  # cancel, deadline and the fault reach the front together


class Inside(str, Enum):
    """What the source does to itself."""

    NOTHING = "nothing"
    SIGKILL = "sigkill_of_itself"
    SIGSEGV = "sigsegv_of_itself"
    SIGABRT = "sigabrt_of_itself"
    SIGTERM = "sigterm_of_itself"
    SIGSTOP = "sigstop_of_itself"
    EXIT_HARD = "leaves_at_once"
    SYS_EXIT = "sys_exit"
    BASE_EXCEPTION = "raises_no_exception"
    CRASH_IN_C = "crashes_in_c"
    HANG_ASLEEP = "hangs_asleep"
    HANG_IN_PYTHON = "hangs_in_python"
    HANG_IN_C = "hangs_in_c"
    HANG_WITH_GIL = "hangs_with_the_gil"
    HANG_NATIVE = "hangs_in_native_sleep"
    HANG_IN_REGEX = "hangs_in_a_regex"
    HANG_DEAF = "hangs_and_ignores_signals"
    CLOSE_ALL = "closes_everything"
    CLOSE_ALL_RETURN = "closes_everything_and_returns"
    GARBAGE = "writes_garbage"
    ANNOUNCE_4_GIB = "announces_4_gib"
    DIE_IN_FRAME = "dies_in_a_frame"
    FORGE = "forges_an_answer"
    FLOOD = "floods_its_output"
    BINARY = "prints_binary"
    CLOSE_OUTPUT = "closes_its_output"
    GRANDCHILD_HAS_OUTPUT = "leaves_its_output_to_a_grandchild"
    FAMILY = "scatters_its_family"
    DIE_WITH_FAMILY = "dies_with_a_family"
    FORK_FIFTY = "forks_fifty"
    FORK_CHAIN = "runs_away"
    FORK_RETURNS = "forks_and_both_return"
    THREADS = "leaves_threads"
    DESCRIPTORS = "leaks_descriptors"
    LITTER = "dies_in_its_litter"
    MEMORY = "eats_memory"
    KILL_SIBLING = "kills_a_sibling"
    KILL_TEMPLATE = "kills_the_template"
    STOP_TEMPLATE = "stops_the_template"


class Outside(str, Enum):
    """What others do: the kernel, an operator, a client, the receiver."""

    SIGKILL = "worker_gets_sigkill"
    SIGSEGV = "worker_gets_sigsegv"
    SIGABRT = "worker_gets_sigabrt"
    SIGTERM = "worker_gets_sigterm"
    SIGSTOP = "worker_gets_sigstop"
    CANCEL = "task_is_cancelled"
    CLIENT_LEAVES = "client_leaves"
    RECEIVER_RESETS = "receiver_resets"
    FRONT_PAUSED = "front_is_paused_over_the_deadline"
    TEMPLATE_PAUSED = "template_is_paused"
    TEMPLATE_SIGKILL = "template_gets_sigkill"
    TEMPLATE_SIGSTOP = "template_gets_sigstop"


Fault = Inside | Outside
Ends = frozenset[str]

SUCCEEDED: Ends = frozenset({"succeeded"})
EXCEPTION: Ends = frozenset({"failed/exception"})
DIED: Ends = frozenset({"failed/worker_died"})
TIMED_OUT: Ends = frozenset({"timed_out"})
CANCELLED: Ends = frozenset({"cancelled"})
# Several ends arrived at once: one of them is recorded, and which is nobody's right.
ANY_KILL: Ends = DIED | TIMED_OUT | CANCELLED
# Its workers die with the template; a task that none had begun runs on one of the next.
TEMPLATE_LOST: Ends = DIED | SUCCEEDED | frozenset({"failed/interrupted"})


@dataclass(frozen=True)
class Row:
    """One fault at one moment; ``ends``: how the guilty task may end, where there is one."""

    moment: Moment
    fault: Fault
    ends: Ends

    @property
    def id(self) -> str:
        return f"{self.moment.value}-{self.fault.value}"

    @property
    def function(self) -> str:
        """Return the handler: one with a short timeout where only that ends the task."""
        return "hang" if self.ends >= TIMED_OUT else "act"

    @property
    def hangs_in_init(self) -> bool:
        """Tell whether only OGPU_INIT_TIMEOUT ends it."""
        return self.moment is Moment.IN_INIT and self.fault in (*_HANGING, Outside.SIGSTOP)


_DEADLY = (
    Inside.SIGKILL, Inside.SIGSEGV, Inside.SIGABRT, Inside.SIGTERM, Inside.EXIT_HARD,
    Inside.CRASH_IN_C, Inside.CLOSE_ALL, Inside.GARBAGE, Inside.ANNOUNCE_4_GIB,
    Inside.DIE_IN_FRAME, Inside.GRANDCHILD_HAS_OUTPUT, Inside.DIE_WITH_FAMILY, Inside.FORK_CHAIN,
    Inside.LITTER,
)  # fmt: skip
_HANGING = (
    Inside.HANG_ASLEEP, Inside.HANG_IN_PYTHON, Inside.HANG_IN_C, Inside.HANG_WITH_GIL,
    Inside.HANG_NATIVE, Inside.HANG_IN_REGEX, Inside.HANG_DEAF, Inside.SIGSTOP, Inside.FAMILY,
    Inside.FORK_FIFTY,
)  # fmt: skip
_SIGNALS = (Outside.SIGKILL, Outside.SIGSEGV, Outside.SIGABRT, Outside.SIGTERM)
TEMPLATES_END = (
    Inside.KILL_TEMPLATE, Inside.STOP_TEMPLATE, Outside.TEMPLATE_SIGKILL, Outside.TEMPLATE_SIGSTOP,
)  # fmt: skip

_TABLE: dict[Moment, tuple[tuple[Ends, tuple[Fault, ...]], ...]] = {
    Moment.IDLE: (
        # The guilty task has answered; what it left behind acts when nothing runs.
        (SUCCEEDED, (*(f for f in _DEADLY if f is not Inside.CLOSE_ALL), Inside.FORGE)),
        (SUCCEEDED, (Inside.FLOOD, Inside.CLOSE_OUTPUT)),
        (SUCCEEDED, (Inside.DESCRIPTORS, Inside.MEMORY, Inside.KILL_SIBLING)),
        (SUCCEEDED, (*_SIGNALS, Outside.CLIENT_LEAVES, *TEMPLATES_END)),
        (TIMED_OUT, (Outside.SIGSTOP, Inside.SIGSTOP)),
        (DIED, (Inside.CLOSE_ALL,)),
    ),
    Moment.IN_INIT: (
        (frozenset(), (*_DEADLY, Inside.SYS_EXIT, Inside.BASE_EXCEPTION, Inside.MEMORY)),
        (frozenset(), (Inside.CLOSE_ALL_RETURN, Inside.FLOOD, Inside.FORK_RETURNS, Inside.THREADS)),
        (frozenset(), (Inside.SIGSTOP, Inside.HANG_WITH_GIL, Inside.HANG_DEAF, Inside.FAMILY)),
        (frozenset(), (*_SIGNALS, Outside.SIGSTOP, *TEMPLATES_END)),
    ),
    Moment.AT_DISPATCH: (
        (SUCCEEDED, (*_SIGNALS, Outside.CLIENT_LEAVES)),
        (TIMED_OUT, (Outside.SIGSTOP, Outside.FRONT_PAUSED)),
        (CANCELLED, (Outside.CANCEL,)),
        (TEMPLATE_LOST, (Outside.TEMPLATE_SIGKILL, Outside.TEMPLATE_SIGSTOP)),
    ),
    Moment.IN_HANDLER: (
        (DIED, (*_DEADLY, Inside.CLOSE_ALL_RETURN, Inside.FORGE, *_SIGNALS)),
        (TIMED_OUT, (*_HANGING, Outside.SIGSTOP, Outside.FRONT_PAUSED)),
        (EXCEPTION, (Inside.SYS_EXIT, Inside.BASE_EXCEPTION, Inside.DESCRIPTORS, Inside.MEMORY)),
        (SUCCEEDED, (Inside.FLOOD, Inside.BINARY, Inside.CLOSE_OUTPUT, Inside.FORK_RETURNS)),
        (SUCCEEDED, (Inside.THREADS, Inside.KILL_SIBLING)),
        (SUCCEEDED, (Outside.CLIENT_LEAVES, Outside.RECEIVER_RESETS)),
        (CANCELLED, (Outside.CANCEL,)),
        (TEMPLATE_LOST, TEMPLATES_END),
    ),
    Moment.WHILE_ANSWERING: (
        (DIED, (*(f for f in _DEADLY if f is not Inside.CLOSE_ALL), *_SIGNALS)),
        # Who is in send(2) already goes on sending on a socket that another thread closes.
        (DIED | SUCCEEDED, (Inside.CLOSE_ALL,)),
        (TIMED_OUT, (Inside.SIGSTOP, Outside.SIGSTOP)),
        (SUCCEEDED, (Inside.FLOOD, Inside.MEMORY, Inside.THREADS)),
        (SUCCEEDED, (Outside.CLIENT_LEAVES, Outside.RECEIVER_RESETS)),
        (CANCELLED | SUCCEEDED, (Outside.CANCEL,)),
        (TEMPLATE_LOST, TEMPLATES_END),
    ),
    Moment.WHILE_DYING: (
        (ANY_KILL, (*_DEADLY, *_SIGNALS, Outside.SIGSTOP, Outside.CANCEL)),
        (ANY_KILL | TEMPLATE_LOST, TEMPLATES_END),
        (ANY_KILL, (Inside.HANG_DEAF, Inside.FAMILY, Inside.FORK_FIFTY, Inside.HANG_WITH_GIL)),
        (ANY_KILL | SUCCEEDED, (Inside.NOTHING,)),
        (CANCELLED, (Outside.TEMPLATE_PAUSED,)),
    ),
}  # fmt: skip

ROWS = tuple(
    Row(moment, fault, ends)
    for moment, groups in _TABLE.items()
    for ends, faults in groups
    for fault in faults
)
