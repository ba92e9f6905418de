"""Who may come in, what never reaches the log, and addresses that were made to harm."""

from __future__ import annotations

import base64
import json
import os
import socket
from typing import Any

import httpx
import pytest

from conftest import StartServer
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

KEY = "k3y-MARKER-of-the-key"
OPEN = {"/healthz", "/readyz", "/metrics"}


def raw(server: Server, head: bytes, body: bytes = b"{}") -> tuple[int, bytes]:
    """Send a request as it is written here; return the status (0: no answer) and the rest."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        lines = [head, b"host: x", b"connection: close", b"content-length: %d" % len(body)]
        client.sendall(b"\r\n".join([*lines, b"", body]))
        with client.makefile("rb") as stream:
            answer = stream.read()
    return int(answer.split(b" ", 2)[1]) if answer else 0, answer


def assert_refused(response: httpx.Response, why: object) -> None:
    assert response.status_code == 401, why
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["www-authenticate"].startswith("Bearer"), why
    assert set(response.json()) == {"type", "title", "status", "detail"}
    assert response.json()["type"] == "urn:ogpu:problem:unauthorized"
    assert KEY not in response.text


def test_every_call_needs_the_key(start_server: StartServer) -> None:
    """Without and with a wrong one: 401, whatever the path; with it, an answer. Three are open."""
    server = start_server("bookshop.py", OGPU_API_KEY=KEY)
    known = {"authorization": f"Bearer {KEY}"}
    document = server.http.get("/openapi.json", headers=known).json()
    book = {"title": "t", "genre": "novel"}
    calls = [
        (method.upper(), path.replace("{task_address}", "a"))
        for path, operations in document["paths"].items()
        for method in operations
    ]
    calls.sort(key=lambda call: ("run" not in call[1], call[1] == "/drain"))  # tasks, then the rest
    calls += [("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("PUT", "/tasks")]
    calls += [("POST", "/run/unknown/a"), ("GET", "/"), ("OPTIONS", "/tasks"), ("POST", "/healthz")]
    wrong = ["Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY]
    for method, path in calls:
        if path in OPEN:
            assert server.http.request(method, path).status_code in (200, 405)
            continue
        for header in (None, *wrong):
            headers = {} if header is None else {"authorization": header}
            response = server.http.request(method, path, json=book, headers=headers)
            assert_refused(response, (method, path, header))
    for method, path in calls:
        headers = {**known, "prefer": "wait=20"}
        response = server.http.request(method, path, json=book, headers=headers)
        assert response.status_code not in (401, 403, 500), (method, path)
    lower_case = {"authorization": f"bearer {KEY}"}  # RFC 9110: a scheme's name has no case
    assert server.http.get("/tasks", headers=lower_case).status_code == 200
    assert len(calls) >= 20


def test_the_open_paths_are_no_way_round_the_key(start_server: StartServer) -> None:
    server = start_server(OGPU_API_KEY=KEY)
    for path in (
        b"/healthz/../tasks", b"/metrics/%2e%2e/tasks", b"//healthz/../tasks",
        b"/healthz%2f../tasks", b"/tasks?/healthz", b"/tasks#/healthz", b"/healthz;/tasks",
        b"/healthz/", b"/HEALTHZ",
    ):  # fmt: skip
        status, answer = raw(server, b"GET " + path + b" HTTP/1.1")
        assert status in (400, 401), (path, answer)
    assert raw(server, b"GET http://x/tasks HTTP/1.1")[0] == 401
    assert raw(server, b"GET /healthz HTTP/1.1")[0] == 200


def test_a_document_with_a_key_says_so(start_server: StartServer) -> None:
    """Every call but the open ones is marked, and documents its 401."""
    server = start_server("bookshop.py", OGPU_API_KEY=KEY)
    known = {"authorization": f"Bearer {KEY}"}
    document = server.http.get("/openapi.json", headers=known).json()
    assert document["components"]["securitySchemes"] == {
        "key": {"type": "http", "scheme": "bearer"}
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == (path not in OPEN), path
            assert operation.get("security", document["security"]) == (
                [] if path in OPEN else [{"key": []}]
            )


def test_a_key_from_a_file_with_a_new_line_at_its_end_works(start_server: StartServer) -> None:
    """Secrets come from files, and those end with a new line, which no header can carry."""
    server = start_server(OGPU_API_KEY=f"{KEY}\n")
    response = server.http.get("/tasks", headers={"authorization": f"Bearer {KEY}"})
    assert response.status_code == 200


def markers() -> dict[str, str]:
    names = ("input", "result", "secret", "password", "failed", "late", "invalid", "conflict")
    return {name: f"{name}MARKER{os.urandom(4).hex()}" for name in names}


def test_no_secret_and_no_task_data_reaches_the_log(start_server: StartServer, sink: Sink) -> None:
    """At INFO: key, callback secret, password of the callback URL, inputs and results.

    Over successes, failures, timeouts, invalid and conflicting inputs, and a receiver in trouble.
    """
    mark = markers()
    secret = base64.b64encode(mark["secret"].encode()).decode()
    sink.answers[:] = [500, 0, 200]
    source = f"""
