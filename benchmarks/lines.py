"""A program under test that is no web server: tasks go to it as lines (sources/lines.py)."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .candidate import Answer, Candidate
from .harness import HOST


@dataclass(frozen=True)
class LineCandidate(Candidate):
    """It tells itself when it had the answer, so that the way here is not counted."""

    def exchange(self, data: Mapping[str, Any], limit_s: float) -> Answer | None:
        with (
            socket.create_connection((HOST, self.server.port), limit_s) as connection,
            connection.makefile("rw", encoding="utf-8") as lines,
        ):
            lines.write(json.dumps(data) + "\n")
            lines.flush()
            try:
                line = lines.readline()
            except TimeoutError:
                return None
        if not line:
            raise ConnectionResetError("it has closed the connection")
        told = json.loads(line)
        output = told.get("output")
        return Answer(told["at"], output, told.get("error", "answered"))

    def wait_until_answered(
        self, data: Mapping[str, Any], expected: Any = None, poll_s: float = 0.05
    ) -> Any:
        return self.wait_until_exchanged(data, expected, poll_s)
