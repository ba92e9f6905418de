"""POST /run and GET /tasks against a real server over real HTTP."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from conftest import StartServer
from support.sink import Sink
from support.waiting import wait_until

TASK_FIELDS = {
    "task_address", "function", "state", "attempt", "accepted_at", "started_at", "finished_at",
    "deadline", "worker", "progress", "result", "error", "callback",
}  # fmt: skip
ERROR_FIELDS = {
    "reason", "message", "exception", "traceback", "signal", "exit_code", "stack", "output",
}  # fmt: skip


def test_a_task_is_accepted_runs_and_can_be_asked_for(start_server: StartServer) -> None:
    """202 with address and status, exactly; then the task with every field of the design."""
    server = start_server()
    response = server.post("echo", "0xAbc.1:2_3-4", {"text": "hi"})
    assert response.status_code == 202
    assert response.json() == {"task_address": "0xAbc.1:2_3-4", "status": "accepted"}
    task = server.wait_state("0xAbc.1:2_3-4", "succeeded")
    assert set(task) == TASK_FIELDS
    assert task["function"] == "echo"
    assert task["result"]["text"] == "hi"
    assert task["attempt"] == 1
    assert task["error"] is None
    assert task["accepted_at"] <= task["started_at"] <= task["finished_at"]
    assert task["finished_at"].endswith("Z")
    assert task["worker"]["pid"] == task["result"]["pid"]
    assert task["callback"] == {"state": "none", "attempts": 0, "last_error": None}


def test_prefer_wait_answers_with_the_finished_task(start_server: StartServer) -> None:
    server = start_server()
    assert server.run("echo", "a", {"text": "now"})["result"]["text"] == "now"
    slow = server.http.post(
        "/run/unlimited_sleep/b", json={"number": 1.5}, headers={"Prefer": "wait=1"}
    )
    assert slow.status_code == 202
    assert slow.json() == {"task_address": "b", "status": "accepted"}
    server.wait_state("b", "succeeded")


@pytest.mark.parametrize("text", ["", "x" * 70_000, "ü\u2028\n", "\u0000"])
def test_inputs_and_results_of_any_size_go_through_unchanged(
    start_server: StartServer, text: str
) -> None:
    assert start_server().run("echo", "a", {"text": text})["result"]["text"] == text


def test_results_that_json_knows_no_word_for(start_server: StartServer) -> None:
    """A datetime and a NaN, which the frozen module could not send, are results."""
    result = start_server().run("rich", "a")["result"]
    assert result["when"] == "2026-01-02T00:00:00Z"
    assert result["number"] is None


def test_large_bodies_go_both_ways(start_server: StartServer) -> None:
    server = start_server()
    text = "x" * (8 * 2**20)
    assert server.run("echo", "in-and-out", {"text": text})["result"]["text"] == text


def test_an_unknown_function_is_404_and_loses_nothing(start_server: StartServer) -> None:
    server = start_server()
    response = server.post("nope", "a")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == "urn:ogpu:problem:unknown-function"
    assert "nope" in response.json()["detail"]


@pytest.mark.parametrize("path", ["/", "/nowhere", "/run", "/run/echo", "/run/echo/a/b", "/tasks"])
def test_other_paths_are_404_as_problem_json(start_server: StartServer, path: str) -> None:
    response = start_server().http.post(path, json={})
    assert response.status_code in (404, 405)
    assert response.headers["content-type"] == "application/problem+json"
    assert set(response.json()) == {"type", "title", "status", "detail"}


def test_a_wrong_method_is_405(start_server: StartServer) -> None:
    response = start_server().http.get("/run/echo/a")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "kind", "place"),
    [
        (b"", "missing", ["body"]),
        (b"{", "json_invalid", ["body"]),
        (b"\xff\xfe", "json_invalid", ["body"]),
        (b"[]", "model_type", ["body"]),
        (b'{"number": "many"}', "float_parsing", ["body", "number"]),
        (b'{"text": "unacceptable"}', "value_error", ["body", "text"]),
    ],
)
def test_invalid_input_is_422_in_fastapis_shape(
    start_server: StartServer, body: bytes, kind: str, place: list[str]
) -> None:
    response = start_server().http.post("/run/echo/a", content=body)
    assert response.status_code == 422, response.text
    (error,) = response.json()["detail"]
    assert (error["type"], error["loc"]) == (kind, place)
    assert error["msg"]
    assert "input" in error


@pytest.mark.parametrize("address", ["a b", "ü", "%00", "..%5c", "a" * 129, "a,b", "%2e%2e", "."])
def test_a_bad_address_is_422_or_no_path_at_all(start_server: StartServer, address: str) -> None:
    server = start_server()
    with httpx.Client() as client:
        response = client.post(f"{server.url}/run/echo/{address}", json={})
    if response.status_code != 404:  # the client itself resolves "." before it asks
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == ["path", "task_address"]


def test_a_validator_that_breaks_is_named_and_harms_nobody(start_server: StartServer) -> None:
    server = start_server()
    response = server.post("echo", "a", {"text": "broken"})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert "A validator of `echo`" in server.log
    assert server.run("echo", "b")["state"] == "succeeded"


def test_a_slow_validator_is_logged_by_name(start_server: StartServer) -> None:
    """A loop that was blocked for more than 0.1 s is logged with the function's name."""
    server = start_server()
    server.run("echo", "a", {"text": "slow"})
    server.wait_log("blocked for 0.1")
    assert "by the input model of `echo`" in server.log


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413(start_server: StartServer, chunked: bool) -> None:
    """Announced or not, a body over OGPU_MAX_BODY_BYTES is refused before it is all read."""
    server = start_server(OGPU_MAX_BODY_BYTES=1000)
    body = b'{"text": "' + b"x" * 5000 + b'"}'
    content = iter([body[:2000], body[2000:]]) if chunked else body
    response = server.http.post("/run/echo/a", content=content)
    assert response.status_code == 413
    assert "OGPU_MAX_BODY_BYTES" in response.json()["detail"]
    assert server.run("echo", "b")["state"] == "succeeded"


