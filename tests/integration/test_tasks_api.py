"""The calls about tasks: get, list, cancel, logs, callback again, and waiting for an end."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import StartServer
from support.processes import is_gone
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
NOBODY = {"state": "none", "attempts": 0, "last_error": None}
WORKER = {"slot": 0, "generation": 1, "pid": int, "device": None}
NO_EVIDENCE = {
    "exception": None, "traceback": None, "signal": None, "exit_code": None, "stack": None,
    "output": None,
}  # fmt: skip
QUEUED = {
    "state": "queued", "attempt": 1, "accepted_at": TIME, "started_at": None, "finished_at": None,
    "deadline": None, "worker": None, "progress": None, "result": None, "error": None,
    "callback": NOBODY,
}  # fmt: skip
RUNNING = QUEUED | {"state": "running", "started_at": TIME, "worker": WORKER}
ENDED = RUNNING | {"finished_at": TIME}


def error(reason: str, message: str, **evidence: object) -> dict[str, object]:
    return {"reason": reason, "message": re.compile(message), **NO_EVIDENCE, **evidence}


def assert_is(found: object, wanted: object, where: str = "task") -> None:
    """Compare, field by field; a type or a pattern stands for every value that fits it."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict), where
        assert set(found) == set(wanted), where
        for name, part in wanted.items():
            assert_is(found[name], part, f"{where}.{name}")
    elif isinstance(wanted, re.Pattern):
        assert isinstance(found, str), where
        assert wanted.fullmatch(found), (where, found)
    elif isinstance(wanted, type):
        assert type(found) is wanted, (where, found)
    else:
        assert found == wanted, where


def names(page: httpx.Response) -> list[str]:
    assert page.status_code == 200, page.text
    assert set(page.json()) == {"tasks", "next_cursor"}
    return [task["task_address"] for task in page.json()["tasks"]]


def test_a_task_as_json_in_every_state(start_server: StartServer) -> None:
    """Every field of the design, and no other, as GET /tasks/… and GET /tasks show it."""
    server = start_server(OGPU_QUEUE_TIMEOUT=0.5)
    echoed = {"text": "x", "pid": int, "when": None, "number": 0.0}
    traceback = re.compile(r"Traceback .*no luck\n", re.DOTALL)
    raised = error(
        "exception", "no luck", exception="ValueError", traceback=traceback, output="about to fail"
    )
    timed_out = error("timed_out", r"`hangs_asleep` timed out after 0.3 s.*", signal=9, stack=str)
    killed = error(
        "cancelled", "`unlimited_sleep` was cancelled while it ran.*", signal=9, stack=str
    )
    later = WORKER | {"generation": 2}
    wanted: dict[tuple[str, str], dict[str, Any]] = {
        ("echo", "good"): ENDED | {"state": "succeeded", "result": echoed},
        ("raises", "bad"): ENDED | {"state": "failed", "error": raised},
        ("hangs_asleep", "late"): ENDED
        | {"state": "timed_out", "deadline": TIME, "error": timed_out},
        ("unlimited_sleep", "busy"): RUNNING | {"worker": later},
        ("echo", "waits"): QUEUED,
        ("rich", "dropped"): QUEUED
        | {
            "state": "cancelled",
            "finished_at": TIME,
            "error": error("cancelled", "`rich` was cancelled before it ran"),
        },
    }
    server.run("echo", "good", {"text": "x"})
    server.run("raises", "bad")
    server.run("hangs_asleep", "late")
    server.post("unlimited_sleep", "busy", {"number": 60})
    server.wait_state("busy", "running")
    server.post("rich", "dropped")
    assert_is(
        server.http.delete("/tasks/dropped").json(),
        {"task_address": "dropped", "function": "rich", **wanted["rich", "dropped"]},
    )
    server.post("echo", "waits")
    whole = {
        address: {"task_address": address, "function": function, **fields}
        for (function, address), fields in wanted.items()
    }
    page = {task["task_address"]: task for task in server.http.get("/tasks").json()["tasks"]}
    assert page["waits"]["state"] == "queued"  # the rest of the test may take its time
    assert set(page) == set(whole)
    for address, task in whole.items():
        assert_is(page[address], task, address)
        if address != "waits":
            assert server.task(address) == page[address]
    expired = server.wait_state("waits", "expired", timeout_s=5)
    why = error("expired", r"`echo` waited for more than 0.5 s \(OGPU_QUEUE_TIMEOUT\)")
    assert_is(expired, whole["waits"] | {"state": "expired", "finished_at": TIME, "error": why})
    cancelled = server.http.delete("/tasks/busy").json()
    assert_is(
        cancelled,
        whole["busy"] | {"state": "cancelled", "finished_at": TIME, "error": killed},
    )
    assert server.task("busy") == cancelled


