"""The OpenAPI document is the contract: what it says is what the server does."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from support.sink import Sink

BOUND_S = 60
# POST /drain is the one call that is left out: once it was answered, every /run is 503 (which is
# documented) until somebody calls /resume, and nothing behind /run would be looked at.
# tests/integration/test_pool_api.py holds it to the document. The events of a task end with the
# task, and these handlers take no time, so that the streams need no exception.
LEFT_OUT = "/drain"
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield path, method and operation of every documented call."""
    for path, item in document["paths"].items():
        for method in METHODS & set(item):
            yield path, method, item[method]


@pytest.mark.timeout(BOUND_S + 30)
@pytest.mark.parametrize("checks", ["all", "not_a_server_error"])
def test_schemathesis_finds_nothing(
    start_server: StartServer, sink: Sink, tmp_path: Path, checks: str
) -> None:
    """No answer has a status, a content type or a body that the document does not know.

    And no 5xx: run with that check alone as well, so that a defect of the document does not hide
    one of the server (schemathesis stops an operation's phase at its first failure).
    """
    server = start_server("bookshop.py", CALLBACK_URL=sink.url)
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{server.url}/openapi.json", "--no-color", "--checks", checks),
            *("--exclude-path", LEFT_OUT, "--max-examples", "30", "--seed", "1"),
            *("--continue-on-failure", "--request-timeout", "10", "--generation-database", "none"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    said = run.stdout + run.stderr
    assert "Operations:       13 selected / 14 total" in said, said
    assert run.returncode == 0, said
    assert "ERROR" not in server.log, server.log
    assert len(sink.deliveries) > 10  # it did get through to the handlers


def test_every_operation_tells_what_it_is_for(start_server: StartServer) -> None:
    """A summary or a description, an id of its own, a tag, and a text for every answer."""
    document = start_server("bookshop.py").http.get("/openapi.json").json()
    calls = list(operations(document))
    ids = [operation["operationId"] for _, _, operation in calls]
    assert len(ids) == len(set(ids)) == 14
    for path, method, operation in calls:
        where = f"{method} {path}"
        assert operation.get("description") or operation.get("summary"), where
        assert operation["tags"], where
        for status, answer in operation["responses"].items():
            assert answer["description"], f"{where} {status}"


def test_every_call_of_the_design_is_documented(start_server: StartServer) -> None:
    document = start_server("bookshop.py").http.get("/openapi.json").json()
    one = "/tasks/{task_address}"
    assert {(method, path) for path, method, _ in operations(document)} == {
        ("post", "/run/judge/{task_address}"),
        ("post", "/run/order/{task_address}"),
        ("get", "/tasks"),
        ("get", one),
        ("delete", one),
        ("get", f"{one}/events"),
        ("get", f"{one}/logs"),
        ("post", f"{one}/callback"),
        ("post", "/drain"),
        ("post", "/resume"),
        ("get", "/healthz"),
        ("get", "/readyz"),
        ("get", "/workers"),
        ("get", "/metrics"),
    }


def test_a_handler_is_documented_with_its_models(start_server: StartServer) -> None:
    """Input, result, nested models, enums and optionals are in the document, by reference."""
    document = start_server("bookshop.py").http.get("/openapi.json").json()
    run = document["paths"]["/run/judge/{task_address}"]["post"]
    schemas = document["components"]["schemas"]
    body = run["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Book"}
    assert schemas["Book"]["required"] == ["title", "genre"]
    assert schemas["Genre"]["enum"] == ["novel", "poem"]
    assert schemas["Book"]["properties"]["authors"]["items"]["$ref"].endswith("/Author")
    answer = run["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    result = schemas[answer.rpartition("/")[2]]["properties"]["result"]
    assert {"$ref": "#/components/schemas/Verdict"} in result["anyOf"]
    assert run["description"] == "Judge a book by its title."


def test_a_405_lists_every_method_that_there_is(start_server: StartServer) -> None:
    """RFC 9110, 10.2.1: Allow lists the methods of the resource, all of them."""
    http = start_server("bookshop.py").http
    for path, allowed in (
        ("/tasks", {"GET"}),
        ("/run/judge/a", {"POST"}),
        ("/drain", {"POST"}),
        ("/tasks/a", {"GET", "DELETE"}),
    ):
        response = http.request("PATCH", path)
        assert response.status_code == 405
        listed = {method.strip() for method in response.headers["allow"].split(",")}
        assert listed - {"HEAD"} == allowed, path


def test_the_docs_page_loads_everything_from_the_service_itself(
    start_server: StartServer,
) -> None:
    """No script, style sheet or picture of /docs is elsewhere, and all of them are there."""
    http = start_server("bookshop.py").http
    page = http.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    links = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text)
    assert len(links) >= 2
    for link in links:
        assert link.startswith("/"), link
        assert not link.startswith("//"), link
        assert http.get(link).status_code == 200, link
    assert "/openapi.json" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


PREFERENCES: list[tuple[list[str], bool]] = [
    (["wait=30"], True),
    (["Wait = 30"], True),
    (['wait="30"'], True),
    (["respond-async, wait=30"], True),
    (["wait=30,respond-async"], True),
    (["handling=lenient; foo=1, wait=30"], True),
    (["respond-async", "wait=30"], True),
    (["wait=99999999999999999999"], True),
    (["wait=0"], False),
    (["respond-async"], False),
    (["wait"], False),
    (["wait=-5"], False),
    (["wait=soon"], False),
    (["await=30"], False),
    (["x-wait=30"], False),
    ([""], False),
    (['hint="please, wait=30"'], False),
]


def test_prefer_wait_in_every_form(start_server: StartServer) -> None:
    """RFC 7240: names have no case, values may be quoted, headers repeat; the odd is ignored."""
    server = start_server()
    for number, (headers, waits) in enumerate(PREFERENCES):
        started = time.monotonic()
        response = server.http.post(
            f"/run/sleep/a{number}",
            json={"number": 0.4},
            headers=[("prefer", header) for header in headers],
        )
        assert response.status_code == (200 if waits else 202), headers
        if waits:
            assert response.json()["state"] == "succeeded"
            assert time.monotonic() - started >= 0.35
        else:
            assert response.json() == {"task_address": f"a{number}", "status": "accepted"}
            server.wait_state(f"a{number}", "succeeded")


def test_a_wait_of_a_second_and_a_half(start_server: StartServer) -> None:
    """RFC 7240 knows whole seconds; wait=1.9 waits for one second at least."""
    server = start_server()
    started = time.monotonic()
    response = server.http.post("/run/sleep/a", json={"number": 20}, headers={"prefer": "wait=1.9"})
    assert response.status_code == 202
    assert 1 <= time.monotonic() - started < 4
