"""Tasks as lines over TCP, for those that are no server: a pool of processes, a queue's client.

A connection brings one line, the JSON of a handler's input, and is answered by one:
``{"at": …, "output": …}``, or with "error" in place of "output". ``at`` is the time of day at which
the answer was had: what this program costs on top is not counted.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable


def serve(answer: Callable[[str], str]) -> None:
    """Listen on BENCHMARK_PORT until the process is ended; a thread for each connection.

    Args:
        answer: takes the JSON of an input, returns the JSON of an output; what it raises is told.
    """
    with socket.create_server(("127.0.0.1", int(os.environ["BENCHMARK_PORT"]))) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection, answer), daemon=True).start()


def _answer(connection: socket.socket, answer: Callable[[str], str]) -> None:
    with connection, connection.makefile("rw", encoding="utf-8") as lines:
        told: dict[str, object]
        try:
            output = answer(lines.readline())
            told = {"at": time.time(), "output": json.loads(output)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the harness is told
            told = {"at": time.time(), "error": f"{type(error).__name__}: {error}"}
        lines.write(json.dumps(told) + "\n")