def test_first_requests_at_once_are_all_answered(start_server: StartServer) -> None:
    """FastAPI is made once for all of them, and tasks and the health check do not wait for it."""
    server = start_server()
    paths = ["/tasks?limit=1", "/openapi.json", "/docs", "/healthz", "/tasks/a", "/nowhere"]
    with ThreadPoolExecutor(len(paths) + 1) as clients:
        answers = [clients.submit(httpx.get, server.url + path, timeout=10) for path in paths]
        ran = clients.submit(server.run, "echo", "beside")
        assert [answer.result().status_code for answer in answers] == [200] * 4 + [404] * 2
        assert ran.result()["state"] == "succeeded"


def test_the_list_is_newest_first_and_pages_through_all(start_server: StartServer) -> None:
    """120 tasks, page by page while new ones come: none is missed, none comes twice."""
    server = start_server()
    old = [f"old{number}" for number in range(120)]
    for address in old:
        assert server.post("echo", address).status_code == 202
    server.wait_state(old[-1], "succeeded")
    seen: list[str] = []
    cursor: str | None = None
    pages = 0
    while pages == 0 or cursor is not None:
        parameters = {"limit": "7"} | ({} if cursor is None else {"cursor": cursor})
        page = server.http.get("/tasks", params=parameters)
        assert len(names(page)) == (7 if page.json()["next_cursor"] else 1)
        seen += names(page)
        cursor = page.json()["next_cursor"]
        pages += 1
        server.post("echo", f"new{pages}")
    assert seen == old[::-1]
    assert pages == 18
    assert names(server.http.get("/tasks?limit=3")) == ["new18", "new17", "new16"]
    assert len(names(server.http.get("/tasks"))) == 50
    assert (
        names(server.http.get("/tasks?limit=1000"))
        == [f"new{n}" for n in range(18, 0, -1)] + (old[::-1])
    )


def test_the_list_by_state(start_server: StartServer) -> None:
    """Each state alone; the pages of one state are as whole as those of all."""
    server = start_server()
    for number in range(5):
        server.run(("echo", "raises")[number % 2], f"t{number}")
    server.post("unlimited_sleep", "r", {"number": 60})
    server.wait_state("r", "running")
    server.post("echo", "q")

    def listed(query: str) -> list[str]:
        return names(server.http.get(f"/tasks?{query}"))

    assert listed("state=succeeded") == ["t4", "t2", "t0"]
    assert listed("state=failed") == ["t3", "t1"]
    assert listed("state=running") == ["r"]
    assert listed("state=queued") == ["q"]
    assert listed("state=cancelled") == listed("state=expired") == listed("state=timed_out") == []
    first = server.http.get("/tasks?state=succeeded&limit=2")
    assert names(first) == ["t4", "t2"]
    second = server.http.get(f"/tasks?state=succeeded&cursor={first.json()['next_cursor']}")
    assert (names(second), second.json()["next_cursor"]) == (["t0"], None)


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        ("state", ["nope", "", "QUEUED"]),
        ("limit", ["0", "-1", "1001", "x", "1.5", ""]),
        ("cursor", ["x", "-1", "1" * 30, "1 OR 1", "%00", "1.0"]),
    ],
)
def test_bad_parameters_of_the_list_are_422(
    start_server: StartServer, parameter: str, values: list[str]
) -> None:
    server = start_server()
    for value in values:
        response = server.http.get(f"/tasks?{parameter}={value}")
        assert response.status_code == 422, (value, response.text)
        assert response.headers["content-type"] == "application/json"
        (problem,) = response.json()["detail"]
        assert problem["loc"] == ["query", parameter]
        assert {"type", "loc", "msg", "input"} <= set(problem)


def test_cancel(start_server: StartServer, tmp_path: Path) -> None:
    """Queued: never runs. Running: gone with its children, slot back. Ended: 409. Unknown: 404."""
    server = start_server()
    pids = tmp_path / "pids"
    server.run("echo", "ended")
    server.post("unlimited_sleep", "hold", {"number": 60})
    pid = server.wait_state("hold", "running")["worker"]["pid"]
    server.post("facts", "never", {"text": f"open({str(tmp_path / 'ran')!r}, 'w').close()"})
    grandchild = "subprocess.Popen(['sleep', '300']).pid"
    hang = f"print({grandchild}, file=open({str(pids)!r}, 'w'), flush=True) or time.sleep(300)"
    server.post("facts", "family", {"text": hang})
    server.post("echo", "next", {"text": "next"})
    assert server.http.delete("/tasks/never").json()["state"] == "cancelled"
    assert server.http.delete("/tasks/hold").json()["state"] == "cancelled"
    wait_until(lambda: is_gone(pid), "the first worker is gone", timeout_s=5)
    wait_until(lambda: pids.exists() and pids.read_text().strip(), "the family is there")
    child = int(pids.read_text())
    assert not is_gone(child)
    family = server.http.delete("/tasks/family").json()
    assert (family["state"], family["error"]["reason"]) == ("cancelled", "cancelled")
    assert server.wait_state("next", "succeeded")["worker"]["generation"] == 3
    assert is_gone(child)
    assert is_gone(family["worker"]["pid"])
    assert server.task("never")["worker"] is None
    assert not (tmp_path / "ran").exists()
    for address in ("ended", "never", "hold", "family"):
        before = server.task(address)
        response = server.http.delete(f"/tasks/{address}")
        assert response.status_code == 409
        assert response.json()["type"] == "urn:ogpu:problem:already-ended"
        assert server.task(address) == before
    assert server.http.delete("/tasks/nobody").status_code == 404
    assert server.slot()["last_exit"]["reason"] == "cancelled"


