"""A source with a @prepare, which can be told to go wrong: PREPARED_FAULTS says how.

Each @prepare and each @init adds a line to the file PREPARED_NOTES: what, and in which process.
"""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

from pydantic import BaseModel

import ogpu.service

NOTES = os.environ["PREPARED_NOTES"]
FAULTS = os.environ.get("PREPARED_FAULTS", "").split(", ")
SIZE_BYTES = int(os.environ.get("PREPARED_SIZE_BYTES", "1"))


class Input(BaseModel):
    text: str = ""


class Output(BaseModel):
    text: str = ""
    pid: int = 0
    pss_bytes: int = 0


weights = b""
loaded_in = 0


def note(what: str) -> None:
    with open(NOTES, "a", encoding="utf-8") as notes:
        notes.write(f"{what} {os.getpid()}\n")


def is_second() -> bool:
    """Tell whether this is another template's @prepare, or another interpreter's."""
    with open(NOTES, encoding="utf-8") as notes:
        return sum(line.startswith("prepare ") for line in notes) > 1


def hang() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    note("hangs")
    time.sleep(3600)


def terminate_what_was_started() -> None:
    """By SIGTERM, as ``with multiprocessing.Pool()`` does at its end; wait for the end of each."""
    started = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])]
    children = [multiprocessing.Process(target=time.sleep, args=(3600,)) for _ in range(2)]
    children[0].start()
    thread = threading.Thread(target=children[1].start)
    thread.start()
    thread.join()
    for one in [*started, *children]:
        one.terminate()
    assert started[0].wait() == -signal.SIGTERM
    for child in children:
        child.join()
        assert child.exitcode == -signal.SIGTERM


def draw_progress_bar() -> None:
    import tqdm.auto

    for _ in tqdm.auto.tqdm(range(3), desc="download"):
        pass
    assert any(thread.name == "tqdm_monitor" for thread in threading.enumerate())


@ogpu.service.prepare()
async def fetch() -> None:
    global weights, loaded_in
    note("prepare")
    print("fetching the weights")
    ogpu.service.logger.info("the weights have %d bytes", SIZE_BYTES)
    await asyncio.sleep(0)
    if "raises" in FAULTS or ("raises later" in FAULTS and is_second()):
        raise RuntimeError("the mirror is down")
    if "dies" in FAULTS:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hangs" in FAULTS or ("hangs later" in FAULTS and is_second()):
        hang()
    if "thread" in FAULTS:
        threading.Thread(target=time.sleep, args=(3600,), daemon=True, name="fetcher").start()
    if "progress bar" in FAULTS:
        draw_progress_bar()
    if "terminates" in FAULTS:
        terminate_what_was_started()
    if "forks" in FAULTS and os.fork() == 0:
        return
    weights = b"x" * SIZE_BYTES
    loaded_in = os.getpid()


@ogpu.service.init()
def load() -> None:
    note("init")
    if awaited := os.environ.get("PREPARED_INIT_WAITS_FOR"):
        while not os.path.exists(awaited):
            time.sleep(0.01)


@ogpu.service.expose()
def look(data: Input) -> Output:
    with open("/proc/self/smaps_rollup", encoding="ascii") as rollup:
        pss = next(line.split()[1] for line in rollup if line.startswith("Pss:"))
    text = f"{len(weights)} bytes from {loaded_in}"
    return Output(text=text, pid=os.getpid(), pss_bytes=int(pss) * 1024)


@ogpu.service.expose()
def draws_and_dies(data: Input) -> Output:
    """End while the lock of the progress bars is held."""
    import tqdm.auto

    tqdm.auto.tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
    return Output()


@ogpu.service.expose(timeout=10)
def draws(data: Input) -> Output:
    draw_progress_bar()
    return Output(text="drawn")


ogpu.service.start()