def test_a_result_over_the_limit_fails_with_the_sizes(start_server: StartServer) -> None:
    task = start_server(OGPU_MAX_RESULT_BYTES=1000).run("big", "a", {"number": 5000})
    assert task["state"] == "failed"
    assert task["error"]["reason"] == "invalid_output"
    assert "OGPU_MAX_RESULT_BYTES allows 1000" in task["error"]["message"]


def test_a_full_queue_is_503_with_retry_after(start_server: StartServer) -> None:
    server = start_server(OGPU_QUEUE_SIZE=2)
    server.post("unlimited_sleep", "running", {"number": 60})
    server.wait_state("running", "running")
    assert [server.post("echo", f"q{n}").status_code for n in range(3)] == [202, 202, 503]
    refused = server.post("echo", "q9")
    assert refused.headers["retry-after"].isdigit()
    assert refused.json()["type"] == "urn:ogpu:problem:queue-full"
    assert server.http.get("/tasks/q9").status_code == 404


def test_the_same_task_again_while_active_is_one_run(
    start_server: StartServer, tmp_path: Path
) -> None:
    """200 identical POSTs at once: every one is answered 202, and the handler runs once."""
    server = start_server()
    server.post("waits_for_file", "first", {"text": str(tmp_path / "go on")})
    url = f"{server.url}/run/echo/same"
    barrier = threading.Barrier(20)

    def post(number: int) -> int:
        barrier.wait()
        with httpx.Client() as client:
            # Other white space and another order of keys are the same input.
            body = ('{"text":"x","number":1}', '{ "number": 1.0, "text": "x" }')[number % 2]
            return [client.post(url, content=body).status_code for _ in range(10)].count(202)

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(post, range(20))) == 200
    (tmp_path / "go on").touch()
    server.wait_state("same", "succeeded")
    assert server.slot()["tasks_done"] == 2