def test_cancel_races_with_the_end(start_server: StartServer, sink: Sink) -> None:
    """Tasks of 0 to 9 milliseconds: one end each, and GET agrees with what DELETE said.

    200 of them, cancelled while they wait, run or end, by four clients; a result that the receiver
    was told is that of a task which succeeded, and the other way round.
    """
    server = start_server(CALLBACK_URL=sink.url)

    def cancel_some(client: int) -> list[tuple[str, httpx.Response]]:
        answers = []
        with httpx.Client(base_url=server.url, timeout=20) as http:
            for number in range(50):
                address = f"t{client}-{number}"
                body = {"number": number % 10 / 1000}
                assert http.post(f"/run/sleep/{address}", json=body).status_code == 202
                answers.append((address, http.delete(f"/tasks/{address}")))
        return answers

    with ThreadPoolExecutor(4) as pool:
        answers = [answer for some in pool.map(cancel_some, range(4)) for answer in some]
    succeeded = set()
    for address, answer in answers:
        task = server.task(address)
        if answer.status_code == 200:
            assert answer.json() == task
            assert task["state"] == "cancelled"
        else:
            assert (answer.status_code, task["state"]) == (409, "succeeded")
            succeeded.add(address)
    assert 0 < len(succeeded) < 200, "no race: tune the times"
    sink.wait_for(len(succeeded))
    assert server.run("echo", "last")["state"] == "succeeded"
    assert server.stop() == 0
    assert {d.address for d in sink.deliveries} == {*succeeded, "last"}
    assert server.log.count("had ended as") == 0  # dropped news would be a second end


def test_logs_are_the_tail_of_what_a_task_printed(
    start_server: StartServer, tmp_path: Path
) -> None:
    """While it runs, after its end, and after a restart of the service; bounded; nobody else's."""
    state = tmp_path / "kept"
    server = start_server("talker.py", OGPU_STATE_DIR=state)

    def logs(server: Server, address: str) -> list[str]:
        response = server.http.get(f"/tasks/{address}/logs")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        return response.text.splitlines()

    server.run("prints", "other", {"number": 1})
    server.post("prints", "a", {"number": 600, "go_on": str(tmp_path / "go")})
    server.post("prints", "waiting", {"number": 1})
    wait_until(lambda: logs(server, "a")[-1:] == ["line 599"], "the last line")
    running = logs(server, "a")
    assert 10 <= len(running) <= 200
    assert running == [f"line {n}" for n in range(600 - len(running), 600)]
    assert logs(server, "waiting") == []
    (tmp_path / "go").touch()
    server.wait_state("a", "succeeded")
    assert logs(server, "a") == running
    server.wait_state("waiting", "succeeded")
    server.run("floods", "long", {"number": 0.2})
    assert sum(map(len, logs(server, "long"))) < 2**20
    assert server.stop() == 0
    again = start_server("talker.py", OGPU_STATE_DIR=state)
    assert logs(again, "a") == running
    assert logs(again, "other") == logs(again, "waiting") == ["line 0"]
    assert again.http.get("/tasks/nobody/logs").status_code == 404


def test_tasks_of_before_a_restart_are_found(start_server: StartServer, tmp_path: Path) -> None:
    """As they were, each by its address and all in the list; and cancel still says 409."""
    state = tmp_path / "kept"
    server = start_server("zoo.py", OGPU_STATE_DIR=state)
    before = [server.run("echo", "a"), server.run("raises", "b"), server.run("hangs_asleep", "c")]
    assert server.stop() == 0
    again = start_server("zoo.py", OGPU_STATE_DIR=state)
    assert [again.task(address) for address in "abc"] == before
    assert again.http.get("/tasks").json()["tasks"] == before[::-1]
    assert again.http.delete("/tasks/a").status_code == 409
    again.run("echo", "d")
    assert names(again.http.get("/tasks")) == ["d", "c", "b", "a"]
