"""Tell, with real processes, what becomes of a task that hangs. Run it with `make demo`.

Needs the standard library, and ogpu-service installed beside the interpreter that runs it.

1. Start main.py on a free port, with a sink that receives its callbacks.
2. Send numbers to `factorise`; the results arrive at the sink.
3. Send `sleepy` a task that hangs. At its deadline it is recorded as timed out and its worker is
   killed; another takes the place, and the next task succeeds in it.
4. SIGTERM: exit code 0, and no process is left.

Whatever does not happen ends the demo with a sentence that says so, and with exit code 1.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn, TypeVar

SOURCE = Path(__file__).resolve().parent / "main.py"
LISTENING = "Listening on http://"
# For the story as a whole; what is left of 15 s is for stopping a service that misbehaves.
LIMIT_S = 12.0
STOP_LIMIT_S = 2.0
POLL_S = 0.005
HANGING_S = 0.5  # until the front is asked whether it still answers
LOG_LINES = 15

Found = TypeVar("Found")
Json = dict[str, Any]


class StepFailedError(Exception):
    """Something that this demo promises did not happen."""


@dataclass(frozen=True)
class Clock:
    """The time since the demo began, and until it must be over."""

    started: float

    def tell(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.2f} s  {text}", flush=True)

    def chapter(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def left_s(self) -> float:
        return max(0.0, self.started + LIMIT_S - time.monotonic())

    def wait_for(self, what: str, look: Callable[[], Found | None]) -> Found:
        """Look until there is something; ``what`` completes the sentence "… in time"."""
        while (found := look()) is None:
            if not self.left_s():
                raise StepFailedError(f"{what} did not happen in time")
            time.sleep(POLL_S)
        return found


class Sink:
    """What a network provider has at CALLBACK_URL: here, a queue of (address, result)."""

    def __init__(self) -> None:
        self.received: queue.Queue[tuple[str, Json]] = queue.Queue()
        received = self.received

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                self.send_response(204)
                self.end_headers()
                received.put((self.path.removeprefix("/results/"), json.loads(body)))

            def log_message(self, *_: object) -> None:
                """Leave stderr to the service."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        self.url = f"http://127.0.0.1:{self._server.server_port}/results"
        Thread(target=self._server.serve_forever, args=[POLL_S], daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Service:
    """main.py, running, and the calls that the demo makes to it."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def find_url(self) -> str | None:
        """Read the port off the log; port 0 was asked for, so only the service knows it."""
        lines = self.log.read_text(errors="replace").splitlines(keepends=True)
        for line in lines:
            if LISTENING in line and line.endswith("\n"):
                address = line.split(LISTENING)[1].split()[0]
                return f"http://127.0.0.1:{address.rpartition(':')[2]}"
        if self.process.poll() is not None:
            raise StepFailedError(
                f"the service ended with exit code {self.process.returncode} before it listened"
            )
        return None

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """Make one HTTP call; anything but a 2xx is a failure of the demo."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
            method=method,
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=2) as response:
                answer: Json = json.load(response)
        except urllib.error.HTTPError as error:
            raise StepFailedError(f"{method} {path} was answered {error.code}") from error
        except OSError as error:
            raise StepFailedError(f"{method} {path} got no answer: {error}") from error
        return answer

    def finished(self, address: str) -> Json | None:
        task = self.call("GET", f"/tasks/{address}")
        return None if task["finished_at"] is None else task

    def ready_worker(self) -> Json | None:
        (slot,) = self.call("GET", "/workers")["workers"]
        return slot if slot["state"] == "ready" else None


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)  # through the `finally` blocks, which stop the service
    clock = Clock(time.monotonic())
    with tempfile.TemporaryDirectory(prefix="ogpu-demo-") as folder:
        log = Path(folder) / "service.log"
        try:
            _tell_story(clock, log)
        except StepFailedError as error:
            if log.exists():
                last_lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                print("\nThe last lines of the service's log:", *last_lines, sep="\n  ")
            sys.exit(f"\nThe demo failed: {error}.")
    print(f"\nAll of it happened, in {time.monotonic() - clock.started:.1f} s.")


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _tell_story(clock: Clock, log: Path) -> None:
    sink = Sink()
    try:
        with _running_service(log, sink.url) as service:
            first = _start(clock, service)
            _send_real_tasks(clock, service, sink)
            second = _let_one_hang(clock, service, sink, first)
            _go_on(clock, service, sink, second)
            _stop(clock, service, workers=[first["pid"], second["pid"]])
    finally:
        sink.close()