def test_another_input_for_an_active_task_is_409(start_server: StartServer) -> None:
    server = start_server()
    server.post("unlimited_sleep", "a", {"number": 60})
    response = server.post("unlimited_sleep", "a", {"number": 61})
    assert response.status_code == 409
    assert response.json()["type"] == "urn:ogpu:problem:input-conflict"


def test_a_post_after_the_end_is_a_new_run(start_server: StartServer) -> None:
    server = start_server()
    first = server.run("echo", "a", {"text": "1"})
    second = server.run("echo", "a", {"text": "2"})
    assert (first["result"]["text"], second["result"]["text"]) == ("1", "2")


def test_one_address_may_serve_several_functions(start_server: StartServer) -> None:
    server = start_server()
    server.run("echo", "a")
    server.run("rich", "a")
    ambiguous = server.http.get("/tasks/a")
    assert ambiguous.status_code == 409
    assert "echo, rich" in ambiguous.json()["detail"]
    assert server.http.get("/tasks/a?function=rich").json()["function"] == "rich"
    unknown = server.http.get("/tasks/never")
    assert unknown.status_code == 404
    assert unknown.json()["type"] == "urn:ogpu:problem:unknown-task"


def test_tasks_run_in_the_order_they_came(start_server: StartServer, sink: Sink) -> None:
    """One FIFO queue, over all functions."""
    server = start_server(CALLBACK_URL=sink.url)
    server.post("unlimited_sleep", "first", {"number": 0.3})
    for number in range(20):
        server.post(("echo", "rich")[number % 2], f"t{number}")
    server.wait_state("t19", "succeeded")
    ends = [server.task(f"t{n}")["started_at"] for n in range(20)]
    assert ends == sorted(ends)


def test_a_client_that_goes_away_costs_nothing(start_server: StartServer) -> None:
    """Clients that hang up while they wait leave their tasks running and nothing open."""
    server = start_server()
    before = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    for number in range(5):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/run/unlimited_sleep/gone{number}",
                json={"number": 0.3},
                headers={"Prefer": "wait=30"},
                timeout=0.1,
            )
    for number in range(5):
        server.wait_state(f"gone{number}", "succeeded")
    server.http.get("/healthz")
    assert len(os.listdir(f"/proc/{server.process.pid}/fd")) <= before + 1


def test_the_documentation_lists_every_handler_and_needs_no_network(
    start_server: StartServer,
) -> None:
    server = start_server()
    document = server.http.get("/openapi.json").json()
    run = document["paths"]["/run/echo/{task_address}"]["post"]
    assert run["description"] == "Answer what was said."
    body = run["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert body == "#/components/schemas/Input"
    assert set(run["responses"]) >= {"200", "202", "404", "409", "413", "422", "503"}
    assert "Output" in str(run["responses"]["200"]["content"])
    assert {"/healthz", "/readyz", "/workers", "/tasks/{task_address}"} <= set(document["paths"])
    page = server.http.get("/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    assert server.http.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200


def test_the_422_of_a_large_input_is_small(start_server: StartServer) -> None:
    """FastAPI's shape, but the input is not echoed once for each of its errors."""
    server = start_server()
    body = {"text": 1, "number": "x", "more": "y" * 1_000_000}
    response = server.http.post("/run/echo/a", json=body)
    assert response.status_code == 422
    assert {tuple(e["loc"]) for e in response.json()["detail"]} == {
        ("body", "text"),
        ("body", "number"),
    }
    assert len(response.content) < 10_000


def test_a_client_that_leaves_while_it_waits_is_let_go(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Its connection is free for others, and its task goes on."""
    server = start_server(OGPU_MAX_CONNECTIONS=3)
    go_on = tmp_path / "go on"
    body = {"text": str(go_on), "more": "x" * 200_000}
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/run/waits_for_file/a",
                json=body,
                headers={"Prefer": "wait=3600"},
                timeout=1.5,  # more than the second in which nobody looks whether it has left
            )
    wait_until(lambda: server.http.get("/healthz").status_code == 200, "others are served")
    go_on.touch()
    server.wait_state("a", "succeeded")
