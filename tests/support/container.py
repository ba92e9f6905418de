"""A container without an engine: what docker/ says, run in new namespaces, as runc would.

1. Make a root folder: the system and this Python read-only, the volumes, a small /dev/shm, and the
   mounts of the compose file; then make the root itself read-only.
2. In new PID, mount, network and IPC namespaces become the user of the Dockerfile, without
   capabilities and without a way to get any.
3. Execute the CMD of the Dockerfile, with its environment: as PID 1, or below an init.

Nothing of the service under test is changed for it: it listens on port 5555 of its own network.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

import ogpu.service

from .image import Dockerfile, compose_service
from .waiting import wait_until

SHM_BYTES = 64 * 1024
_NAMESPACES = ("--pid", "--mount", "--net", "--ipc", "--uts")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_URL = "http://127.0.0.1:5555"


class Container:
    """One container of the image of a vendor. ``pid``: of its PID 1, as it is called out here."""

    def __init__(
        self,
        folder: Path,
        source: Path,
        volumes: Mapping[str, Path],
        settings: Mapping[str, str],
        *,
        init: Sequence[str] = (),
        with_tmp: bool = True,
        vendor: str = "cpu",
    ) -> None:
        self._file = Dockerfile(vendor)
        service = compose_service(vendor, RENDER_GID="992")
        self._environment = _environment(self._file, service) | settings
        self._log_file = folder / "log"
        self._source_at = self._file.all("WORKDIR")[-1]
        (folder / "root").mkdir(parents=True)
        root = shlex.quote(str(folder / "root"))
        mounts = [
            f"mount -t tmpfs -o mode=755 container {root}",
            # Before what is bound: this Python may be somewhere below /tmp.
            *(line for said in service["tmpfs"] if with_tmp for line in _tmpfs(root, said)),
            *_system(root),
            *_bind(root, str(source), self._source_at),
            *(line for at, place in volumes.items() for line in _bind(root, str(place), at, "rw")),
        ]
        if service["read_only"]:
            mounts.append(f"mount -o remount,ro {root}")
        command = self._as_user(*init, *self._file.command)
        script = "\n".join(["set -e", *mounts, f"exec setsid chroot {root} {shlex.join(command)}"])
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", *_NAMESPACES, "--fork", "sh", "-c", script],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._client = httpx.Client(base_url=_URL, timeout=30, verify=False, trust_env=False)
        outer = psutil.Process(self.process.pid)
        self.pid = wait_until(outer.children, "a first process")[0].pid
        with self._network():
            _bring_up_loopback()

    def _as_user(self, *command: str) -> list[str]:
        user, group = self._file.one("USER").split(":")
        no_rights = ("--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")
        become = ("setpriv", f"--reuid={user}", f"--regid={group}", *no_rights)
        return ["env", f"--chdir={self._source_at}", *become, "--", *command]

    # --- what it says

    @property
    def log(self) -> str:
        return self._log_file.read_text(encoding="utf-8", errors="backslashreplace")

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as ``docker exec`` does."""
        options = ("--pid", "--mount", "--net", "--ipc", "--uts", "--root")
        return subprocess.run(
            ["nsenter", "--target", str(self.pid), *options, *self._as_user(*command)],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    def healthcheck(self) -> tuple[int, str]:
        """Run the health check of the Dockerfile; return its exit code and what it said."""
        kind, *command = self._file.healthcheck["test"]
        assert kind == "CMD"
        done = self.execute(*command)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout

    def processes(self) -> list[psutil.Process]:
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]

    def path(self, inside: str) -> Path:
        """Return where a file of the container can be seen from out here."""
        return Path(f"/proc/{self.pid}/root{inside}")

    # --- its API

    @contextmanager
    def _network(self) -> Iterator[None]:
        """Be in its network: the calling thread, and the sockets that it makes (setns(2))."""
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            inside = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
            try:
                _enter(inside)
                yield
            finally:
                _enter(outside)
                os.close(inside)
        finally:
            os.close(outside)

    def call(self, method: str, path: str, body: object = None, wait_s: int = 0) -> httpx.Response:
        headers = {"prefer": f"wait={wait_s}"} if wait_s else {}
        with self._network():
            return self._client.request(method, path, json=body, headers=headers)

    def run(self, function: str, address: str, **body: object) -> dict[str, Any]:
        """Run a task to its end and return it."""
        answer = self.call("POST", f"/run/{function}/{address}", body, wait_s=20)
        assert answer.status_code == 200, (answer.text, self.log)
        task: dict[str, Any] = answer.json()
        return task

    def state_of(self, address: str) -> str:
        return str(self.call("GET", f"/tasks/{address}").json()["state"])

    # --- waiting, and the end

    def wait_log(self, text: str) -> None:
        def is_there() -> bool:
            assert self.process.poll() is None, f"it ended while starting:\n{self.log}"
            return text in self.log

        wait_until(is_there, f"{text!r} in the log")

    def wait_ready(self) -> Container:
        def is_ready() -> bool:
            assert self.process.poll() is None, f"it ended while starting:\n{self.log}"
            try:
                return self.call("GET", "/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, "ready", timeout_s=20, every_s=0.05)
        return self

    def stop(self, timeout_s: float = 20) -> int:
        """Send SIGTERM to PID 1, as ``docker stop`` does; return the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(10)

    def close(self) -> None:
        self._client.close()
        if self.process.poll() is None:
            self.kill()


def _environment(file: Dockerfile, service: Mapping[str, Any]) -> dict[str, str]:
    """Return the image's, then the compose file's; this Python takes the place of the image's."""
    packages = Path(ogpu.service.__file__).parents[2]
    ours = {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(packages),
        "PYTHONDEVMODE": "1",
        "PYTHONWARNINGS": "error",
    }
    return file.environment | service["environment"] | ours


def _system(root: str) -> Iterator[str]:
    """Give the lines that mount what every container has: a system, /proc, /sys, /dev."""
    packages = Path(ogpu.service.__file__).parents[2]
    bound: list[Path] = []
    for place in (*map(Path, _SYSTEM), Path(sys.base_prefix), Path(sys.prefix), packages):
        if place.is_symlink():  # /bin is a link to /usr/bin
            yield f"ln -s {place.readlink()} {root}{place}"
        elif place.is_dir() and not any(place.is_relative_to(above) for above in bound):
            bound.append(place)
            yield from _bind(root, str(place), str(place))
    yield f"mkdir -p {root}/proc {root}/sys {root}/dev/shm"
    yield f"mount -t proc proc {root}/proc"
    yield f"mount --rbind /sys {root}/sys && mount -o remount,bind,ro {root}/sys"
    for device in _DEVICES:
        yield f"touch {root}/dev/{device} && mount --bind /dev/{device} {root}/dev/{device}"
    yield f"ln -s /proc/self/fd {root}/dev/fd"
    yield f"mount -t tmpfs -o nosuid,nodev,noexec,mode=1777,size={SHM_BYTES} shm {root}/dev/shm"


def _bind(root: str, outside: str, inside: str, mode: str = "ro") -> Iterator[str]:
    place = root + shlex.quote(inside)
    yield f"mkdir -p {place} && mount --bind {shlex.quote(outside)} {place}"
    yield f"mount -o remount,bind,{mode} {place}"


def _tmpfs(root: str, said: str) -> Iterator[str]:
    """Give the line for an entry such as ``/tmp:exec,mode=1777``, with Docker's own options."""
    inside, _, options = said.partition(":")
    place = root + shlex.quote(inside)
    yield f"mkdir -p {place} && mount -t tmpfs -o nosuid,nodev,noexec,{options} tmpfs {place}"


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
