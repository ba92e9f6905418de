"""The chosen handler on Mosec, JSON in and out, the same models."""

import os

import handlers
from mosec import Server, Worker

chosen = handlers.chosen()


class Handler(Worker):
    def __init__(self) -> None:
        handlers.prepare_and_load()

    def deserialize(self, data: bytes) -> object:
        return chosen.Input.model_validate_json(data)

    def forward(self, data: object) -> object:
        return chosen.handle(data)

    def serialize(self, data: object) -> bytes:
        return data.model_dump_json().encode()


if __name__ == "__main__":
    server = Server()
    server.append_worker(Handler, num=int(os.environ["BENCHMARK_WORKERS"]))
    server.run()
