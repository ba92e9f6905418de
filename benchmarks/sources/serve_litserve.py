"""The chosen handler on LitServe, in batches where it has them."""

import os

import handlers
import litserve

chosen = handlers.chosen()
BATCH_SIZE = int(os.environ.get("BENCHMARK_BATCH_SIZE", "1"))


class Handler(litserve.LitAPI):
    def setup(self, _: str) -> None:
        handlers.prepare_and_load()

    def decode_request(self, request: dict) -> object:
        return chosen.Input.model_validate(request)

    def predict(self, data: object) -> object:
        return chosen.handle(data)

    def encode_response(self, output: object) -> dict:
        return output.model_dump()


class BatchHandler(Handler):
    def batch(self, inputs: list) -> list:
        return inputs

    def predict(self, data: list) -> list:
        return chosen.handle_many(data)

    def unbatch(self, output: list) -> list:
        return output


if __name__ == "__main__":
    if BATCH_SIZE > 1:
        api = BatchHandler(max_batch_size=BATCH_SIZE, batch_timeout=0.01)
    else:
        api = Handler()
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        devices=1,
        workers_per_device=int(os.environ["BENCHMARK_WORKERS"]),
        timeout=chosen.TIMEOUT_S,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCHMARK_PORT"]),
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
