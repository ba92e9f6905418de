"""The chosen handler as a task of Celery, a worker that runs it, and a client that asks (lines.py).

As a program it starts a broker of its own (Redis, in this folder, with nothing on disk) and the
worker: the prefork pool, one message fetched at a time, a hard time limit. Handlers are imported
before the first fork, as an application's modules are.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import handlers
from celery import Celery
from celery.signals import worker_process_init

import lines

chosen = handlers.chosen()
SOCKET = Path.cwd() / "redis.sock"
_START_LIMIT_S = 30

app = Celery("serve_celery", broker=f"redis+socket://{SOCKET}", backend=f"redis+socket://{SOCKET}")
app.conf.update(
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)


@worker_process_init.connect
def load(**_: object) -> None:
    handlers.prepare_and_load()


@app.task(time_limit=chosen.TIMEOUT_S)
def handle(data: str) -> str:
    return str(chosen.handle(chosen.Input.model_validate_json(data)).model_dump_json())


def main() -> None:
    redis = shutil.which("redis-server")
    assert redis is not None  # the peer has looked
    given = ["--port", "0", "--unixsocket", str(SOCKET), "--save", "", "--appendonly", "no"]
    subprocess.Popen([redis, *given])
    limit = time.monotonic() + _START_LIMIT_S
    while not SOCKET.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    workers = os.environ["BENCHMARK_WORKERS"]
    given = ["worker", "--pool=prefork", "--concurrency", workers, "--loglevel=WARNING"]
    given += ["--without-gossip", "--without-mingle"]
    subprocess.Popen([sys.executable, "-m", "celery", "-A", "serve_celery", *given])
    lines.serve(lambda data: handle.delay(data).get(disable_sync_subtasks=False))


if __name__ == "__main__":
    sys.modules["serve_celery"] = sys.modules["__main__"]  # the worker knows the task by this name
    main()