import time
from pydantic import BaseModel, Field
import ogpu.service
class Input(BaseModel):
    text: str = ""
    small: int = Field(0, le=10)
class Output(BaseModel):
    text: str = ""
@ogpu.service.expose()
def good(data: Input) -> Output:
    return Output(text={mark["result"][:6]!r} + {mark["result"][6:]!r})
@ogpu.service.expose()
def fails(data: Input) -> Output:
    raise ValueError("no luck")
@ogpu.service.expose(timeout=0.3)
def late(data: Input) -> Output:
    time.sleep(60)
@ogpu.service.expose()
def none(data: Input) -> Output:
    return None
ogpu.service.start()
"""
    server = start_server(
        source,
        OGPU_API_KEY=KEY,
        OGPU_CALLBACK_SECRET=f"whsec_{secret}",
        CALLBACK_URL=sink.url.replace("//", f"//user:{mark['password']}@"),
        OGPU_FAILURE_CALLBACK_URL=sink.url.replace("//", f"//{mark['password']}:x@"),
    )
    server.http.headers["authorization"] = f"Bearer {KEY}"
    assert server.run("good", "good", {"text": mark["input"]})["result"]["text"] == mark["result"]
    assert server.run("fails", "fails", {"text": mark["failed"]})["state"] == "failed"
    assert server.run("none", "none", {"text": mark["failed"]})["state"] == "failed"
    server.post("late", "late", {"text": mark["late"]})
    assert server.post("late", "late", {"text": mark["conflict"]}).status_code == 409
    assert server.post("good", "bad", {"text": {mark["invalid"]: 1}}).status_code == 422
    assert server.post("good", "bad", {"small": mark["invalid"]}).status_code == 422
    server.wait_state("late", "timed_out")
    authorization = {d.headers["authorization"] for d in sink.wait_for(6)}
    basic = base64.b64encode(f"user:{mark['password']}".encode()).decode()
    assert f"Basic {basic}" in authorization  # the password was used, and is right
    for address in ("good", "fails", "late", "none"):
        wait_until(lambda a=address: server.task(a)["callback"]["state"] == "delivered", "told")
    assert server.stop() == 0
    for name, marker in {**mark, "key": KEY, "base64": secret, "Basic": basic}.items():
        assert marker not in server.log, name
    assert "callback failed (attempt 1)" in server.log
    assert "no luck" in server.log


@pytest.mark.parametrize(
    ("variable", "value", "hidden"),
    [
        ("OGPU_CALLBACK_SECRET", "whsec_MARKER!not-base64", "MARKER"),
        ("OGPU_CALLBACK_SECRET", "whsec_", "whsec"),
        ("CALLBACK_URL", "ftp://user:MARKER@host/x", "MARKER"),
        ("OGPU_FAILURE_CALLBACK_URL", "HTTP://user:MARKER@host/x", "MARKER"),
    ],
)
def test_an_invalid_secret_ends_the_start_and_is_not_shown(
    start_server: StartServer, variable: str, value: str, hidden: str
) -> None:
    """Exit code 2, the variable's name, and not its value."""
    server = start_server(wait=False, **{variable: value})
    assert server.wait_exit() == 2
    assert variable in server.log
    assert hidden not in server.log


