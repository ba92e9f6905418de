"""The JSON of the API as models: for the OpenAPI document only, nothing is built from them."""

from __future__ import annotations

from datetime import datetime
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from ..errors import FailureReason
from ..task import CallbackState, TaskState

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
    progress: None
    result: Result | None
    error: ErrorView | None
    callback: CallbackView
