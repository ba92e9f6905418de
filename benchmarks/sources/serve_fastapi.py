"""The chosen handler in a bare FastAPI app, in the web server's own process.

On its loop if it is quick, else in its threads.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import handlers
import uvicorn
from fastapi import FastAPI

chosen = handlers.chosen()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    handlers.prepare_and_load()
    yield


app = FastAPI(lifespan=lifespan)


if chosen.QUICK:

    @app.post("/handle")
    async def handle(data: chosen.Input) -> chosen.Output:
        return chosen.handle(data)

else:

    @app.post("/handle")
    def handle(data: chosen.Input) -> chosen.Output:
        return chosen.handle(data)


if __name__ == "__main__":
    uvicorn.run(
        "serve_fastapi:app",  # a name: several workers import it themselves
        host="127.0.0.1",
        port=int(os.environ["BENCHMARK_PORT"]),
        workers=int(os.environ["BENCHMARK_WORKERS"]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
