"""Warm-up: a handler is run once in each new worker, before that takes tasks."""

from __future__ import annotations

import os
import signal

import pytest

from conftest import StartServer
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

SOURCE = """
import os
import ogpu.service
from pydantic import BaseModel

class Input(BaseModel):
    text: str = ""

class Output(BaseModel):
    text: str = ""

said = []

@ogpu.service.init()
def load():
    said.append("init")

def tell(data):
    task = ogpu.service.current_task()
    task.progress(0.5, "half of it")
    return f"{data.text} {task.address} {task.function} {task.attempt} {task.deadline}"

@ogpu.service.expose(timeout=30, warmup=Input(text="first"))
def predict(data: Input) -> Output:
    said.append(f"{tell(data)} {os.environ['OGPU_TASK_ADDRESS']}")
    data.text = "changed"
    return Output(text="; ".join(said))

@ogpu.service.expose(warmup=Input(text="second"))
async def train(data: Input) -> Output:
    said.append(tell(data))
    return Output(text="; ".join(said))

@ogpu.service.expose(batch_size=3, warmup=Input(text="third"))
def embed(items: list[Input]) -> list[Output]:
    texts = "/".join(item.text for item in items)
    addresses = "/".join(task.address for task in ogpu.service.current_tasks())
    said.append(f"{texts} {addresses}")
    return [Output() for _ in items]

@ogpu.service.expose()
def cold(data: Input) -> Output:
    said.append("cold")
    return Output(text="; ".join(said))

ogpu.service.start()
"""
WARM = (
    "init; first warmup predict 1 None warmup; second warmup train 1 None; "
    "third/third/third warmup/warmup/warmup"
)


def ready(server: Server) -> bool:
    return all(slot["state"] == "ready" for slot in server.workers()["workers"])


def test_each_worker_is_warm_before_it_takes_a_task(start_server: StartServer, sink: Sink) -> None:
    """After @init, in the order of registration, a full batch where there are batches; nothing is
    recorded of it, and nothing sent.
    """
    server = start_server(SOURCE, OGPU_WORKERS=2, CALLBACK_URL=sink.url)
    wait_until(lambda: ready(server), "both are ready")
    assert server.log.count("The warm-up of `predict` took") == 2
    assert server.log.count("The warm-up of `train` took") == 2
    assert server.http.get("/tasks").json()["tasks"] == []
    killed = server.slot()["pid"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: server.slot()["pid"] not in (None, killed) and ready(server), "both again")
    for number in range(2):
        assert server.run("cold", f"cold-{number}")["result"]["text"].startswith(f"{WARM}; cold")
    assert server.http.get("/tasks/warmup").status_code == 404
    assert {delivery.address for delivery in sink.wait_for(2)} == {"cold-0", "cold-1"}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ('raise RuntimeError("no kernel image")', "RuntimeError: no kernel image"),
        ("return None", "`predict` returned None; Output was declared"),
    ],
)
def test_a_failure_is_one_of_init(start_server: StartServer, fault: str, told: str) -> None:
    """At the first start it ends the program, and the log says whose warm-up it was."""
    source = SOURCE.replace('data.text = "changed"', fault)
    server = start_server(source, wait=False)
    assert server.wait_exit() == 3
    assert "Init failed in worker 0:\nthe warm-up of `predict` failed:\n" in server.log
    assert told in server.log
