"""Settings, and the constants of the frozen module.

``Settings`` is read once, at start(), in the front: every field is an environment variable with a
type, bounds and a unit; ``start(port=8080)`` beats the environment. The constants are read at
import, as they always were; a source that assigns to them before start() changes the defaults.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal, cast
from urllib.parse import urlsplit

from dotenv import load_dotenv
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from .errors import SettingsError

try:
    SDK_VERSION = version("ogpu-service")
except PackageNotFoundError:  # a source tree that was never installed
    SDK_VERSION = "0+unknown"

# The SDK that the frozen module comes with reads these, in this order, before that module is there.
# (No such folder, or not for this user: OSError. Nobody knows where it is: RuntimeError.)
for _folder in (Path.cwd, Path.home):
    with contextlib.suppress(OSError, RuntimeError):
        load_dotenv(_folder() / ".env")

SENTRY_DSN = os.getenv("OGPU_SDK_SENTRY_DSN")
PROTOCOL_VERSION = os.getenv("PROTOCOL_VERSION")
SOURCE_ADDRESS = os.getenv("SOURCE_ADDRESS", "0xundefined")
PROVIDER_ADDRESS = os.getenv("PROVIDER_ADDRESS", "0xundefined")
CALLBACK_URL = os.getenv("CALLBACK_URL")
SERVICE_HOST = "0.0.0.0"  # noqa: S104 - a container publishes what it wants to be reached
SERVICE_PORT = 5555

_MIB = 1024 * 1024
MAX_PAYLOAD_BYTES = 900_000_000  # SQLite holds 10^9 bytes in a value (its limits.html)
_SECRETS = {"callback_secret", "api_key"}
_URL_PASSWORD = re.compile(r"(?<=[a-z]:)//[^/\s]*@", re.IGNORECASE)
MAX_TIMEOUT_S = 10 * 365 * 86400  # a date beyond datetime's range would be no deadline


LogLevel = Literal["DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"]


def _level_of_the_source() -> LogLevel:
    """Return what ``logger.setLevel()`` was told at import, which may be any other level, too."""
    return cast("LogLevel", logging.getLevelName(logging.getLogger("ogpu.service").level))


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
        "auto", description="number of slots; auto = OGPU_WORKERS_PER_GPU x GPUs, or 1 without one"
    )
    workers_per_gpu: int = Field(
        1, ge=1, le=64, description="slots of each GPU, where OGPU_WORKERS is auto"
    )
    gpus: str = Field(
        "auto",
        description="auto = all that the container shows; none; or their places among those: 0,2",
    )
    start_method: Literal["auto", "fork", "spawn"] = Field(
        "auto",
        description="how workers are made; auto = fork, or spawn where a fork is not safe",
    )
    standby: bool = Field(
        default=True,
        description="one process more has the source imported and prepared, and waits, so that a "
        "kill costs @init alone; spawned, it takes the memory of that; forked, some 5 MB, and it "
        "is made after the first kill",
    )
    task_timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="seconds, for handlers exposed without a timeout",
    )
    kill_grace: float = Field(
        0.0,
        ge=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="seconds between asking a handler to stop, at the deadline, and the kill",
    )
    init_timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="seconds for one @init with its warm-ups, where workers are spawned also with "
        "the import of the source and @prepare; and for those two in a template",
    )
    max_tasks_per_worker: int | None = Field(
        None, ge=1, description="tasks (± 10 %) after which a worker is replaced"
    )
    max_worker_rss_bytes: int | None = Field(
        None,
        ge=1,
        description="resident memory of a worker and all it started, above which it is replaced",
    )
    crash_budget: int = Field(
        5,
        ge=1,
        le=1_000_000,
        description="failed starts of workers in OGPU_CRASH_WINDOW that end the service",
    )
    crash_window: float = Field(
        60.0, gt=0, le=MAX_TIMEOUT_S, allow_inf_nan=False, description="seconds"
    )
    queue_size: int = Field(1000, ge=1, description="tasks that may wait for a worker")
    queue_timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="seconds that a task may wait for a worker before it is expired",
    )
    max_body_bytes: int = Field(64 * _MIB, ge=1, le=MAX_PAYLOAD_BYTES, description="largest input")
    max_result_bytes: int = Field(
        256 * _MIB, ge=1, le=MAX_PAYLOAD_BYTES, description="largest result"
    )
    state_dir: str = Field(
        "./ogpu-state",
        min_length=1,
        description="the journal's folder; :memory: = nothing outlives the process",
    )
    max_attempts: int = Field(
        3, ge=1, le=1000, description="runs of one task over crashes of the service"
    )
    task_ttl: float = Field(
        86_400.0,
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="seconds that a finished task is kept",
    )
    drain_timeout: float = Field(
        8.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds that running tasks get after SIGTERM (docker stop kills after 10)",
    )
    callback_url: str | None = Field(
        default_factory=lambda: CALLBACK_URL or None,
        validate_default=True,
        validation_alias=AliasChoices("CALLBACK_URL", "callback_url"),
        pattern=r"^https?://",
        description="results go to {CALLBACK_URL}/{task_address}",
    )
    callback_timeout: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="seconds for one delivery attempt"
    )
    callback_secret: SecretStr | None = Field(
        None,
        description="signs callbacks as in Standard Webhooks: whsec_ and base64; several, with "
        "spaces between them, while one is replaced by another",
    )
    failure_callback_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="failures go to {OGPU_FAILURE_CALLBACK_URL}/{task_address}",
    )
    api_key: SecretStr | None = Field(
        None, min_length=1, description="bearer token that every call but three needs"
    )
    max_connections: int = Field(
        4096, ge=1, le=1_000_000, description="clients that may be connected at once"
    )
    max_header_bytes: int = Field(
        64 * 1024, ge=1024, le=16 * _MIB, description="largest head of a request"
    )
    request_timeout: float = Field(
        60.0,
        gt=0,
        le=86_400,
        allow_inf_nan=False,
        description="seconds in which a request must have arrived whole",
    )
    log_level: LogLevel = Field(
        default_factory=_level_of_the_source,
        validate_default=False,  # a source may choose FAIL, or 15
        description="least level that is logged",
    )
    log_format: Literal["auto", "plain", "json"] = Field(
        "auto", description="auto = colour on a terminal, plain otherwise"
    )

    @field_validator("callback_secret")
    @classmethod
    def _is_base64(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None:
            signing_keys(secret)
        return secret

    @field_validator("callback_url", "failure_callback_url")
    @classmethod
    def _names_a_host(cls, url: str | None) -> str | None:
        if url is not None:
            host_and_port(url)
        return url

    @field_validator("api_key", mode="before")
    @classmethod
    def _without_white_space(cls, key: object) -> object:
        return key.strip() if isinstance(key, str) else key

    @field_validator("gpus", mode="before")
    @classmethod
    def _as_list(cls, gpus: object) -> object:
        """Take ``start(gpus=0)`` and ``start(gpus=[0, 2])`` as well, and white space."""
        if isinstance(gpus, (list, tuple)):
            gpus = ",".join(map(str, gpus))
        return "".join(str(gpus).split())

    @field_validator("gpus")
    @classmethod
    def _are_places(cls, gpus: str) -> str:
        if gpus in ("auto", "none"):
            return gpus
        places = gpus.split(",")
        if not all(re.fullmatch(r"[0-9]{1,4}", place) for place in places):
            raise ValueError("neither auto, nor none, nor a list such as 0,2")
        if len(set(map(int, places))) < len(places):
            raise ValueError("a GPU is named twice; OGPU_WORKERS_PER_GPU gives it more workers")
        return gpus

    @property
    def wanted_log_level(self) -> str | None:
        """The least level that is logged; None: the source's ``logger.setLevel()`` counts."""
        return self.log_level if "log_level" in self.model_fields_set else None

    @property
    def gpu_positions(self) -> tuple[int, ...] | None:
        """The places in OGPU_GPUS, or None: it is no list."""
        return None if self.gpus in ("auto", "none") else tuple(map(int, self.gpus.split(",")))


