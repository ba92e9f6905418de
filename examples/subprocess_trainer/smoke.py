"""Check main.py with a real service: a training's progress, its failure, and what a deadline does.

Needs the standard library, and ogpu-service beside the interpreter. It checks that

1. progress arrives while a training runs, that its deadline leaves a checkpoint and no process;
2. the same task goes on from there, and its result is a model that has learned;
3. a training that fails fails its task, and says why;
4. one that ignores SIGTERM is killed with its whole tree, and the next one runs.

Exit code 0 if all of it happened; otherwise 1, with a sentence.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

SOURCE = Path(__file__).resolve().parent / "main.py"
LISTENING = "Listening on http://"
START_LIMIT_S = 30.0
TASK_LIMIT_S = 30
STOP_LIMIT_S = 15.0
TIMEOUT_S = 1
FOR_EVER = 1_000_000  # epochs
TREE = 4  # the worker, the launcher, two ranks
GONE_LIMIT_S = 1.0

Json = dict[str, Any]


class SmokeError(Exception):
    """Something that main.py promises did not happen."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)  # through the `finally` blocks, which stop the service
    with tempfile.TemporaryDirectory(prefix="ogpu-smoke-") as name:
        folder = Path(name)
        try:
            with _running_service(folder) as url:
                epochs = _stop_at_the_deadline(url, folder)
                _go_on(url, epochs)
                _fail(url)
                _kill_a_stubborn_tree(url)
        except SmokeError as error:
            log = (folder / "service.log").read_text(errors="replace")
            sys.exit(f"{log}\nThe smoke test failed: {error}.")
    print("All is well: exit code 0 of the service, too.")


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


# --- what is checked


def _stop_at_the_deadline(url: str, folder: Path) -> int:
    """Return how many epochs the checkpoint has that a training left at its deadline."""
    _post(url, "0xlong", {"epochs": FOR_EVER})
    progress, tree = [], set[str]()
    for event, data in _events(url, "0xlong"):
        if event == "progress":
            progress.append(data["fraction"])
            tree = tree or _tree_of_the_worker(url)
    task = _call(url, "/tasks/0xlong")
    print(f"0xlong: {len(progress)} reports of progress, then {task['state']}")
    if task["state"] != "timed_out":
        raise SmokeError(f"the training ended as {task['state']}, not as timed_out")
    if len(progress) < 2 or progress != sorted(progress):
        raise SmokeError(f"its progress was {progress}")
    worker = f"/proc/{task['worker']['pid']}"
    _check_gone({process for process in tree if not process.startswith(worker)}, TREE - 1)
    if _worker_pid(url) != task["worker"]["pid"]:
        raise SmokeError("the worker was killed, though its handler ended within the grace")
    checkpoint = folder / "checkpoints" / "0xlong.json"
    if not checkpoint.exists():
        raise SmokeError("it has left no checkpoint")
    epochs: int = json.loads(checkpoint.read_text())["epoch"]
    print(f"0xlong: its checkpoint has {epochs} epochs, and of its processes none is left")
    return epochs


def _go_on(url: str, epochs: int) -> None:
    _post(url, "0xlong", {"epochs": epochs + 10})
    task = _finished(url, "0xlong")
    if task["state"] != "succeeded":
        raise SmokeError(f"the second run ended as {task['state']}: {task['error']}")
    result = task["result"]
    print(
        f"0xlong, again: from epoch {result['resumed_from']} to {result['epochs']}, "
        f"loss {result['loss']:.3g}"
    )
    if (result["resumed_from"], result["epochs"]) != (epochs, epochs + 10):
        raise SmokeError(f"the second run did not go on from epoch {epochs}: {result}")


def _fail(url: str) -> None:
    _post(url, "0xfail", {"learning_rate": 50})
    task = _finished(url, "0xfail")
    message = (task["error"] or {}).get("message", "")
    print(f"0xfail: {task['state']}, {message.splitlines()[-2] if message else ''}")
    if task["state"] != "failed" or "try a lower learning rate" not in message:
        raise SmokeError(f"the training that cannot converge ended as {task['state']}: {message}")


