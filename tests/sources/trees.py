"""A source whose handlers start trees of processes, in every way that is found in the wild.

Each handler writes the pids of all that it started to the file named by ``text``, and then hangs.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

from pydantic import BaseModel

import ogpu.service


class Data(BaseModel):
    text: str


LAUNCHER = """
import os, subprocess, sys, time
rank = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()}\\\\n'); time.sleep(3600)"
ranks = [subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]],
                          start_new_session=True) for _ in range(3)]
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
for process in ranks:
    process.wait()
"""


def note(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")


def note_and_hang(path: str) -> None:
    note(path)
    time.sleep(3600)


def hang() -> Data:
    while True:
        time.sleep(3600)


@ogpu.service.expose(timeout=3)
def torchrun(data: Data) -> Data:
    """A launcher that starts ranks in sessions of their own and waits for them."""
    subprocess.run([sys.executable, "-c", LAUNCHER, data.text], check=True)
    return data


def pool_of(method: str, path: str) -> None:
    context = multiprocessing.get_context(method)
    for _ in range(3):
        context.Process(target=note_and_hang, args=(path,)).start()


@ogpu.service.expose(timeout=3)
def multiprocessing_fork(data: Data) -> Data:
    pool_of("fork", data.text)
    return hang()


@ogpu.service.expose(timeout=3)
def multiprocessing_spawn(data: Data) -> Data:
    pool_of("spawn", data.text)
    return hang()


@ogpu.service.expose(timeout=3)
def multiprocessing_forkserver(data: Data) -> Data:
    pool_of("forkserver", data.text)
    return hang()


def child(path: str, *steps: object) -> None:
    if os.fork() == 0:
        for step in steps:
            step()
        note_and_hang(path)


@ogpu.service.expose(timeout=3)
def daemons(data: Data) -> Data:
    """Double forks with sessions, groups, and environments of their own."""
    leave = lambda: os.fork() and os._exit(0)  # noqa: E731
    child(data.text, os.setsid, leave)
    child(data.text, leave, os.setsid, leave)
    child(data.text, lambda: os.setpgid(0, 0))
    return hang()


@ogpu.service.expose(timeout=3)
def stopped_and_deaf(data: Data) -> Data:
    """Children that ignore all they can, and one that is stopped."""

    def ignore_all() -> None:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)

    child(data.text, os.setsid, ignore_all)
    child(data.text, os.setsid, ignore_all, lambda: signal.setitimer(signal.ITIMER_REAL, 0))
    child(data.text, lambda: note(data.text), lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return hang()


@ogpu.service.expose()
def keeps_a_child(data: Data) -> Data:
    child(data.text, os.setsid)
    return hang()


@ogpu.service.expose()
def leaves_a_tree(data: Data) -> Data:
    """Succeed, and leave a daemon behind, which the worker keeps until it is recycled."""
    child(data.text, os.setsid, lambda: os.fork() and os._exit(0))
    while not os.path.exists(data.text):
        time.sleep(0.01)
    ogpu.service.RecycleWorker("it leaves a tree behind")
    return data


@ogpu.service.expose()
def echo(data: Data) -> Data:
    return data


ogpu.service.start()
