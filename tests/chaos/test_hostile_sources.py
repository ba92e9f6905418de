"""Sources that do what sources should not: each found by review, each must stay harmless."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import StartServer
from support.processes import descendants, is_gone
from support.waiting import wait_until

SOURCE = """
import os, signal, subprocess, sys, threading, time
import ogpu.service
from pydantic import BaseModel
class Model(BaseModel):
    text: str = ""
    number: float = 0
{at_import}
@ogpu.service.init()
def load() -> None:
    {at_init}
@ogpu.service.expose()
def echo(data: Model) -> Model:
    return data
@ogpu.service.expose()
def act(data: Model) -> Model:
    {act}
    return data
ogpu.service.start()
"""


def source(at_import: str = "", at_init: str = "pass", act: str = "pass") -> str:
    return SOURCE.format(at_import=at_import, at_init=at_init, act=act)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    "at_import",
    [
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))",
    ],
    ids=["ignored", "reaped"],
)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_source_that_handles_sigchld_itself(
    start_server: StartServer, at_import: str, method: str
) -> None:
    """The template's waits are its own; workers have the source's handler back."""
    act = "(os._exit(5) if data.text else None)"
    server = start_server(source(at_import, act=act), OGPU_START_METHOD=method)
    for number in range(3):
        task = server.run("act", f"t{number}", {"text": "die"})
        assert task["error"]["exit_code"] == 5
    assert server.run("echo", "a")["state"] == "succeeded"
    assert server.stop() == 0


@pytest.mark.parametrize("ending", ["sys.exit(3)", "1/0", "None"])
def test_a_child_that_a_handler_forks_does_not_answer_for_it(
    start_server: StartServer, ending: str
) -> None:
    """The child ends where the handler would return; the parent's answer is the only one."""
    act = f"data = Model(text='parent') if os.fork() else {ending}"
    server = start_server(source(act=act))
    for number in range(5):
        task = server.run("act", f"t{number}")
        assert (task["state"], task["result"]["text"]) == ("succeeded", "parent")
    assert server.slot()["generation"] == 1


def test_a_front_that_ends_with_news_unread_leaves_nothing(
    start_server: StartServer, tmp_path: Path
) -> None:
    """A port in use: the front leaves while the first worker is being made, with its family."""
    pid_file = tmp_path / "pid"
    at_init = (
        f"open({str(pid_file)!r}, 'w').write(str(subprocess.Popen(['sleep', '600'], "
        "start_new_session=True).pid)); time.sleep(60)"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start_server(source(at_init=at_init), wait=False, OGPU_PORT=taken.getsockname()[1])
        assert server.wait_exit() == 2
    assert "cannot listen" in server.log
    assert "Logging error" not in server.log
    assert "Traceback" not in server.log
    wait_until(lambda: not descendants(), "nothing left", timeout_s=5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_the_families_of_a_lost_template_end_with_it(
    start_server: StartServer, tmp_path: Path, number: signal.Signals
) -> None:
    """The front kills what the template cannot any more; SIGHUP is the front's business alone."""
    pid_file = tmp_path / "pid"
    act = (
        f"open({str(pid_file)!r}, 'w').write(str(subprocess.Popen(['sleep', '600'], "
        "start_new_session=True).pid)); time.sleep(600)"
    )
    # The tests may run under nohup, and an ignored signal is inherited.
    server = start_server(source("signal.signal(signal.SIGHUP, signal.SIG_DFL)", act=act))
    template = parent(server.slot()["pid"])
    server.post("act", "a")
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), "a child")
    child = int(pid_file.read_text())
    os.kill(template, number)
    if number == signal.SIGHUP:
        assert server.http.get("/healthz").status_code == 200
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_exit()
    wait_until(lambda: is_gone(child), "the child is gone", timeout_s=5)


