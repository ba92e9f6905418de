"""A server under test, and how one task is put to it over HTTP."""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .harness import START_LIMIT_S, BenchmarkError, Server, answer

_REFUSALS = (400, 413, 422, 500)  # what waiting does not change
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Answer:
    """What came of one task.

    Attributes:
        at: the time of day at which it was here.
        output: the handler's; none where it is not a good answer.
        words: what the client was told, for people.
    """

    at: float
    output: Any
    words: str


@dataclass(frozen=True)
class Candidate:
    """One peer's server, running.

    Attributes:
        name: the peer's label.
        server: its main process, its port and its log.
        path: where tasks are posted to.
        numbered: each task needs a path of its own: ``path`` and a number, or a word.
        prefer: the Prefer header that makes it wait for the result.
        wrapped_in: the key that an input is put under in the request; none where it is the body.
        listed: inputs and outputs are lists of one.
        found_in: the key that an output is found under in the answer; none where it is the body.
        answers: whether the answer has the output; False where results only go to CALLBACK_URL.
    """

    name: str
    server: Server
    path: str
    numbered: bool = False
    prefer: str | None = None
    wrapped_in: str | None = None
    listed: bool = False
    found_in: str | None = None
    answers: bool = True

    @property
    def headers(self) -> dict[str, str]:
        given = {"content-type": "application/json"}
        return given if self.prefer is None else {**given, "prefer": self.prefer}

    def body(self, data: Mapping[str, Any]) -> bytes:
        """Return the request's body for an input."""
        wrapped: object = data if self.wrapped_in is None else {self.wrapped_in: data}
        wrapped = [wrapped] if self.listed else wrapped
        return json.dumps(wrapped, separators=(",", ":")).encode()

    def output(self, answered: Any) -> Any:
        """Return the handler's output, out of an answer's JSON; None where there is none."""
        if self.listed and isinstance(answered, list) and len(answered) == 1:
            answered = answered[0]
        if self.found_in is None:
            return answered
        return answered.get(self.found_in) if isinstance(answered, dict) else None

    def send(self, connection: http.client.HTTPConnection, data: Mapping[str, Any]) -> str:
        """Put one task to it, and return its address; ``receive`` waits for what comes of it."""
        path = f"{self.path}once-{next(_numbers)}" if self.numbered else self.path
        connection.request("POST", path, self.body(data), self.headers)
        return path.rpartition("/")[2]

    def receive(self, connection: http.client.HTTPConnection) -> Any:
        """Return the output of the task that was sent.

        Raises:
            BenchmarkError: the answer is not 2xx, or has no output.
        """
        answered = answer(connection)
        output = self.output(answered)
        if output is None:
            raise BenchmarkError(f"{self.name} answers {str(answered)[:500]}")
        return output

    def ask(self, data: Mapping[str, Any]) -> Any:
        """Put one task to it, on a connection of its own, and return the output."""
        connection = self.server.connect()
        try:
            self.send(connection, data)
            return self.receive(connection)
        finally:
            connection.close()

    def exchange(self, data: Mapping[str, Any], limit_s: float) -> Answer | None:
        """Put one task to it and say what was answered, good or not; None when nothing was.

        Raises:
            OSError, http.client.HTTPException: nobody listens, or the connection was cut.
        """
        connection = self.server.connect()
        connection.timeout = limit_s
        try:
            self.send(connection, data)
            response = connection.getresponse()
            at, body = time.time(), response.read()
        except TimeoutError:
            return None
        finally:
            connection.close()
        return self._judged(at, response.status, body)

    def _judged(self, at: float, status: int, body: bytes) -> Answer:
        try:
            answered = json.loads(body)
        except ValueError:
            return Answer(at, None, str(status))
        is_good = 200 <= status < 300
        state = answered.get("state") if isinstance(answered, dict) else None
        return Answer(
            at,
            self.output(answered) if is_good else None,
            str(status) if state is None else f"{status}, {state}",
        )

    def wait_until_exchanged(
        self, data: Mapping[str, Any], expected: Any = None, poll_s: float = 0.05
    ) -> Any:
        """Exchange until there is a good answer; return the output.

        Raises:
            BenchmarkError: the output is not the one that is expected, or none came in time.
        """
        limit = time.monotonic() + START_LIMIT_S
        while (left_s := limit - time.monotonic()) > 0:
            self.server.see_alive()
            try:
                answer = self.exchange(data, left_s)
            except (OSError, http.client.HTTPException):
                answer = None  # nothing listens yet
            if answer is not None and answer.output is not None:
                if expected is not None and answer.output != expected:
                    raise BenchmarkError(f"{self.name} answers {str(answer.output)[:500]}")
                return answer.output
            time.sleep(poll_s)
        raise BenchmarkError(self.server.with_log(f"not ready within {START_LIMIT_S:g} s"))

    def wait_until_answered(
        self, data: Mapping[str, Any], expected: Any = None, poll_s: float = 0.05
    ) -> Any:
        """Ask until there is a 2xx answer; return the output.

        Raises:
            BenchmarkError: the output is not the one that is expected, or none came in time.
        """
        outputs = []

        def has_answered(connection: http.client.HTTPConnection) -> bool:
            self.send(connection, data)
            response = connection.getresponse()
            body = response.read()
            if response.status in _REFUSALS:
                message = f"{self.name} answers {response.status}: {body[:300]!r}"
                raise BenchmarkError(self.server.with_log(message))
            if not 200 <= response.status < 300:
                return False  # it listens, and has no worker yet
            outputs.append(self.output(json.loads(body)))
            return True

        self.server.wait_for(has_answered, poll_s)
        (output,) = outputs
        if output is None or (expected is not None and output != expected):
            raise BenchmarkError(f"{self.name} answers {str(output)[:500]}")
        return output
