"""The faults of the source `chaos.py`: a function for each, by its name in FAULTS.

Each either returns, raises, dies, or hangs until it is killed. Bounded on purpose, all of them.
"""

import ctypes
import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ogpu.service import wire

PLACE = Path(os.environ["CHAOS_DIR"])
FAULTS: dict[str, Callable[[], object]] = {}
kept: list[object] = []


def hit(*pids: int) -> None:
    """Say which workers a fault is for, beside the one that runs its task."""
    with (PLACE / "hits").open("a") as hits:
        hits.write("".join(f"{pid}\n" for pid in pids))


def sockets() -> list[int]:
    """Return every socket here; the worker's channel is among them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.append(int(name))
        except OSError:  # the one that listed the folder
            continue
    return found


def fault(function: Callable[[], object]) -> Callable[[], object]:
    FAULTS[function.__name__] = function
    return function


@fault
def nothing() -> None:
    return


for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM, signal.SIGSTOP):
    FAULTS[f"{number.name.lower()}_of_itself"] = lambda n=number: os.kill(os.getpid(), n)
FAULTS["leaves_at_once"] = lambda: os._exit(7)
FAULTS["sys_exit"] = lambda: sys.exit(7)
FAULTS["crashes_in_c"] = lambda: ctypes.string_at(0)
FAULTS["hangs_asleep"] = lambda: time.sleep(3600)
FAULTS["hangs_in_c"] = lambda: sum(range(10**14))
FAULTS["hangs_with_the_gil"] = lambda: ctypes.PyDLL(None).sleep(3600)
FAULTS["hangs_in_native_sleep"] = lambda: ctypes.CDLL(None).sleep(3600)
FAULTS["hangs_in_a_regex"] = lambda: re.match(r"(a+)+$", "a" * 64 + "b")


@fault
def raises_no_exception() -> None:
    class Odd(BaseException):
        pass

    raise Odd("not even an Exception")


@fault
def hangs_in_python() -> None:
    while True:
        pass


@fault
def hangs_and_ignores_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    while True:
        time.sleep(1)


# --- on the channel


@fault
def closes_everything() -> None:
    os.closerange(0, 1024)
    time.sleep(3600)


@fault
def closes_everything_and_returns() -> None:
    os.closerange(0, 1024)


@fault
def writes_garbage() -> None:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff" * 4096)
        except OSError:
            continue
    time.sleep(3600)


@fault
def announces_4_gib() -> None:
    for descriptor in sockets():
        os.write(descriptor, struct.pack("!II", 20, 2**32 - 1) + b'["Done",1,true]')
    time.sleep(3600)


@fault
def dies_in_a_frame() -> None:
    for descriptor in sockets():
        os.write(descriptor, struct.pack("!II", 30, 10_000) + b'["Done",1')
    os.kill(os.getpid(), signal.SIGKILL)


@fault
def forges_an_answer() -> None:
    """Answer for the order at hand, or for one that is over, with what is no JSON."""
    payload = b'\xff"},{'
    header = f'["Done",{run_at_hand()},true,{wire.checksum(payload)},null]'.encode()
    for descriptor in sockets():
        os.write(descriptor, struct.pack("!II", len(header), len(payload)) + header + payload)


def run_at_hand() -> int:
    """Return the number of the order that the worker's loop has on its stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        order = frame.f_locals.get("order")
        if hasattr(order, "run"):
            return int(order.run)
        frame = frame.f_back
    return 1


# --- on the output


@fault
def floods_its_output() -> None:
    for _ in range(500):
        os.write(1, (b"y" * 99 + b"\n") * 100)


@fault
def prints_binary() -> None:
    os.write(1, bytes(range(256)) * 400)


@fault
def closes_its_output() -> None:
    os.close(1)
    os.close(2)


@fault
def leaves_its_output_to_a_grandchild() -> None:
    subprocess.run(["sh", "-c", "sleep 3600 &"], check=True)
    os._exit(3)


# --- with a family


@fault
def scatters_its_family() -> None:
    """Start children that try to get away: sessions of their own, orphans, deaf ones."""
    for script in (
        "sleep 3600",
        "setsid sleep 3600 & setsid sh -c 'sleep 3600 & sleep 3600 &'",
        "trap '' 1 2 15; sleep 3600 & (sleep 3600 &)",
    ):
        environment = {"PATH": os.environ["PATH"]}
        subprocess.Popen(["sh", "-c", script], env=environment, start_new_session=True)
    time.sleep(3600)


@fault
def dies_with_a_family() -> None:
    subprocess.run(["sh", "-c", "setsid sleep 3600 & sleep 3600 & (sleep 3600 &)"], check=True)
    os.kill(os.getpid(), signal.SIGKILL)


@fault
def forks_fifty() -> None:
    for number in range(50):
        if os.fork() == 0:
            if number % 2:
                os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1)
    time.sleep(3600)


@fault
def runs_away() -> None:
    """Be another process each millisecond: a chain of forks, each of which ends its parent."""
    if os.fork() == 0:
        os.setsid()
        for _ in range(3000):
            if os.fork():
                os._exit(0)
            time.sleep(0.001)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


@fault
def forks_and_both_return() -> None:
    os.fork()


@fault
def leaves_threads() -> None:
    for daemon in (True, False) * 3:
        threading.Thread(target=time.sleep, args=(3600,), daemon=daemon).start()


# --- with what there is of everything


@fault
def dies_in_its_litter() -> None:
    """Leave files, folders and a socket where temporary files belong."""
    tempfile.mkstemp()
    Path(tempfile.mkdtemp(), "file").write_text("x" * 10_000)
    os.chdir(tempfile.gettempdir())  # the whole path may be too long for a socket (unix(7))
    socket.socket(socket.AF_UNIX).bind("socket")
    os.kill(os.getpid(), signal.SIGKILL)


@fault
def leaks_descriptors() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@fault
def eats_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + 128 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    hoard = []
    try:
        while True:
            hoard.append(bytearray(2**20))
    finally:
        hoard.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- to others


def workers() -> set[int]:
    parent = os.getppid()
    return {int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()}


@fault
def kills_a_sibling() -> None:
    for sibling in workers() - {os.getpid()}:
        hit(sibling)
        os.kill(sibling, signal.SIGKILL)


@fault
def kills_the_template() -> None:
    hit(*workers())
    os.kill(os.getppid(), signal.SIGKILL)


@fault
def stops_the_template() -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    hit(*workers())
