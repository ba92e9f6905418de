"""A load of mixed tasks whose ends are known beforehand, and the judgement of what came of them.

1. ``Load`` posts from several threads to wherever it is aimed, and keeps what it was answered.
2. A test kills what it likes meanwhile, starts it again, and lets it settle.
3. ``complaints`` compares what was answered with what the service says of each task now, with the
   ledger that the handlers wrote (tests/sources/ledger.py), and with what the receiver got.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from typing_extensions import Self

from .server import Server
from .sink import Delivery, Sink
from .waiting import wait_until

BROKEN = 0  # there was no answer: it may have been accepted, or not
REFUSED = 503
# The end of such a task is recorded first, then its worker is killed, then the end is stored: a
# worker that was held up for as long as the timeout may begin in that moment.
_KILL_MOMENT_S = 0.05

# function: state, reason of its error, how often in a hundred
ENDS: dict[str, tuple[str, str | None, int]] = {
    "quick": ("succeeded", None, 51),
    "slow": ("succeeded", None, 20),
    "starts_a_process": ("succeeded", None, 10),
    "fails": ("failed", "exception", 14),
    "hangs": ("timed_out", "timed_out", 5),
}
_TERMINAL = ("succeeded", "failed", "timed_out", "cancelled", "expired")


@dataclass
class Sent:
    """A task, as the client knows it; ``answers``: one for each time that it was posted."""

    function: str
    address: str
    text: str
    number: float
    answers: list[int] = field(default_factory=list)

    @property
    def is_accepted(self) -> bool:
        return 202 in self.answers

    @property
    def possible_tasks(self) -> int:
        """How many tasks of this name there can be: one posted again may be a new one."""
        return sum(answer in (202, BROKEN) for answer in self.answers)

    @property
    def result(self) -> dict[str, object]:
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        named = {"address": self.address, "function": self.function}
        return {**named, "digest": digest, "length": len(self.text)}


def call(url: str, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Return status and JSON of an answer; BROKEN where there is none, REFUSED by a closed port."""
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=15)) as connection:
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except ConnectionRefusedError:
            return REFUSED, None
        except (OSError, http.client.HTTPException):
            return BROKEN, None


