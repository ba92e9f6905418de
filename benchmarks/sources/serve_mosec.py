"""The chosen handler on Mosec, JSON in and out, the same models; in batches where it has them."""

import os

import handlers
from mosec import Server, Worker

chosen = handlers.chosen()
BATCH_SIZE = int(os.environ.get("BENCHMARK_BATCH_SIZE", "1"))
_WINDOW_MS = 10


class Handler(Worker):
    def __init__(self) -> None:
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
    server = Server()
    server.append_worker(
        BatchHandler if BATCH_SIZE > 1 else Handler,
        num=int(os.environ["BENCHMARK_WORKERS"]),
        max_batch_size=BATCH_SIZE,
        max_wait_time=_WINDOW_MS if BATCH_SIZE > 1 else 0,
    )
    server.run()
