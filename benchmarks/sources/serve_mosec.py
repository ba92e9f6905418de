"""The chosen handler on Mosec, JSON in and out, the same models; in batches where it has them.

Forked workers find the handlers prepared; spawned ones, as Mosec makes them by itself, do it all.
"""

import os
import sys

import handlers
from mosec import Server, Worker

chosen = handlers.chosen()
BATCH_SIZE = int(os.environ.get("BENCHMARK_BATCH_SIZE", "1"))
_WINDOW_MS = 10
START_METHOD = os.environ["BENCHMARK_START_METHOD"]


class Handler(Worker):
    def __init__(self) -> None:
        if START_METHOD == "fork":
            chosen.load()
        else:
            handlers.prepare_and_load()

    def deserialize(self, data: bytes) -> chosen.Input:
        return chosen.Input.model_validate_json(data)

    def serialize(self, data: chosen.Output) -> bytes:
        return data.model_dump_json().encode()

    def forward(self, data: chosen.Input) -> chosen.Output:
        return chosen.handle(data)


class BatchHandler(Handler):
    def forward(self, data: list[chosen.Input]) -> list[chosen.Output]:
        return chosen.handle_many(data)


if __name__ == "__main__":
    # Of a request, and so of a handler; 3 s as it comes. It has no other way to be told.
    sys.argv += ["--timeout", str(round(chosen.TIMEOUT_S * 1000))]
    server = Server()
    if START_METHOD == "fork" and hasattr(chosen, "prepare"):
        chosen.prepare()
    server.append_worker(
        BatchHandler if BATCH_SIZE > 1 else Handler,
        num=int(os.environ["BENCHMARK_WORKERS"]),
        start_method=START_METHOD,
        max_batch_size=BATCH_SIZE,
        max_wait_time=_WINDOW_MS if BATCH_SIZE > 1 else 0,
    )
    server.run()