class Load:
    """Clients, each in a thread. ``ended``: the ends that the service has shown until now."""

    def __init__(self, seed: int, clients: int = 3) -> None:
        self.sent: list[Sent] = []
        self.ended: dict[str, tuple[object, ...]] = {}
        self.wrong: list[str] = []
        self._url: str | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._again: list[Sent] = []
        self._threads = [
            threading.Thread(target=self._be_a_client, args=(random.Random(seed * 10 + n),))
            for n in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def aim(self, url: str | None) -> None:
        self._url = url

    def _be_a_client(self, rng: random.Random) -> None:
        while not self._over.wait(rng.uniform(0, 0.05)):  # a client thinks between two calls
            url = self._url
            if url is None:
                continue
            if rng.random() < 0.15 and self.sent:
                self._ask(url, rng.choice(self.sent))
            else:
                self._post(url, self._choose(rng))

    def _choose(self, rng: random.Random) -> Sent:
        with self._lock:
            if self._again and rng.random() < 0.3:
                return self._again.pop(rng.randrange(len(self._again)))
            function = rng.choices(list(ENDS), [share for *_, share in ENDS.values()])[0]
            # Most are small; some have more than the journal writes in one statement with others.
            length = rng.choice((3, 30, 300)) if rng.random() < 0.95 else 70_000
            text = ("Zürich\0😀 " * length)[:length]
            sent = Sent(function, f"{function}-{len(self.sent)}", text, rng.uniform(0.02, 0.2))
            self.sent.append(sent)
            return sent

    def _post(self, url: str, sent: Sent) -> None:
        path = f"/run/{sent.function}/{sent.address}"
        status, answer = call(url, "POST", path, {"text": sent.text, "number": sent.number})
        with self._lock:
            sent.answers.append(status)
            if status == BROKEN:
                self._again.append(sent)
            elif status not in (202, REFUSED):
                self.wrong.append(f"{sent}: {status} {answer}")

    def _ask(self, url: str, sent: Sent) -> None:
        was_accepted = sent.is_accepted
        status, task = call(url, "GET", f"/tasks/{sent.address}")
        if status == 200 and task["state"] in _TERMINAL:
            self.ended.setdefault(sent.address, _end_of(task))
        elif was_accepted and status == 404:
            self.wrong.append(f"{sent.address} was accepted, and is not known")


def _end_of(task: dict[str, Any]) -> tuple[object, ...]:
    return task["state"], task["attempt"], task["finished_at"], task["error"], task["result"]


# --- what came of it


def settle(server: Server, timeout_s: float = 60) -> None:
    """Wait until every task has ended, and its end is delivered where somebody is to be told."""

    def everything_is_over() -> bool:
        cursor = ""
        while cursor is not None:
            page = server.http.get(f"/tasks?limit=1000{cursor and f'&cursor={cursor}'}").json()
            for task in page["tasks"]:
                if task["state"] not in _TERMINAL or task["callback"]["state"] == "pending":
                    return False
            cursor = page["next_cursor"]
        return True

    wait_until(everything_is_over, "everything is over", timeout_s, every_s=0.2)


Runs = list[tuple[int, float]]


def read_ledger(path: Path) -> dict[str, Runs]:
    """Return the runs of each address: attempt and time."""
    runs: dict[str, Runs] = defaultdict(list)
    for line in path.read_text().splitlines():
        address, attempt, at = line.split()
        runs[address].append((int(attempt), float(at)))
    return runs


def complaints(
    server: Server, load: Load, ledger: Path, sink: Sink, killed: Collection[int] = ()
) -> list[str]:
    """Return all that is wrong; ``killed``: pids of workers that the test has killed."""
    found = list(load.wrong)
    runs = read_ledger(ledger)
    deliveries: dict[str, list[Delivery]] = defaultdict(list)
    addresses: dict[str, set[str]] = defaultdict(set)
    for delivery in list(sink.deliveries):
        deliveries[delivery.address].append(delivery)
        addresses[delivery.headers["webhook-id"]].add(delivery.address)
    found += [f"{name} was used for {of}" for name, of in addresses.items() if len(of) > 1]
    for sent in load.sent:
        response = server.http.get(f"/tasks/{sent.address}")
        task = response.json() if response.status_code == 200 else None
        ran, got = runs.get(sent.address, []), deliveries.get(sent.address, [])
        if task is None:
            what = ["accepted or delivered, and not known"] if sent.is_accepted or got else []
        else:
            what = [
                *_judge_end(sent, task, load.ended.get(sent.address), killed),
                *_judge_runs(sent, task, ran),
                *_judge_deliveries(sent, task, got),
            ]
        found += [f"{sent}: {wrong}; {task}; runs: {ran}; sent: {got}" for wrong in what]
    return found


def _judge_end(
    sent: Sent, task: Any, shown: tuple[object, ...] | None, killed: Collection[int]
) -> Iterator[str]:
    if sent.possible_tasks == 0:
        yield "refused, and known"
    if shown is not None and sent.possible_tasks == 1 and shown != _end_of(task):
        yield f"it was shown another end: {shown}"
    state, reason, _ = ENDS[sent.function]
    error = task["error"] or {"reason": None, "signal": None}
    end = task["state"], error["reason"]
    its_worker_was_killed = error["signal"] == 9 and task["worker"]["pid"] in killed
    if end != (state, reason) and not (end == ("failed", "worker_died") and its_worker_was_killed):
        yield "ended otherwise than it had to"
    if task["result"] != (sent.result if task["state"] == "succeeded" else None):
        yield "another result"


def _judge_runs(sent: Sent, task: Any, runs: Runs) -> Iterator[str]:
    finished_at = datetime.fromisoformat(task["finished_at"].replace("Z", "+00:00")).timestamp()
    slack_s = _KILL_MOMENT_S if task["state"] == "timed_out" else 0.0
    if any(at > finished_at + slack_s for _, at in runs):
        yield "it ran after its end"
    attempts = [attempt for attempt, _ in runs]
    # Two may be the same: that a run has begun is stored a moment later, and a front that dies
    # sooner counts it again.
    if sent.possible_tasks == 1 and attempts != sorted(attempts):
        yield "attempts go back"
    error = task["error"]
    has_answered = error is None or error["reason"] == "exception"
    if has_answered and attempts[-1:] != [task["attempt"]]:
        yield "the last run is not the attempt that is stored"
    elif attempts and attempts[-1] > task["attempt"]:
        yield "it ran as an attempt that is not stored"


def _judge_deliveries(sent: Sent, task: Any, deliveries: list[Delivery]) -> Iterator[str]:
    if task["callback"]["state"] != ("delivered" if deliveries else "none"):
        yield "not delivered, or without a trace"
    if task["state"] == "succeeded":
        if not deliveries:
            yield "a result was not delivered"
        if any(d.json != sent.result for d in deliveries):
            yield "another result was delivered"
    elif sent.possible_tasks == 1 and any(d.json.get("error") != task["error"] for d in deliveries):
        yield "another failure was delivered, or a result"
    if len({d.headers["webhook-id"] for d in deliveries}) > sent.possible_tasks:
        yield "delivered with several ids"
