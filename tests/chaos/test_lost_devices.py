"""GPUs that are gone: told in words, and the service ends, since no new worker can cure it.

There is no GPU here. Its device file is an ordinary file in a /dev of the service's own.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from conftest import StartServer
from support.waiting import wait_until

# The rest of /dev is what the interpreter needs.
_OWN_DEV = """
mount -t tmpfs none {folder}
for name in null zero random urandom full tty; do cp -a /dev/$name {folder}/; done
ln -s /proc/self/fd {folder}/fd
mkdir {folder}/shm
touch {folder}/nvidia0 {folder}/nvidiactl
mount --move {folder} /dev
exec "$@"
"""


@pytest.fixture
def own_dev(tmp_path: Path) -> list[str]:
    """Return a command that runs another one with a /dev of its own, with one GPU in it."""
    folder = tmp_path / "dev"
    folder.mkdir()
    command = ["unshare", "--mount", "sh", "-ec", _OWN_DEV.format(folder=folder), "sh"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no mount namespace can be made here")
    return command


def test_a_device_that_is_gone_ends_the_service(
    start_server: StartServer, own_dev: list[str]
) -> None:
    """Not ready, with the cause in words; then exit code 4. What is not a GPU's file may go."""
    server = start_server(prefix=own_dev)
    dev = Path(f"/proc/{server.process.pid}/root/dev")
    (dev / "nvidiactl").unlink()
    task = server.run("echo", "a")
    assert task["state"] == "succeeded"
    assert task["worker"]["device"] == "nvidia:0"  # found by its file alone
    (dev / "nvidia0").unlink()
    wait_until(lambda: server.http.get("/readyz").json().get("reason") == "broken", "broken")
    detail = server.http.get("/readyz").json()["detail"]
    assert "/dev/nvidia0, which was here at the start, is gone" in detail
    assert server.http.get("/readyz").status_code == 503
    assert server.wait_exit() == 4