def _kill_a_stubborn_tree(url: str) -> None:
    _post(url, "0xstubborn", {"epochs": FOR_EVER, "stubborn": True})
    tree = set[str]()
    for event, _ in _events(url, "0xstubborn"):
        if event == "progress" and not tree:
            tree = _tree_of_the_worker(url)
    task = _call(url, "/tasks/0xstubborn")
    if task["state"] != "timed_out":
        raise SmokeError(f"the stubborn training ended as {task['state']}, not as timed_out")
    _check_gone(tree, TREE)
    print(f"0xstubborn: {task['state']}, and of its {len(tree)} processes none is left")
    _post(url, "0xnext", {"epochs": 100})
    after = _finished(url, "0xnext")
    if after["state"] != "succeeded":
        raise SmokeError(f"the training after that ended as {after['state']}: {after['error']}")
    print(f"0xnext: {after['state']} in another worker, loss {after['result']['loss']:.3g}")


# --- processes


def _worker_pid(url: str) -> int:
    (slot,) = _call(url, "/workers")["workers"]
    pid: int = slot["pid"]
    return pid


def _tree_of_the_worker(url: str) -> set[str]:
    """Return the worker and all that it has started, as "/proc/PID start-time"."""
    parents = {}
    starts = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            facts = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        parents[int(folder.name)], starts[int(folder.name)] = int(facts[1]), facts[19]
    tree = {_worker_pid(url)}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return {f"/proc/{pid} {starts[pid]}" for pid in tree}


def _check_gone(tree: set[str], size: int) -> None:
    if len(tree) < size:
        raise SmokeError(f"there were {len(tree)} processes to watch, not {size}")
    limit = time.monotonic() + GONE_LIMIT_S
    while left := [process for process in tree if _is_there(process)]:
        if time.monotonic() > limit:
            raise SmokeError(f"of its processes these are left: {left}")
        time.sleep(0.01)


def _is_there(process: str) -> bool:
    folder, start = process.split()
    try:
        return Path(folder, "stat").read_text().rpartition(")")[2].split()[19] == start
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- the service


@contextmanager
def _running_service(folder: Path) -> Iterator[str]:
    """Start main.py on a free port, yield its URL, and stop it whatever happens."""
    ours = ("OGPU_", "CALLBACK_URL", "CHECKPOINTS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"OGPU_HOST": "127.0.0.1", "OGPU_PORT": "0"}
    environment |= {"OGPU_TASK_TIMEOUT": str(TIMEOUT_S)}
    log = folder / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(SOURCE)], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        yield _wait_for_url(process, log)
    finally:
        process.terminate()
        try:
            exit_code = process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # the workers end with the front
            exit_code = process.wait()
    if exit_code != 0:
        raise SmokeError(f"the service left with exit code {exit_code}")


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    started = time.monotonic()
    while time.monotonic() < started + START_LIMIT_S:
        for line in log.read_text(errors="replace").splitlines(keepends=True):
            if LISTENING in line and line.endswith("\n"):
                port = line.split(LISTENING)[1].split()[0].rpartition(":")[2]
                return f"http://127.0.0.1:{port}"
        if process.poll() is not None:
            raise SmokeError(f"the service ended with exit code {process.returncode} at its start")
        time.sleep(0.02)
    raise SmokeError(f"the service was not ready within {START_LIMIT_S:.0f} s")


def _open(url: str, path: str, body: Json | None = None) -> Any:  # noqa: ANN401 - a response
    request = urllib.request.Request(
        f"{url}{path}", data=None if body is None else json.dumps(body).encode()
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return direct.open(request, timeout=TASK_LIMIT_S)
    except OSError as error:  # an HTTP error, too
        raise SmokeError(f"{path} got no answer: {error}") from error


def _call(url: str, path: str, body: Json | None = None) -> Json:
    with _open(url, path, body) as response:
        answer: Json = json.load(response)
    return answer


def _post(url: str, address: str, body: Json) -> None:
    _call(url, f"/run/train/{address}", body)


def _finished(url: str, address: str) -> Json:
    for _ in _events(url, address):
        pass
    return _call(url, f"/tasks/{address}")


def _events(url: str, address: str) -> Iterator[tuple[str, Json]]:
    """Yield the task's events until it has ended: `event: progress`, `data: {…}`, an empty line."""
    event = ""
    with _open(url, f"/tasks/{address}/events") as lines:
        for line in lines:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                event = value
            elif field == "data":
                yield event, json.loads(value)


if __name__ == "__main__":
    main()