def test_a_password_with_an_at_sign_is_not_shown_at_start(start_server: StartServer) -> None:
    """The last @ ends the password, as everything that reads URLs takes it."""
    server = start_server(CALLBACK_URL="http://user:one@MARKER@127.0.0.1:9/x")
    assert "CALLBACK_URL=http://***@127.0.0.1:9/x" in server.log
    assert "MARKER" not in server.log


# fmt: off
HOSTILE: list[bytes] = [
    b"..", b".", b"%2e%2e", b"%2e", b"%2e%2e%2f", b"%2f", b"%2F..%2Fx", b"a%2fb", b"..%2fb",
    b"..%5cb", b"a%00b", b"%00", b"a%0d%0aX-Evil:1", b"a%0a", b"%0d%0a%0d%0a", b"a%20b", b"a%3fb",
    b"a%23b", b"a%25b", b"a%2525b", b"%c3%bc", b"%ff%fe", b"%ed%a0%80", b"%e2%80%ae", b"a" * 10_240,
    b"%41" * 129, b"\xc3\xbc", b"a\x01b", b"a\x7fb", b"a;b", b"a@b", b"a,b", b"a&b", b"a+b", b"~",
    b"%", b"%zz", b"a%", b"", b"/", b"//", b"../../evil", b"a\tb", b"a\\b", b"{x}", b"%7bx%7d",
    b"*", b"a'b", b"a/b", b"a/", b"a%2f",
]
# fmt: on


def test_hostile_addresses_are_refused_and_reach_nobody(
    start_server: StartServer, sink: Sink
) -> None:
    """Sent as they are, over a raw socket: 4xx, and the receiver sees the control task alone."""
    server = start_server(CALLBACK_URL=sink.url, OGPU_FAILURE_CALLBACK_URL=sink.url)
    for function in (b"echo", b"raises"):
        for address in HOSTILE:
            status, answer = raw(server, b"POST /run/%b/%b HTTP/1.1" % (function, address))
            assert 400 <= status < 500, (address, answer)
            head = answer.partition(b"\r\n\r\n")[0].lower()
            assert b"x-evil" not in head, answer
    for method, tail in (
        (b"GET", b""),
        (b"DELETE", b""),
        (b"POST", b"/callback"),
        (b"GET", b"/logs"),
    ):
        for address in (
            b"%2e%2e",
            b"a%00b",
            b"%ff",
            b"a%0d%0aX-Evil:1",
            b"'%20OR%201=1--",
            b"\xff",
        ):
            status, answer = raw(server, b"%b /tasks/%b%b HTTP/1.1" % (method, address, tail))
            assert 400 <= status < 500, (method, address, answer)
            assert b"x-evil:" not in answer.partition(b"\r\n\r\n")[0].lower()
    assert server.run("echo", "control")["state"] == "succeeded"
    sink.wait_for(1)
    page: dict[str, Any] = server.http.get("/tasks").json()
    assert [task["task_address"] for task in page["tasks"]] == ["control"]
    assert server.stop() == 0
    assert [delivery.path for delivery in sink.deliveries] == ["/callback/control"]
    assert "Traceback" not in server.log, server.log


def test_an_echoed_address_cannot_break_the_answer(start_server: StartServer) -> None:
    """What is quoted back of a hostile address is inside a JSON string."""
    server = start_server()
    status, answer = raw(server, b"POST /run/echo/%22%7d%0d%0a%3cscript%3e HTTP/1.1")
    assert status == 422
    (error,) = json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]
    assert error["input"] == '"}\r\n<script>'