def test_two_services_on_one_port_are_not_both_listening(
    start_server: StartServer, tmp_path: Path
) -> None:
    """The one that is ready later says that the port is taken, and ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    go_on = tmp_path / "go on"
    at_init = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(go_on)!r}), True)]"
    servers = [start_server(source(at_init=at_init), wait=False, OGPU_PORT=port) for _ in range(2)]
    for server in servers:
        server.wait_log("Workers are made by fork")
        server.wait_log("CALLBACK_URL is not set")
    go_on.touch()
    ended = wait_until(
        lambda: [s for s in servers if s.process.poll() is not None], "one of them ends"
    )
    assert [s.process.returncode for s in ended] == [2]
    (other,) = (s for s in servers if s not in ended)
    assert other.wait_ready().run("echo", "a")["state"] == "succeeded"


def test_a_source_that_configures_logging_keeps_ours(start_server: StartServer) -> None:
    """dictConfig() disables every logger that exists, by default; and formats may name the pid."""
    at_import = (
        "import logging, logging.config; logging.config.dictConfig({'version': 1}); "
        "logging.basicConfig(format='%(process)d %(filename)s:%(lineno)d %(message)s', level=20)"
    )
    server = start_server(source(at_import, act="logging.getLogger('own').info('own words')"))
    assert server.run("act", "a")["state"] == "succeeded"
    server.stop()
    assert "Listening on" in server.log
    assert "source0.py:" in server.log
    assert "own words" in server.log
    assert "Logging error" not in server.log


def test_stdout_may_be_replaced_by_anything(start_server: StartServer) -> None:
    act = "sys.stdout = type('Odd', (), {'flush': lambda self: 1/0, 'write': len})()"
    server = start_server(source(act=act))
    assert server.run("act", "a")["state"] == "succeeded"
    assert server.run("echo", "b")["state"] == "succeeded"


def test_an_exception_may_have_any_name_and_any_text(start_server: StartServer) -> None:
    act = "raise type('E' * 2_000_000, (Exception,), {'__str__': lambda self: sys.exit(1)})"
    server = start_server(source(act=act))
    task = server.run("act", "a")
    assert task["error"]["reason"] == "exception"
    assert len(task["error"]["exception"]) < 100_000
    assert server.slot()["generation"] == 1


def test_workers_leave_when_their_tasks_left_too_many_zombies(start_server: StartServer) -> None:
    """A worker adopts its tasks' orphans; it is replaced before they fill the process table."""
    act = "[subprocess.run(['sh', '-c', 'true & true & true & true &']) for _ in range(3)]"
    server = start_server(source(act=act))
    for number in range(60):
        assert server.run("act", f"t{number}")["state"] == "succeeded"
    assert server.slot()["generation"] == 2
    server.wait_log("zombies were left here by tasks")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("form", ["package", "folder"])
def test_a_package_or_folder_with_a_main_file(
    start_server: StartServer, tmp_path: Path, form: str, method: str
) -> None:
    """`python -m package` and `python folder`, which multiprocessing does not import again."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(source())
    command = ["-m", "package"] if form == "package" else ["package"]
    server = start_server(command=command, folder=tmp_path, OGPU_START_METHOD=method)
    assert server.run("echo", "a", {"text": "x"})["result"]["text"] == "x"


def test_closed_standard_descriptors(start_server: StartServer, tmp_path: Path) -> None:
    """`python main.py <&- >&- 2>&-` serves, and ends, like any other."""
    path = tmp_path / "main.py"
    path.write_text(source())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"exec {sys.executable} {path} <&- >&- 2>&-"
    environment = {**os.environ, "OGPU_PORT": str(port), "OGPU_HOST": "127.0.0.1"}
    with subprocess.Popen(["sh", "-c", script], env=environment, cwd=tmp_path) as process:
        try:
            wait_until(lambda: answers(port), "it answers")
            process.terminate()
            assert process.wait(15) == 0
        finally:
            process.kill()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_many_workers_at_once(start_server: StartServer) -> None:
    """More launches than the control socket holds at a time: every slot is filled."""
    server = start_server("import ogpu.service\nogpu.service.start()\n", OGPU_WORKERS=150)
    wait_until(
        lambda: all(s["state"] == "ready" for s in server.workers()["workers"]), "150 ready", 30
    )
    assert server.stop() == 0


def test_a_poisonous_order_is_not_given_for_ever(start_server: StartServer) -> None:
    """Three workers that died before they took a task are enough: `interrupted`."""
    at_import = (
        "import ogpu.service.worker.loop\n"
        "ogpu.service.worker.loop.Worker.serve = lambda *_: time.sleep(0.2) or os._exit(3)"
    )
    server = start_server(source(at_import))
    server.post("echo", "poison", {"text": "x"})
    task = server.wait_state("poison", "failed")
    assert task["error"]["reason"] == "interrupted"
    assert "OGPU_MAX_ATTEMPTS allows no other" in task["error"]["message"]
    assert (task["attempt"], task["error"]["exit_code"]) == (3, 3)


def test_a_repeated_post_of_an_active_task_is_accepted_when_the_queue_is_full(
    start_server: StartServer,
) -> None:
    server = start_server(source(act="time.sleep(600)"), OGPU_QUEUE_SIZE=1)
    server.post("act", "running")
    server.wait_state("running", "running")
    assert server.post("echo", "queued").status_code == 202
    assert server.post("echo", "refused").status_code == 503
    assert server.post("echo", "queued").status_code == 202
    assert server.post("act", "running").status_code == 202


def test_a_requeued_task_is_given_to_whoever_is_ready(start_server: StartServer) -> None:
    """Its own slot is busy with @init for long; the other slot runs it at once."""
    at_init = "time.sleep(0.2 if not os.path.exists('started') else 600)"
    server = start_server(source(at_init=at_init), OGPU_WORKERS=2)
    wait_until(lambda: all(s["state"] == "ready" for s in server.workers()["workers"]), "2 ready")
    folder = Path(f"/proc/{server.process.pid}/cwd").resolve()
    (folder / "started").touch()
    pid = server.slot(0)["pid"]
    os.kill(pid, signal.SIGSTOP)
    server.post("echo", "a", {"text": "x"})
    server.wait_state("a", "running")
    os.kill(pid, signal.SIGKILL)
    task = server.wait_state("a", "succeeded", timeout_s=5)
    assert (task["worker"]["slot"], task["attempt"]) == (1, 2)
