"""Every message that crosses between front, template and worker, and how it is framed.

The one file that both sides of the house import. What crosses is JSON and plain bytes; nothing is
pickled, so neither side can be made to run the other's code, and a version number comes first.

A frame on a worker's channel (a stream, ``framing.py``):

    header    a JSON array: the message's name, then its fields in order
    payload   the input or the output of a task: the JSON bytes as they came

A packet on the template's control socket (SOCK_SEQPACKET) is a header alone; file descriptors
travel beside it. A packet in the socket of orders ahead is a frame as on the channel; the front
sends the worker its descriptor, beside one byte, before it sends anything else.

A worker's stdout and stderr carry lines; a line that starts with LOG_MARK is a log record:
``[level, text]`` as JSON.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, fields
from enum import Enum
from operator import attrgetter
from typing import Any, get_args, get_origin, get_type_hints

from pydantic_core import from_json, to_json
from xxhash import xxh3_64_intdigest

from . import framing
from .errors import WireError

PROTOCOL_VERSION = 6

# A header holds names, numbers and at most a traceback that was cut to MAX_TEXT_CHARS.
MAX_HEADER_BYTES = framing.MAX_HEADER_BYTES
MAX_TEXT_CHARS = 64 * 1024
MAX_PROGRESS_CHARS = 1000
MAX_AHEAD_BYTES = 16 * 1024  # the largest input of an order ahead: it has to fit into one packet
# The largest packet on the control socket. A launch order is below 10 kB; JSON makes at most six
# bytes of a character.
MAX_PACKET_BYTES = 128 * 1024
MAX_PACKET_TEXT_CHARS = 8 * 1024

LOG_MARK = "\x1e"
# The file that a worker writes its stacks to: faulthandler writes 100 threads of 100 frames at
# most.
STACKS_BYTES = 128 * 1024

# What the front says to a worker that may listen to nothing else. They are real-time signals, since
# libraries and sources have uses of their own for the others (signal(7)).
DUMP_SIGNAL = signal.SIGRTMIN + 11  # write the stacks of all threads down, and end
ASK_SIGNAL = signal.SIGRTMIN + 12  # raise TaskTimeout in the handler


class RecycleReason(str, Enum):
    """Why a worker wants to be replaced, though it is not at fault for a task."""

    RECYCLE_WORKER = "recycle_worker"  # the handler said so
    MAX_RSS = "max_rss"  # its process tree has grown beyond OGPU_MAX_WORKER_RSS_BYTES
    DEVICE_ERROR = "device_error"  # every later call on its GPU would fail, too (a sticky error)
    DEVICE_LOST = "device_lost"  # its GPU does not answer, or is not there any more
    LEFTOVERS = "leftovers"  # a handler was stopped in time, and left threads or processes


# Nobody changes a message. They are not frozen, since a frozen one takes 0.9 µs to make and these
# 0.2, and four are made for each task.

# --- front → template


@dataclass(slots=True)
class Launch:
    """Make a worker for a slot."""

    slot: int
    generation: int
    max_result_bytes: int
    max_rss_bytes: int | None  # of its whole process tree; beyond it the worker asks to be recycled
    temp_dir: str | None  # a folder of its own, which is there
    log_level: str | None  # None: what the source has chosen
    environment: dict[str, str]  # variables of its own, beside those of the template

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for pair in self.environment.items() for text in pair):
            raise TypeError("an environment is names and values")


@dataclass(slots=True)
class Standby:
    """Have a fresh interpreter ready for the next Launch, where workers are spawned.

    It imports the source with a folder and variables as a worker has them.
    """

    temp_dir: str | None
    environment: dict[str, str]


# --- template → front


@dataclass(slots=True)
class TemplateReady:
    """The template takes orders: its first message, unless @prepare failed.

    ``method`` is ``fork`` or ``spawn``; ``hazard`` says why a fork is not safe, where that was
    found after the source was imported again, or prepared.
    """

    method: str
    hazard: str | None


@dataclass(slots=True)
class PrepareFailed:
    """The source's @prepare failed in the template, which leaves: its last message."""

    exception: str
    message: str
    traceback: str


@dataclass(slots=True)
class Launched:
    """A worker exists. With it: its channel, the read end of its output, its stacks, its pidfd."""

    slot: int
    generation: int
    pid: int
    was_standby: bool


@dataclass(slots=True)
class StandbyLost:
    """The standby is of no use, and ended; the next worker is a fresh interpreter."""

    why: str


@dataclass(slots=True)
class LaunchFailed:
    """No worker could be made (no memory, no process left); nothing is left of the attempt."""

    slot: int
    generation: int
    message: str


@dataclass(slots=True)
class Gone:
    """A worker has been reaped and nothing that it started is left.

    Neither code nor signal is known where the template died before it could tell.
    """

    slot: int
    generation: int
    exit_code: int | None
    signal: int | None

    @classmethod
    def with_code(cls, slot: int, generation: int, code: int | None) -> Gone:
        """Return the message for an exit code, where a negative one means a signal."""
        if code is None:
            return cls(slot, generation, None, None)
        return cls(slot, generation, code if code >= 0 else None, -code if code < 0 else None)


# --- front → worker


