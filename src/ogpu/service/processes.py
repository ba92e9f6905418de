"""Facts about processes that more than one room needs, straight from the kernel (Linux).

A leaf of the house: it imports nothing of ours. Names in parentheses are the man pages.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from .errors import PlatformError

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LISTS_CHILDREN = Path("/proc/thread-self/children").exists()


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may have: each worker and client takes some."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_standard_descriptors() -> None:
    """Open /dev/null where 0, 1 or 2 is closed: the next file opened would be taken for it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def require_platform() -> None:
    """Check that processes can be supervised here.

    Raises:
        PlatformError: this is not Linux with pidfd (kernel 5.3 or newer).
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        raise PlatformError("ogpu.service needs Linux and a Python that was built with pidfd_open")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        raise PlatformError(
            f"this kernel or its seccomp profile does not offer pidfd_open ({error}); "
            "Linux 5.3 or newer is needed"
        ) from error


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


def become_subreaper() -> None:
    """Let every orphan below this process become its child (PR_SET_CHILD_SUBREAPER(2const))."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(expected_parent: int) -> None:
    """Be killed when the parent dies, whatever this process does then (PR_SET_PDEATHSIG(2const)).

    A parent that died before the call would go unnoticed, hence the comparison after it.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected_parent:
        os._exit(1)


def wake_at_parents_death() -> None:
    """Be continued when the parent dies: stopped (SIGSTOP), this process would not notice it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def thread_count() -> int:
    """Count the threads of this process, those of C libraries included (proc_pid_task(5))."""
    return len(list(Path("/proc/self/task").iterdir()))


def zombie_children() -> int:
    """Count the children of this process's main thread that have ended and were not waited for."""
    return sum(state_of(pid) == "Z" for pid in own_children())


def state_of(pid: int) -> str:
    """Return a process's state as one letter (proc_pid_stat(5)), or "" where there is none."""
    return _state_and_parent(pid)[0]


def would_handle(pid: int, number: int) -> bool:
    """Tell whether a process would run its handler for a signal now (proc_pid_status(5)).

    It would not where it is stopped, or has ended, or where the signal is blocked in its main
    thread, ignored, or has no handler. False as well where nobody can look (no descriptor is left).
    """
    try:
        status = _read(f"/proc/{pid}/status")
    except OSError:
        return False
    facts = dict(line.split(b":\t", 1) for line in status.splitlines() if b":\t" in line)
    if facts[b"State"][:1] in b"TtZX":
        return False
    bit = 1 << (number - 1)
    return bool(int(facts[b"SigCgt"], 16) & bit) and not int(facts[b"SigBlk"], 16) & bit


def own_children() -> set[int]:
    """Return the pids of this process's children.

    A child stays listed, as a zombie at least, until it is waited for, and its pid cannot be
    reused before: whoever is the only one to wait for a child may signal it by its pid.
    """
    return _children_of_process(os.getpid())


def descendants(pid: int | None = None) -> set[int]:
    """Return the pids of all processes below one (None: this one), whichever thread started them.

    Zombies are among them. One that starts or ends meanwhile may be missed.
    """
    found: set[int] = set()
    below = [os.getpid() if pid is None else pid]
    while below:
        children = _children_of_process(below.pop()) - found
        found |= children
        below += children
    return found


def resident_bytes(pid: int) -> int:
    """Return how much of a process is in memory, shared pages included (proc_pid_statm(5))."""
    try:
        statm = _read(f"/proc/{pid}/statm")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(statm.split()[1]) * _PAGE_BYTES


def kill_child(pid: int) -> None:
    """Kill a child of this process, and nothing else that may have got its pid meanwhile.

    Where a source ignores SIGCHLD the kernel reaps children by itself, so that a pid may be free
    again at any moment: what the pidfd means is compared with the children before it is used.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if pid in own_children():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _children_of_process(pid: int) -> set[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - called for each task
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return set().union(*(_children_of_thread(pid, int(thread)) for thread in threads))


def _children_of_thread(pid: int, thread: int) -> set[int]:
    """Return what a thread has started; to a main thread go the orphans, too."""
    try:
        listed = _read(f"/proc/{pid}/task/{thread}/children")
    except ProcessLookupError:
        return set()
    except FileNotFoundError:  # the thread has ended, or a kernel without CONFIG_PROC_CHILDREN
        return set() if _LISTS_CHILDREN else _children_by_scan(pid)
    return {int(child) for child in listed.split()}


def _children_by_scan(parent: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        if _state_and_parent(int(entry.name))[1] == parent:
            found.add(int(entry.name))
    return found


def _read(path: str) -> bytes:
    """Read a file of /proc. Half of what ``Path.read_text`` costs: each thread has one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(descriptor, 4096), b""))
    finally:
        os.close(descriptor)


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it ended between listing and reading
        return "", 0
    # proc_pid_stat(5): "pid (comm) state ppid …", and comm may hold spaces and parentheses
    state, parent, *_ = stat.rpartition(")")[2].split()
    return state, int(parent)
