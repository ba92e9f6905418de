"""Check main.py with a real service: 50 digits that it did not learn from, and a kill.

Needs the standard library and scikit-learn, and beside the interpreter what main.py needs.
Exit code 0: the digits were read in batches, at least 45 of them correctly, the handler that hangs
was killed at its deadline, and its replacement reads digits; with a GPU, the same with a kernel
that hangs on it. Otherwise 1, with a sentence.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SOURCE = Path(__file__).resolve().parent / "main.py"
LISTENING = "Listening on http://"
ACCURACY = "held-out digits"
START_LIMIT_S = 60.0  # importing torch from a cold disk takes its time
TASK_LIMIT_S = 60  # the first task after the kill waits for a worker, which trains first
STOP_LIMIT_S = 15.0
CLIENTS = 8
DIGITS_SENT = 50
DIGITS_RIGHT_AT_LEAST = 45

Json = dict[str, Any]


class SmokeError(Exception):
    """Something that main.py promises did not happen."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)  # through the `finally` blocks, which stop the service
    with tempfile.TemporaryDirectory(prefix="ogpu-smoke-") as folder:
        log = Path(folder) / "service.log"
        try:
            with _running_service(log) as url:
                _read_digits(url)
                _kill_and_go_on(url, "hang")
                if _has_handler(url, "hang_kernel"):  # where there is a GPU
                    _kill_and_go_on(url, "hang_kernel")
        except SmokeError as error:
            sys.exit(f"{log.read_text(errors='replace')}\nThe smoke test failed: {error}.")
    print("All is well: exit code 0 of the service, too.")


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


@contextmanager
def _running_service(log: Path) -> Iterator[str]:
    """Start main.py on a free port, yield its URL, and stop it whatever happens."""
    ours = ("OGPU_", "CALLBACK_URL")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"OGPU_HOST": "127.0.0.1", "OGPU_PORT": "0"}
    command = [sys.executable, str(SOURCE)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=output, stderr=output
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
        lines = log.read_text(errors="replace").splitlines(keepends=True)
        if listening := [line for line in lines if LISTENING in line and line.endswith("\n")]:
            print(f"Ready after {time.monotonic() - started:.1f} s; its log says:")
            print(*(line for line in lines if ACCURACY in line), sep="", end="")
            port = listening[0].split(LISTENING)[1].split()[0].rpartition(":")[2]
            return f"http://127.0.0.1:{port}"
        if process.poll() is not None:
            raise SmokeError(f"the service ended with exit code {process.returncode} at its start")
        time.sleep(0.05)
    raise SmokeError(f"the service was not ready within {START_LIMIT_S:.0f} s")


def _run(url: str, function: str, address: str, body: Json) -> Json:
    """Run a task and wait for its end."""
    request = urllib.request.Request(
        f"{url}/run/{function}/{address}",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json", "prefer": f"wait={TASK_LIMIT_S}"},
        method="POST",
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=TASK_LIMIT_S + 5) as response:
            task: Json = json.load(response)
    except OSError as error:  # an HTTP error, too
        raise SmokeError(f"{function} {address} got no result: {error}") from error
    if "state" not in task:
        raise SmokeError(f"{function} {address} did not end within {TASK_LIMIT_S} s")
    return task


def _classify(url: str, address: str, pixels: list[float]) -> Json:
    task = _run(url, "classify", address, {"pixels": pixels})
    if task["state"] != "succeeded":
        raise SmokeError(f"classify {address}: {task['state']}, {task['error']}")
    return task


def _held_out() -> tuple[list[list[float]], list[int]]:
    """Return what main.py keeps for checking: the same split, of the same seed."""
    _, images, _, digits = train_test_split(
        *load_digits(return_X_y=True), test_size=0.2, random_state=0
    )
    return images.tolist(), digits.tolist()


def _read_digits(url: str) -> None:
    images, digits = _held_out()
    started = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        addresses = [f"0xdigit{number}" for number in range(DIGITS_SENT)]
        tasks = clients.map(partial(_classify, url), addresses, images)
        right = sum(
            task["result"]["digit"] == digit for task, digit in zip(tasks, digits, strict=False)
        )
    each_ms = (time.monotonic() - started) * 1000 / DIGITS_SENT
    batches = _metric(url, 'ogpu_batch_size_count{function="classify"}')
    print(
        f"{right} of {DIGITS_SENT} digits were read correctly, "
        f"in {batches:.0f} batches and {each_ms:.1f} ms each"
    )
    if right < DIGITS_RIGHT_AT_LEAST:
        raise SmokeError(f"only {right} of {DIGITS_SENT} digits were read correctly")
    if not 0 < batches < DIGITS_SENT / 2:
        raise SmokeError(f"{DIGITS_SENT} digits of {CLIENTS} clients took {batches:.0f} batches")


def _metric(url: str, name: str) -> float:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{url}/metrics", timeout=5) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(name):
                return float(line.split()[-1])
    raise SmokeError(f"/metrics has no {name}")


def _has_handler(url: str, function: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{url}/openapi.json", timeout=5) as response:
        return any(path.startswith(f"/run/{function}/") for path in json.load(response)["paths"])


def _kill_and_go_on(url: str, function: str) -> None:
    killed = _run(url, function, f"0x{function}", {})
    print(f"{function}: {killed['state']}, {killed['error']['message'] if killed['error'] else ''}")
    if killed["state"] != "timed_out":
        raise SmokeError(f"the task that hangs ended as {killed['state']}, not as timed_out")
    images, digits = _held_out()
    started = time.monotonic()
    after = _classify(url, f"0xafter-{function}", images[0])
    waited_s = time.monotonic() - started
    before_pid, after_pid = killed["worker"]["pid"], after["worker"]["pid"]
    print(f"classify, {waited_s:.1f} s later: {after['result']} in pid {after_pid}")
    if before_pid == after_pid or Path(f"/proc/{before_pid}").exists():
        raise SmokeError(f"worker {before_pid} is still there, after its deadline")
    if after["result"]["digit"] != digits[0]:
        raise SmokeError(f"the new worker read a {digits[0]} as {after['result']}")


if __name__ == "__main__":
    main()