def signing_keys(secret: SecretStr) -> list[bytes]:
    """Return the keys in a secret as Standard Webhooks writes it.

    Raises:
        ValueError: one of them is not base64.
    """
    texts = [text.removeprefix("whsec_") for text in secret.get_secret_value().split()]
    try:
        keys = [base64.b64decode(text, validate=True) for text in texts]
    except binascii.Error as error:
        raise ValueError("not base64; make one with: openssl rand -base64 32") from error
    if not all(keys) or not keys:
        raise ValueError("empty; make one with: openssl rand -base64 32")
    return keys


def host_and_port(url: str) -> tuple[str, int]:
    """Return the host that a URL of a receiver names, in ASCII, and its port.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        parts = urlsplit(url)
        # In a URL the % before the zone of an IPv6 address is written %25 (RFC 6874).
        host = (parts.hostname or "").replace("%25", "%").encode("idna").decode()
        port = (443 if parts.scheme == "https" else 80) if parts.port is None else parts.port
    except ValueError:  # which may quote a part of a password
        host, port = "", 0
    if not host or not port:
        raise ValueError("no host, or no port, that can be read (in a password / ? # are %2F …)")
    return host, port


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
            _complaint(str(e["loc"][0]).lower().removeprefix("ogpu_"), e["input"], e["msg"])
            for e in error.errors(include_url=False)
        )
        raise SettingsError("invalid settings: " + "; ".join(complaints)) from error


def _complaint(field_name: str, value: object, message: str) -> str:
    shown = "'…'" if field_name in _SECRETS else _URL_PASSWORD.sub("//***@", repr(value))
    return f"{variable_of(field_name)}={shown}: {message}"


def describe(settings: Settings) -> str:
    """Return the effective values, one ``VARIABLE=value`` a line, for the log at start.

    Secrets are not among them: a key is shown as stars, and a password in a URL as well.
    """
    lines = (
        f"  {variable_of(name)}={_URL_PASSWORD.sub(r'//***@', str(value))}"
        for name, value in settings
    )
    return "Settings:\n" + "\n".join(lines)