@contextmanager
def _running_service(log: Path, callback_url: str) -> Iterator[Service]:
    """Start main.py, and stop it whatever happens."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OGPU_")}
    environment |= {"OGPU_HOST": "127.0.0.1", "OGPU_PORT": "0", "CALLBACK_URL": callback_url}
    command = [sys.executable, str(SOURCE)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=stderr, stderr=stderr
        )
    try:
        yield Service(process, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # the workers end with the front
            process.wait()


def _start(clock: Clock, service: Service) -> Json:
    clock.chapter("A service starts: one front, which serves HTTP, and one worker.")
    service.url = clock.wait_for("the start of the service", service.find_url)
    worker = clock.wait_for("the first worker's @init", service.ready_worker)
    clock.tell(f"listening on {service.url}, API docs: {service.url}/docs")
    clock.tell(f"worker: pid {worker['pid']}, generation {worker['generation']}")
    return worker


def _send_real_tasks(clock: Clock, service: Service, sink: Sink) -> None:
    clock.chapter("Tasks are accepted at once; their results arrive at CALLBACK_URL.")
    for count, value in enumerate((12_345_678, 87_654_321, 99_999_989), start=1):
        address = f"0xdemo{count}"
        _factorise(clock, service, address, value)
        _receive(clock, sink, address, value)


def _factorise(clock: Clock, service: Service, address: str, value: int) -> None:
    sent = time.monotonic()
    answer = service.call("POST", f"/run/factorise/{address}", {"value": value})
    took_ms = (time.monotonic() - sent) * 1000
    if answer != {"task_address": address, "status": "accepted"}:
        raise StepFailedError(f"task {address} was not accepted, but answered {answer}")
    clock.tell(f"POST /run/factorise/{address} {value}: {answer['status']} in {took_ms:.1f} ms")


def _receive(clock: Clock, sink: Sink, address: str, value: int) -> None:
    """Wait for a callback, and check it: the factors, multiplied, are the number again."""
    try:
        received, result = sink.received.get(timeout=clock.left_s())
    except queue.Empty:
        raise StepFailedError(f"the callback of {address} did not arrive in time") from None
    product = 1
    for factor in result["factors"]:
        product *= factor
    if (received, product) != (address, value):
        raise StepFailedError(f"the sink received {result} for {received}, not for {value}")
    clock.tell(f"  the sink received, for {address}: {' x '.join(map(str, result['factors']))}")


def _let_one_hang(clock: Clock, service: Service, sink: Sink, worker: Json) -> Json:
    clock.chapter("One task hangs, inside C and holding the interpreter lock. It has 2 s.")
    service.call("POST", "/run/sleepy/0xhang", {"hang": True})
    clock.tell("POST /run/sleepy/0xhang: accepted")
    time.sleep(HANGING_S)
    sent = time.monotonic()
    service.call("GET", "/healthz")
    clock.tell(f"GET /healthz meanwhile: answered in {(time.monotonic() - sent) * 1000:.1f} ms")
    task = clock.wait_for("the end of the hanging task", lambda: service.finished("0xhang"))
    ran_s = (_time(task["finished_at"]) - _time(task["started_at"])).total_seconds()
    if task["state"] != "timed_out" or task["worker"]["pid"] != worker["pid"]:
        raise StepFailedError(f"the hanging task ended as {task['state']}, not as timed_out")
    clock.tell(f"GET /tasks/0xhang: {task['state']}, {ran_s:.3f} s after its start")
    clock.tell(f"  its error: {task['error']['message']}")
    _watch_it_go(clock, worker["pid"], _time(task["deadline"]))
    if not sink.received.empty():
        raise StepFailedError("the sink received something for a task without a result")
    return _watch_the_next(clock, service, worker)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know the Z


def _watch_it_go(clock: Clock, pid: int, deadline: datetime) -> None:
    clock.wait_for(f"the death of worker {pid}", lambda: True if _is_gone(pid) else None)
    late_ms = (datetime.now(deadline.tzinfo) - deadline).total_seconds() * 1000
    clock.tell(f"/proc/{pid}: gone, at most {late_ms:.0f} ms after the deadline")


def _is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def _watch_the_next(clock: Clock, service: Service, before: Json) -> Json:
    worker = clock.wait_for("the replacement of the worker", service.ready_worker)
    if worker["generation"] != before["generation"] + 1 or worker["pid"] == before["pid"]:
        raise StepFailedError(f"the worker was not replaced: it is {worker}")
    clock.tell(
        f"GET /workers: pid {worker['pid']}, generation {worker['generation']}; "
        f"the one before: {worker['last_exit']['reason']}, signal {worker['last_exit']['signal']}"
    )
    return worker


def _go_on(clock: Clock, service: Service, sink: Sink, worker: Json) -> None:
    clock.chapter("The next task succeeds, in the new worker.")
    _factorise(clock, service, "0xnext", 99_400_891)
    _receive(clock, sink, "0xnext", 99_400_891)
    task = clock.wait_for("the end of task 0xnext", lambda: service.finished("0xnext"))
    if (task["state"], task["worker"]["pid"]) != ("succeeded", worker["pid"]):
        raise StepFailedError(f"0xnext: {task['state']} in pid {task['worker']['pid']}")
    clock.tell(f"GET /tasks/0xnext: {task['state']} in pid {task['worker']['pid']}")


def _stop(clock: Clock, service: Service, workers: list[int]) -> None:
    clock.chapter("SIGTERM: the service drains and leaves.")
    family = sorted({*_family(service.process.pid), *workers})
    asked = time.monotonic()
    service.process.terminate()
    try:
        exit_code = service.process.wait(clock.left_s())
    except subprocess.TimeoutExpired:
        raise StepFailedError("the service did not leave after SIGTERM") from None
    if exit_code != 0:
        raise StepFailedError(f"the service left with exit code {exit_code}, not 0")
    clock.tell(f"exit code {exit_code}, after {time.monotonic() - asked:.2f} s")
    left = [pid for pid in family if not _is_gone(pid)]
    if left:
        raise StepFailedError(f"processes {left} are left")
    clock.tell(f"of its processes, {', '.join(map(str, family))}, none is left")


def _family(pid: int) -> list[int]:
    """Return the pids of a process and of all that it and its children have started."""
    entries = Path("/proc").glob("[0-9]*")
    children = [int(entry.name) for entry in entries if _parent_of(entry) == pid]
    return [pid, *(member for child in children for member in _family(child))]


def _parent_of(entry: Path) -> int | None:
    try:
        stat = (entry / "stat").read_text(errors="replace")
    except OSError:  # it ended a moment ago
        return None
    return int(stat.rpartition(")")[2].split()[1])  # "pid (name) state parent ..."


if __name__ == "__main__":
    main()
