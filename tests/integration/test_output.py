"""What workers print and log appears on the front's stderr, whoever prints it."""

from __future__ import annotations

import json

import httpx
import psutil
import pytest

from conftest import StartServer
from support.sentry import SentryReceiver
from support.server import Server
from support.waiting import wait_until


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_everything_a_task_says_is_shown_with_slot_and_task(
    start_server: StartServer, method: str
) -> None:
    """print, stderr, the logger, C code and subprocesses; PYTHONUNBUFFERED is not needed."""
    server = start_server(OGPU_START_METHOD=method)
    server.run("speaks", "0xspeaker")
    server.stop()
    for line in ("from print", "from stderr", "from C", "from a subprocess"):
        assert f"INFO        [worker 0 0xspeaker] {line}\n" in server.log
    assert "WARNING     [worker 0 0xspeaker] from the logger\n" in server.log


def test_json_lines(start_server: StartServer) -> None:
    server = start_server(OGPU_LOG_FORMAT="json")
    server.run("speaks", "a")
    server.stop()
    entries = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    said = {e["message"]: e for e in entries if e.get("task_address") == "a"}
    assert said["from C"]["slot"] == 0
    assert said["from the logger"]["level"] == "WARNING"


def test_output_is_not_written_twice(start_server: StartServer) -> None:
    """What the source left in a buffer before the fork is not written by every worker again."""
    source = """
import sys, ogpu.service
sys.stdout.write("buffered at import, no end of line")
ogpu.service.start()
"""
    server = start_server(source, OGPU_WORKERS=3)
    server.stop()
    assert server.log.count("buffered at import") == 1


def test_a_flood_is_cut_and_harms_nobody(start_server: StartServer) -> None:
    """50 MB of output: the handler is not held up, the rest of the service answers."""
    server = start_server()
    task = server.run("floods", "a", {"number": 5000})
    assert task["result"]["text"] == "done"
    server.run("echo", "b")
    server.stop()
    assert "lines of output were dropped" in server.log
    assert len(server.log) < 20_000_000


def test_long_log_records_stay_whole_lines_and_keep_both_ends(start_server: StartServer) -> None:
    """A traceback of any length is one record; a very long one loses its middle."""
    server = start_server()
    expression = "ogpu.service.logger.error('begin ' + 'ü' * {n} + ' end')"
    server.run("facts", "long", {"text": expression.format(n=8_000)})
    server.run("facts", "longer", {"text": expression.format(n=200_000)})
    server.stop()
    assert f"[worker 0 long] begin {'ü' * 8_000} end\n" in server.log
    assert "[worker 0 longer] begin üüü" in server.log
    assert "ü\n…\nü" in server.log
    assert "üüü end\n" in server.log
    assert "\\u00fc" not in server.log


def test_binary_output_is_shown_escaped(start_server: StartServer) -> None:
    server = start_server()
    assert server.run("speaks_binary", "a")["result"]["text"] == "done"
    server.stop()
    assert "\\xff" in server.log


def test_the_last_lines_are_in_the_record_of_a_failure(start_server: StartServer) -> None:
    server = start_server()
    assert server.run("raises", "a")["error"]["output"] == "about to fail"


def test_the_log_says_how_each_task_ended(start_server: StartServer) -> None:
    server = start_server()
    server.run("echo", "good")
    server.run("raises", "bad")
    server.run("hangs_asleep", "late")
    server.stop()
    assert "✅ SUCCESS   [good] Function: `echo` completed successfully" in server.log
    assert "❌ FAIL      [bad] Error in `raises`: no luck" in server.log
    assert "TIMEOUT [late] `hangs_asleep` timed out after 0.3 s" in server.log


def test_the_settings_and_each_functions_timeout_are_shown_once(start_server: StartServer) -> None:
    server = start_server(OGPU_TASK_TIMEOUT=12)
    assert server.log.count("OGPU_TASK_TIMEOUT=12.0") == 1
    assert "Registered endpoint → /run/echo/{task_address} (timeout 12 s)" in server.log
    assert "Registered endpoint → /run/sleep/{task_address} (timeout 30 s)" in server.log


def listening_port(server: Server) -> int | None:
    """Look for the socket: with OGPU_LOG_LEVEL=ERROR no line tells the port."""
    assert server.process.poll() is None, server.log
    sockets = psutil.Process(server.process.pid).net_connections("tcp")
    return next((s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN), None)


def test_log_level_is_obeyed_in_front_and_workers(start_server: StartServer) -> None:
    source = """
import ogpu.service
from pydantic import BaseModel
class Model(BaseModel): pass
@ogpu.service.expose()
def speak(data: Model) -> Model:
    ogpu.service.logger.info("an info")
    ogpu.service.logger.error("an error")
    return data
ogpu.service.start(log_level="ERROR")
"""
    server = start_server(source, wait=False)
    port = wait_until(lambda: listening_port(server), "listening")
    url = f"http://127.0.0.1:{port}/run/speak/a"
    httpx.post(url, json={}, headers={"Prefer": "wait=9"}).raise_for_status()
    assert server.stop() == 0
    assert "an error" in server.log
    assert "an info" not in server.log
    assert "SUCCESS" not in server.log


def test_sentry_is_told_of_failures_with_todays_tags(start_server: StartServer) -> None:
    """With OGPU_SDK_SENTRY_DSN set, failures and timeouts are events; the SDK's own receiver."""
    with SentryReceiver() as sentry:
        server = start_server(
            OGPU_SDK_SENTRY_DSN=sentry.dsn, SOURCE_ADDRESS="0xsource", PROVIDER_ADDRESS="0xprov",
            PROTOCOL_VERSION="7",
        )  # fmt: skip
        server.run("raises", "bad")
        server.run("hangs_asleep", "late")
        # The SDK's logging integration adds events of its own, which carry no level here.
        levels = lambda: {event.get("level"): event for event in sentry.events}  # noqa: E731
        wait_until(lambda: {"error", "warning"} <= set(levels()), "an error and a warning")
        server.stop()
        events = levels()
    assert "[bad] Error in `raises`" in events["error"]["message"]
    assert "timed out" in events["warning"]["message"]
    tags = events["error"]["tags"]
    assert tags["source_address"] == "0xsource"
    assert tags["provider_address"] == "0xprov"
    assert tags["protocol_version"] == "7"


def test_a_sentry_dsn_without_the_extra_is_said(start_server: StartServer) -> None:
    hidden = "import sys; sys.modules['sentry_sdk'] = None\n"
    source = f"{hidden}import ogpu.service\nogpu.service.start()\n"
    server = start_server(source, OGPU_SDK_SENTRY_DSN="http://key@127.0.0.1:1/1")
    assert "sentry-sdk is not installed" in server.log


def test_closed_output_is_open_again_for_the_next_task(start_server: StartServer) -> None:
    """A handler that closes 1 and 2 does so for itself; the next one prints as ever."""
    server = start_server()
    code = "[os.close(1), os.close(2), open('/dev/null').fileno()]"
    assert server.run("facts", "a", {"text": code})["state"] == "succeeded"
    pid = server.slot()["pid"]
    assert server.run("speaks", "b")["worker"]["pid"] == pid
    said = server.http.get("/tasks/b/logs").text
    assert "from print" in said
    assert "from a subprocess" in said
