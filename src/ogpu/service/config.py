"""Settings, and the constants of the frozen module.

``Settings`` is read once, at start(), in the front: every field is an environment variable with a
type, bounds and a unit; ``start(port=8080)`` beats the environment. The constants are read at
import, as they always were; a source that assigns to them before start() changes the defaults.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from .errors import SettingsError

try:
    SDK_VERSION = version("ogpu-service")
except PackageNotFoundError:  # a source tree that was never installed
    SDK_VERSION = "0+unknown"

SENTRY_DSN = os.getenv("OGPU_SDK_SENTRY_DSN")
PROTOCOL_VERSION = os.getenv("PROTOCOL_VERSION")
SOURCE_ADDRESS = os.getenv("SOURCE_ADDRESS", "0xundefined")
PROVIDER_ADDRESS = os.getenv("PROVIDER_ADDRESS", "0xundefined")
CALLBACK_URL = os.getenv("CALLBACK_URL")
SERVICE_HOST = "0.0.0.0"  # noqa: S104 - a container publishes what it wants to be reached
SERVICE_PORT = 5555

_MIB = 1024 * 1024
MAX_TIMEOUT_S = 10 * 365 * 86400  # a date beyond datetime's range would be no deadline


class Settings(BaseSettings):
    """All that can be set. Field ``task_timeout`` is the variable ``OGPU_TASK_TIMEOUT``."""

    model_config = SettingsConfigDict(
        env_prefix="OGPU_",
        env_ignore_empty=True,  # compose files write CALLBACK_URL=${CALLBACK_URL}
        populate_by_name=True,
        extra="forbid",
        frozen=True,
    )

    host: str = Field(default_factory=lambda: SERVICE_HOST, description="address to listen on")
    port: int = Field(
        default_factory=lambda: SERVICE_PORT,
        ge=0,
        le=65535,
        description="port to listen on; 0 = any free one, logged",
    )
    bind: Literal["ready", "early"] = Field(
        "ready",
        description="ready: the port opens when the first worker is ready; early: at once",
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        "auto", description="number of slots; auto = 1"
    )
    start_method: Literal["auto", "fork", "spawn"] = Field(
        "auto",
        description="how workers are made; auto = fork, or spawn where a fork is not safe",
    )
    task_timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="seconds, for handlers exposed without a timeout",
    )
    queue_size: int = Field(1000, ge=1, description="tasks that may wait for a worker")
    max_body_bytes: int = Field(64 * _MIB, ge=1, lt=2**32, description="largest input")
    max_result_bytes: int = Field(256 * _MIB, ge=1, lt=2**32, description="largest result")
    drain_timeout: float = Field(
        8.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds that running tasks get after SIGTERM (docker stop kills after 10)",
    )
    callback_url: str | None = Field(
        default_factory=lambda: CALLBACK_URL or None,
        validation_alias=AliasChoices("CALLBACK_URL", "callback_url"),
        pattern=r"^https?://",
        description="results go to {CALLBACK_URL}/{task_address}",
    )
    callback_timeout: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="seconds for one delivery attempt"
    )
    log_level: Literal["DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO", description="least level that is logged"
    )
    log_format: Literal["auto", "plain", "json"] = Field(
        "auto", description="auto = colour on a terminal, plain otherwise"
    )

    @property
    def slots(self) -> int:
        """How many slots the pool has."""
        return 1 if self.workers == "auto" else self.workers


def variable_of(field_name: str) -> str:
    """Return the environment variable of a field."""
    return "CALLBACK_URL" if field_name == "callback_url" else f"OGPU_{field_name.upper()}"


def load_settings(**overrides: object) -> Settings:
    """Read the settings from the environment; overrides win.

    Raises:
        SettingsError: one is invalid, or an override has no such name.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # checked by pydantic, by name
    except ValidationError as error:
        complaints = (
            f"{variable_of(str(e['loc'][0]).lower().removeprefix('ogpu_'))}={e['input']!r}: "
            f"{e['msg']}"
            for e in error.errors(include_url=False)
        )
        raise SettingsError("invalid settings: " + "; ".join(complaints)) from error


def describe(settings: Settings) -> str:
    """Return the effective values, one ``VARIABLE=value`` a line, for the log at start."""
    lines = (f"  {variable_of(name)}={value}" for name, value in settings)
    return "Settings:\n" + "\n".join(lines)
