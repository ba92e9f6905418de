"""The JSON of the API as models: for the OpenAPI document only, nothing is built from them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import FastAPI, Path
from pydantic import BaseModel, ConfigDict

from ..errors import FailureReason
from ..events import EventKind
from ..pool.slot import ExitReason, SlotState
from ..pool.states import PoolState
from ..task import CallbackState, TaskState
from .auth import OPEN_PATHS

Responses = dict[int | str, dict[str, Any]]
Address = Annotated[str, Path(pattern=r"^[A-Za-z0-9._:-]{1,128}$", description="not . or ..")]
PREFER: dict[str, Any] = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "wait=S: wait S seconds for the task's end (RFC 7240)",
    "schema": {"type": "string"},
    "example": "wait=30",
}

Result = TypeVar("Result", bound=BaseModel)


class Accepted(BaseModel):
    """A task was accepted, or is active already."""

    task_address: str
    status: Literal["accepted"]


class ProblemView(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(title="Problem")

    type: str
    title: str
    status: int
    detail: str


class WorkerView(BaseModel):
    """Which worker ran the task."""

    model_config = ConfigDict(title="Worker")

    slot: int
    generation: int
    pid: int
    device: str | None


class ErrorView(BaseModel):
    """Why the task did not succeed, with the evidence there is."""

    model_config = ConfigDict(title="Error")

    reason: FailureReason
    message: str
    exception: str | None
    traceback: str | None
    signal: int | None
    exit_code: int | None
    stack: str | None
    output: str | None


class CallbackView(BaseModel):
    """The delivery of the result."""

    model_config = ConfigDict(title="Callback")

    state: CallbackState
    attempts: int
    last_error: str | None


class ProgressView(BaseModel):
    """How far the task says it is."""

    model_config = ConfigDict(title="Progress")

    fraction: float
    message: str | None


class TaskView(BaseModel, Generic[Result]):
    """A task."""

    task_address: str
    function: str
    state: TaskState
    attempt: int
    accepted_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline: datetime | None
    worker: WorkerView | None
    progress: ProgressView | None
    result: Result | None
    error: ErrorView | None
    callback: CallbackView


class PageView(BaseModel):
    """Tasks, newest first."""

    model_config = ConfigDict(title="Page")

    tasks: list[TaskView[BaseModel]]
    next_cursor: str | None


class ExitView(BaseModel):
    """How the last worker of a slot ended."""

    model_config = ConfigDict(title="Exit")

    reason: ExitReason
    signal: int | None
    exit_code: int | None
    at: datetime


class SlotView(BaseModel):
    """A place in the pool, and its worker."""

    model_config = ConfigDict(title="Slot")

    slot: int
    generation: int
    state: SlotState
    pid: int | None
    device: str | None
    task_address: str | None
    function: str | None
    tasks_done: int
    rss_bytes: int | None
    started_at: datetime | None
    last_exit: ExitView | None


class PoolView(BaseModel):
    """The pool."""

    model_config = ConfigDict(title="Pool")

    workers: list[SlotView]
    queue_depth: int
    accepting: bool
    state: PoolState


def _problem(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": description,
        "content": {"application/problem+json": {"schema": schema}},
    }


def _text(description: str, media_type: str) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}


_ANY: Responses = {503: _problem("The journal cannot be used, or the service stops")}
_FOUND: Responses = {
    404: _problem("Unknown task"),
    409: _problem("Several functions have a task of this address: add ?function="),
    **_ANY,
}
_ENDED_409: Responses = {409: _problem("The task has ended already, or several have this address")}
_SENT_409: Responses = {409: _problem("It has not ended, nobody is to be told, or several have it")}
TASK: Responses = {200: {"description": "The task", "model": TaskView[BaseModel]}, **_FOUND}
PAGE: Responses = {200: {"description": "A page of tasks", "model": PageView}, **_ANY}
CANCELLED: Responses = {**TASK, **_ENDED_409}
LOGS: Responses = {200: _text("The last lines that the task printed", "text/plain"), **_FOUND}
_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "enum": [kind.value for kind in EventKind]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
EVENTS: Responses = {
    200: {
        "description": "Server-sent events",
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    },
    **_FOUND,
}
SENT_AGAIN: Responses = {
    202: {"description": "The callback is on its way", "model": TaskView[BaseModel]},
    **_FOUND,
    **_SENT_409,
}
_POOL: Responses = {200: {"description": "The pool", "model": PoolView}}
OF_POOL_CALLS: dict[str, Responses] = {
    "/healthz": {},
    "/readyz": {503: _problem("Starting, draining or broken: see reason")},
    "/workers": _POOL,
    "/drain": _POOL,
    "/resume": {**_POOL, 409: _problem("The service stops")},
    "/metrics": {200: _text("Figures, in the text format of Prometheus", "text/plain")},
}


def run_responses(output_model: type[BaseModel]) -> Responses:
    """Return what a POST of a task may be answered."""
    return {
        200: {
            "description": "With `Prefer: wait=S`: the task, which ended within S seconds",
            "model": TaskView[output_model],  # type: ignore[valid-type]  # a model, as a value
        },
        202: {
            "description": "Accepted: the task will end in one terminal state",
            "model": Accepted,
        },
        404: _problem("Unknown function"),
        409: _problem("The task is active with another input"),
        413: _problem("The body is larger than OGPU_MAX_BODY_BYTES"),
        500: _problem("The input model's validator is defective"),
        503: _problem("Not accepting, the queue is full, or no disk; see Retry-After"),
    }


def complete(app: FastAPI, *, needs_key: bool) -> None:
    """Add to the document what FastAPI does not know: the problem, and the key where one is set."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas["Problem"] = ProblemView.model_json_schema()
        if needs_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
            for path, calls in document["paths"].items():
                for call in calls.values():
                    if path in OPEN_PATHS:
                        call["security"] = []
                    else:
                        call["responses"]["401"] = _problem("The key is missing or wrong")
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
