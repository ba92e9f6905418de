"""Reading what a client sends to ``/run``: body, address, input, preferences. Runs in the front."""

from __future__ import annotations

import functools
import re
import time
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope

from ..handler import Handler
from ..logger import logger
from .problem import VALIDATOR_FAILED

_ADDRESS = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PREFER_WAIT = re.compile(rb'(?:^|[,;\s])wait\s*=\s*"?(\d{1,9})"?', re.IGNORECASE)
# A quoted string that is no number: what looks like a preference in it is none.
_QUOTED_TEXT = re.compile(rb'"[^"]*[^"0-9][^"]*"')
SLOW_VALIDATION_S = 0.1
_ECHOED_BYTES = 64 * 1024


class DisconnectedError(Exception):
    """The client went away before its request was complete; nobody needs an answer."""


class BodyTooLargeError(Exception):
    """The body has more bytes than are allowed."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Read the body of a request.

    Raises:
        BodyTooLargeError: it is, or says that it will be, larger than the limit.
        DisconnectedError: the client went away.
    """
    for name, value in scope["headers"]:
        # (A number of 5,000 digits is refused by int(), and too large in any case.)
        if name == b"content-length" and (len(value) > 18 or int(value) > limit):
            raise BodyTooLargeError
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLargeError
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


@functools.lru_cache(maxsize=64)  # a client says the same with each request
def preferred_wait_s(prefer: bytes) -> float:
    """Read ``wait=S`` out of the value of ``Prefer`` (RFC 7240, 4.3); 0 where there is none."""
    match = _PREFER_WAIT.search(_QUOTED_TEXT.sub(b'""', prefer))
    return 0.0 if match is None else float(match[1])


def header_value(scope: Scope, name: bytes) -> bytes:
    """Return the values of all lines with that name as one (RFC 9110, 5.3)."""
    return b", ".join(value for key, value in scope["headers"] if key == name)


def check_address(address: str) -> Response | None:
    """Return the answer to a bad task_address; None: it is a good one."""
    if _ADDRESS.fullmatch(address) and address not in (".", ".."):
        return None
    return _unprocessable(
        [
            {
                "type": "string_pattern_mismatch",
                "loc": ["path", "task_address"],
                "msg": "A task_address has 1 to 128 characters of A-Z a-z 0-9 . _ : -, "
                "and is not '.' or '..'",
                "input": address,
            }
        ]
    )


def check_input(handler: Handler, body: bytes) -> Response | None:
    """Return the answer to a bad input; None: it fits the input model.

    Its validators are the one piece of the source that runs in the front.
    """
    started = time.perf_counter()
    try:
        handler.input_model.model_validate_json(body)
    except ValidationError as error:
        return _unprocessable(_errors_of(error, body))
    except Exception:  # noqa: BLE001 - a user's validator may raise anything
        logger.exception("A validator of `%s` raised what is no ValueError", handler.name)
        return VALIDATOR_FAILED.response(
            f"The input model of `{handler.name}` could not judge this input; this is a defect "
            "of the source, which its log describes."
        )
    finally:
        took_s = time.perf_counter() - started
        if took_s > SLOW_VALIDATION_S:
            logger.warning(
                "The event loop was blocked for %.2f s by the input model of `%s` (%d bytes)",
                took_s,
                handler.name,
                len(body),
            )
    return None


def _errors_of(error: ValidationError, body: bytes) -> list[dict[str, Any]]:
    """Return pydantic's errors in the shape of FastAPI's 422."""
    if not body:
        return [{"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}]
    errors: list[dict[str, Any]] = []
    # FastAPI echoes the input, once for each error; of a large one that would be many times itself.
    for found in error.errors(include_url=False, include_input=len(body) <= _ECHOED_BYTES):
        entry: dict[str, Any] = {"input": None, **found, "loc": ["body", *found["loc"]]}
        if found["type"] == "json_invalid":
            entry["input"] = {}
        errors.append(entry)
    return errors


def _unprocessable(errors: list[dict[str, Any]]) -> Response:
    body = to_json({"detail": errors}, fallback=str, inf_nan_mode="null")
    return Response(body, 422, media_type="application/json")


def same_input(handler: Handler, known: bytes, given: bytes) -> bool:
    """Compare as the handler would: white space and the order of keys do not count."""
    if known == given:
        return True
    validate = handler.input_model.model_validate_json
    try:
        return bool(validate(known) == validate(given))
    except Exception:  # noqa: BLE001 - the model has changed since, or its == raises anything
        return False
