"""The chosen handler as an application of gunicorn's dirty workers, and the WSGI part before it."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import handlers
from gunicorn.dirty import get_dirty_client
from gunicorn.dirty.app import DirtyApp
from gunicorn.dirty.errors import DirtyError

_NAME = "serve_gunicorn:Handler"


class Handler(DirtyApp):
    """Lives in a dirty worker."""

    def init(self) -> None:
        handlers.prepare_and_load()

    def handle(self, data: str) -> str:
        chosen = handlers.chosen()
        return str(chosen.handle(chosen.Input.model_validate_json(data)).model_dump_json())


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    """Hand a request's body to a dirty worker."""
    data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).decode()
    try:
        status, answer = "200 OK", get_dirty_client().execute(_NAME, "handle", data)
    except DirtyError as error:
        status = "503 Service Unavailable"
        answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
    body = answer.encode()
    start_response(
        status, [("content-type", "application/json"), ("content-length", str(len(body)))]
    )
    return [body]