@dataclass(slots=True)
class Run:
    """Run a task; the payload is its input. ``run`` numbers the order, so that answers match.

    Orders of one batch come one after the other; ``more`` says how many of them follow. Each is
    answered by itself.

    The deadline comes twice, or not at all: in seconds since 1970, as it is shown, and on the
    monotonic clock, which is one for the whole machine, to count down by. An order ahead has a
    timeout instead: its clock starts when the worker takes it.
    """

    run: int
    function: str
    task_address: str
    attempt: int
    deadline_at: float | None
    deadline_s: float | None
    may_be_asked: bool  # there is a grace after the deadline
    more: int = 0
    timeout_s: float | None = None
    may_spin: bool = False  # wait for the next order awake, for a moment: there is a core to spare


# --- worker → front


@dataclass(slots=True)
class Ready:
    """The worker ran @init and takes tasks. Always the first message, unless init failed.

    ``init_s``: what that took, warm-ups included.
    """

    protocol_version: int
    functions: list[str]
    init_s: float

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.functions):
            raise TypeError("functions are names")


@dataclass(slots=True)
class InitFailed:
    """Importing the source, or running @prepare, @init or a warm-up failed; the worker exits."""

    exception: str
    message: str
    traceback: str


@dataclass(slots=True)
class Done:
    """A task succeeded; the payload is the output model's JSON.

    ``has_output``: what the task printed may not all have been read yet. ``checksum``: the
    output's, since a handler may write to the channel, too. ``recycle``: a ``RecycleReason``, where
    the worker wants to be replaced. ``took``: the order ahead that the worker runs now.
    """

    run: int
    has_output: bool
    checksum: int
    recycle: str | None = None
    took: int | None = None


@dataclass(slots=True)
class Failed:
    """A task failed inside a worker that is well: an exception, or an unusable result."""

    run: int
    reason: str
    message: str
    exception: str | None
    traceback: str | None
    recycle: str | None = None


@dataclass(slots=True)
class Progressed:
    """A running task says how far it is: ``fraction`` is between 0 and 1."""

    run: int
    fraction: float
    message: str | None


Message = (
    Launch
    | Standby
    | TemplateReady
    | PrepareFailed
    | StandbyLost
    | Launched
    | LaunchFailed
    | Gone
    | Run
    | Ready
    | InitFailed
    | Done
    | Failed
    | Progressed
)
_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}
_FIELD_TYPES = {
    name: [
        get_origin(hint) if get_origin(hint) in (list, dict) else hint
        for hint in get_type_hints(kind).values()
    ]
    for name, kind in _TYPES.items()
}
# What a header says of a message: its name, then its fields in order.
_WORDS = {
    kind: attrgetter("__class__.__name__", *(f.name for f in fields(kind)))
    for kind in _TYPES.values()
}


def encode_header(message: Message) -> bytes:
    """Turn a message into its header."""
    return to_json(_WORDS[type(message)](message))


def decode_header(header: bytes) -> Message:
    """Turn a header back into its message.

    Raises:
        WireError: it is not JSON, not a known message, or has other fields.
    """
    try:
        name, *values = from_json(header)
        if not all(map(isinstance, values, _FIELD_TYPES[name])):
            raise TypeError("a field has the wrong type")  # noqa: TRY301 - one way out for all
        message: Message = _TYPES[name](*values)
    except (ValueError, TypeError, KeyError) as error:
        raise WireError(f"not a message of protocol {PROTOCOL_VERSION}: {header[:80]!r}") from error
    return message


def encode_head(message: Message, payload_bytes: int = 0) -> bytes:
    """Turn a message into what comes before its payload in a frame."""
    header = encode_header(message)
    return framing.LENGTHS.pack(len(header), payload_bytes) + header


def encode_frame(message: Message, payload: bytes = b"") -> bytes:
    """Turn a message and its payload into one frame."""
    return encode_head(message, len(payload)) + payload


def encode_parts(message: Message, payload: bytes) -> list[bytes]:
    """Turn a message and its payload into one frame, in parts: a large payload is not copied."""
    head = encode_head(message, len(payload))
    return [head + payload] if len(payload) < framing.LARGE_BYTES else [head, payload]


class FrameDecoder(framing.Decoder[Message]):
    """Cuts a stream into messages and their payloads (``framing.py``).

    Example:
        >>> for message, payload in decoder.feed(sock.recv(65536)): ...
    """

    def __init__(self, max_payload_bytes: int) -> None:
        super().__init__(max_payload_bytes, decode_header)


def checksum(payload: bytes) -> int:
    """Return what tells that a payload is the one that was sent (``Done``).

    CRC-32 took 0.34 ms for 1 MiB, at each end, of 3.7 that front and worker needed for an echo of
    it; this one takes 0.02.
    """
    return xxh3_64_intdigest(payload)


def encode_log(level: int, text: str) -> str:
    """Turn a log record into one line of a worker's output, without the line's end."""
    return LOG_MARK + json.dumps([level, text])


def decode_log(line: str) -> tuple[int, str] | None:
    """Return ``(level, text)`` of a log record's line, or None: the line is ordinary output."""
    if not line.startswith(LOG_MARK):
        return None
    try:
        level, text = json.loads(line[len(LOG_MARK) :])
    except (ValueError, TypeError):
        return None
    return (level, text) if isinstance(level, int) and isinstance(text, str) else None
