"""The chosen handler as a BentoML service, in batches where it has them.

``python -m bentoml serve serve_bentoml:Service``. A quick handler runs on the event loop, any other
one in BentoML's thread.
"""

import os

import bentoml
import handlers

chosen = handlers.chosen()
BATCH_SIZE = int(os.environ.get("BENCHMARK_BATCH_SIZE", "1"))

if BATCH_SIZE > 1:

    @bentoml.api(batchable=True, max_batch_size=BATCH_SIZE, max_latency_ms=30_000)
    def handle(_, data: list[chosen.Input], /) -> list[chosen.Output]:
        return chosen.handle_many(data)

elif chosen.QUICK:

    @bentoml.api
    async def handle(_, data: chosen.Input, /) -> chosen.Output:
        return chosen.handle(data)

else:

    @bentoml.api
    def handle(_, data: chosen.Input, /) -> chosen.Output:
        return chosen.handle(data)


@bentoml.service(
    workers=int(os.environ["BENCHMARK_WORKERS"]),
    traffic={"timeout": chosen.TIMEOUT_S},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Service:
    handle = handle

    def __init__(self) -> None:
        handlers.prepare_and_load()
