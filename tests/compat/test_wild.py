"""Sources from the wild: they start, run, and deliver what the frozen module 0.2.3 delivered.

The sources are in ``wild/``. What they are expected to deliver, and to refuse, was taken from runs
of the same sources and tasks by 0.2.3 (FastAPI 0.165.0, Python 3.11); where that one delivered
nothing, this says how the task ends here.
"""

from __future__ import annotations

import base64
import io
import os
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import StartServer
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

WILD = Path(__file__).parent / "wild"
# The stand-ins for torch and its like; and ours, where the tests run from a source tree.
PYTHONPATH = os.pathsep.join(
    filter(None, [str(WILD / "standins"), os.environ.get("PYTHONPATH", "")])
)


def recording(seconds: float) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(100)
        sound.writeframes(b"\0" * int(seconds * 100))
    return base64.b64encode(file.getvalue()).decode()


@dataclass
class Task:
    """One POST, and its end: ``delivered`` is the callback's body, ``refused`` a 422's (type, loc).

    With neither of them the task fails, with ``reason``, and nothing is delivered.
    """

    function: str
    input: object
    delivered: object = None
    refused: list[tuple[str, list[str | int]]] = field(default_factory=list)
    reason: str = "exception"


@dataclass
class Source:
    command: list[str]
    tasks: list[Task]
    folder: Path = WILD
    settings: dict[str, str] = field(default_factory=dict)


TEXT2IMAGE = Source(
    ["main.py"],
    [
        Task(
            "text2image",
            {"prompt": "a cat", "seed": 7},
            {
                "image_base64": "iVBOR2oZR7dvMegpRMLX9TjAK0bTfp60+HpXS1LV8eP4TuE4",
                "device": "cpu",
                "number": 1,
            },
        ),
        Task(
            "text2image",
            {},
            {
                "image_base64": "iVBOR3eXyO3of/0T/Tr91ZsuUkJLk4XUbuS25o0Ali0fkVZh",
                "device": "cpu",
                "number": 2,
            },
        ),
        Task("text2image", {"prompt": ""}),
    ],
    folder=WILD / "text2image",
)
CHAT = Source(
    ["-m", "chat.main"],
    [
        Task(
            "text2text",
            {"messages": [{"content": "hello there"}]},
            {
                "role": "assistant",
                "content": "ereht olleh",
                "usage": {"prompt_tokens": 2, "completion_tokens": 2},
                "finish_reason": None,
            },
        ),
        Task("text2text", {"messages": []}, refused=[("too_short", ["body", "messages"])]),
        Task(
            "text2text",
            {"messages": [{"role": "robot"}], "temperature": 3},
            refused=[
                ("literal_error", ["body", "messages", 0, "role"]),
                ("less_than_equal", ["body", "temperature"]),
            ],
        ),
    ],
)
HUGGINGFACE = Source(
    ["huggingface/main.py"],
    [
        Task(
            "inference",
            {"input": "good"},
            {"result": {"output": [{"label": "POSITIVE", "score": 0.4}]}},
        ),
        Task(
            "inference",
            {"input": {"text": "x"}, "args": {"k": 1}},
            {"result": {"output": [{"label": "POSITIVE", "score": 0.1, "k": 1}]}},
        ),
        # It catches everything, and returns None.
        Task("inference", {"input": {"no": 1}}, reason="invalid_output"),
    ],
    settings={"PIPE_ARGS_STR": "{'task': 'text-classification', 'model': 'm'}"},
)
TRANSCRIBE = Source(
    ["transcribe.py", "--model", "large", "--beam", "2"],
    [
        Task(
            "transcribe",
            {"audio": recording(1.2)},
            {
                "text": "w0 w1",
                "language": "en",
                "task": "transcribe",
                "segments": [
                    {"id": 0, "start": 0.0, "end": 0.5, "text": " w0"},
                    {"id": 1, "start": 0.5, "end": 1.0, "text": " w1"},
                ],
                "duration": 1.2,
                "error": None,
            },
        ),
        Task(
            "transcribe",
            {"audio": "!!", "language": "de", "task": "translate"},
            {
                "text": "",
                "language": "de",
                "task": "translate",
                "segments": [],
                "duration": None,
                "error": "not base64",
            },
        ),
        Task(
            "transcribe",
            {"audio": "", "language": "fr"},
            refused=[("value_error", ["body", "language"])],
        ),
        Task(
            "transcribe",
            {"audio": "", "language": "english", "temperature": 2},
            refused=[
                ("string_pattern_mismatch", ["body", "language"]),
                ("less_than_equal", ["body", "temperature"]),
            ],
        ),
    ],
)
POOLED = [[0.7890625, 0.58984375], [0.2421875, 0.13671875]]
EMBEDDINGS = Source(
    ["embeddings.py"],
    [
        Task(
            "embeddings",
            {"texts": [" a ", "b"], "options": {"size": 2}, "next": {"texts": []}},
            {
                "items": [
                    {"values": [0.63494, 0.772562], "norm": 1.248889},
                    {"values": [0.870824, 0.491594], "norm": 0.278113},
                ],
                "total": 2,
                "links": {"depth": "1"},
            },
        ),
        Task(
            "embed_in_pool",
            {"texts": ["a", "b"], "options": {"size": 2, "normalize": False}},
            POOLED,
        ),
        Task(
            "embeddings",
            {"texts": [], "nope": 1},
            refused=[("extra_forbidden", ["body", "nope"])],
        ),
    ],
)
SEEN: dict[str, object] = {
    "model_name": "m",
    "colour": "red",
    "size": 2,
    "text": "naïve ☃ \U0001f600",
    "big": 1152921504606846976,
    "tiny": 1e-07,
}
FORMS = Source(
    ["forms.py"],
    [
        Task(
            "see",
            {
                "modelName": "m",
                "when": "2024-01-01T00:00:00",
                "key": "12345678-1234-5678-1234-567812345678",
                "limit": 1,
                "shape": {"kind": "square", "side": 2},
                "num_inference_steps": 3,
                "tags": ["x"],
                "other": {"a": [1, None]},
            },
            {
                **SEEN,
                "types": {
                    "model_name": "str",
                    "prompt_text": "str",
                    "shape": "Square",
                    "when": "str",
                    "key": "str",
                    "limit": "int",
                    "colour": "Colour",
                    "tags": "set",
                    "steps": "int",
                },
                "extra": {"other": {"a": [1, None]}},
            },
        ),
        Task(
            "see",
            {"model_name": "m", "prompt_text": {"a": 1}, "limit": 1.5, "colour": "blue"},
            {
                **SEEN,
                "types": {
                    "model_name": "str",
                    "prompt_text": "dict",
                    "shape": "NoneType",
                    "when": "str",
                    "key": "str",
                    "limit": "float",
                    "colour": "str",
                    "tags": "set",
                    "steps": "int",
                },
                "colour": "blue",
                "extra": None,
            },
        ),
        # 0.2.3 accepted this one, and failed: "datetime is not JSON serializable".
        Task(
            "odd",
            {"model_name": "m"},
            {
                "when": "2024-05-17T12:30:00Z",
                "day": "2024-05-17",
                "took": "PT1M1.5S",
                "id": "12345678-1234-5678-1234-567812345678",
                "price": "12.50",
                "raw": "raw",
                "loss": None,
                "perplexity": None,
                "kind": "one",
                "where": "/tmp/x",
                "labels": [1],
                "point": {"x": 1, "y": 2},
            },
        ),
        Task("slim", {"model_name": "m"}, {"text": "M", "nested": {"text": "IN"}}),
        Task("more", {"model_name": "m"}, {"text": "A SUBCLASS", "score": 0.5}),
        Task("as_dict", {"model_name": "m"}, reason="invalid_output"),
        Task("see", {"modelName": 1}, refused=[("string_type", ["body", "modelName"])]),
    ],
)
DECORATED = Source(
    ["decorated.py"],
    [
        Task("flaky", {"text": "x"}, {"text": "x", "by": "flaky"}),
        Task("flaky", {"text": "never"}, reason="invalid_output"),
        Task("echo", {"text": "x"}, {"text": "x", "by": "static"}),
        Task("summarize", {"text": "x"}, {"text": "X", "by": "one"}),
        Task("say_hello", {"text": "x"}, {"text": "hello x", "by": "say_hello"}),
        Task("say_bye", {"text": "x"}, {"text": "bye x", "by": "say_bye"}),
        Task("%3Clambda%3E", {"text": "x"}, {"text": "λ", "by": ""}),
    ],
)
INSIDE = Source(
    ["inside.py"],
    [
        Task("queued", {}, {"values": [0, 1, 4]}),
        Task("threads", {}, {"values": [0, 1, 2, 0, -1, -2]}),
        Task("loops", {}, {"values": [0, 1, 4, 0]}),
        Task("shells", {}, {"values": [1, 2, 3, 3]}),
    ],
)
Started = Callable[..., Server]


@pytest.fixture
def start_wild(start_server: StartServer, sink: Sink) -> Started:
    """Start a source of ``wild/`` with the sink as its callback URL."""

    def start(source: Source, **settings: object) -> Server:
        chosen = {"PYTHONPATH": PYTHONPATH, "CALLBACK_URL": sink.url, **source.settings, **settings}
        return start_server(command=source.command, folder=source.folder, **chosen)

    return start


def run_all(server: Server, sink: Sink, tasks: list[Task]) -> None:
    """Send the tasks, and hold their ends to what is expected."""
    for number, task in enumerate(tasks):
        answer = server.post(task.function, f"t{number}", task.input)
        if task.refused:
            assert answer.status_code == 422
            found = [(error["type"], error["loc"]) for error in answer.json()["detail"]]
            assert found == task.refused
        else:
            assert answer.status_code == 202, answer.text
            assert answer.json() == {"task_address": f"t{number}", "status": "accepted"}
    expected = {f"t{n}": t.delivered for n, t in enumerate(tasks) if t.delivered is not None}
    for number, task in enumerate(tasks):
        if task.refused or task.delivered is not None:
            continue
        error = server.wait_state(f"t{number}", "failed")["error"]
        assert error["reason"] == task.reason
    deliveries = sink.wait_for(len(expected))
    assert {d.path.removeprefix("/callback/"): d.json for d in deliveries} == expected
    assert all(d.headers["content-type"] == "application/json" for d in deliveries)


@pytest.mark.parametrize(
    ("source", "method"),
    [
        (TEXT2IMAGE, "fork"),
        (TEXT2IMAGE, "spawn"),
        (CHAT, "spawn"),
        (HUGGINGFACE, "fork"),
        (TRANSCRIBE, "spawn"),
        (EMBEDDINGS, "fork"),
        (EMBEDDINGS, "spawn"),
        (FORMS, "fork"),
        (DECORATED, "spawn"),
        (INSIDE, "fork"),
        (INSIDE, "spawn"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value.command),
)
def test_it_delivers_what_it_delivered(
    start_wild: Started, sink: Sink, source: Source, method: str
) -> None:
    """The same results at the same paths, and the same refusals."""
    server = start_wild(source, OGPU_START_METHOD=method)
    assert f"Workers are made by {method}" in server.log
    run_all(server, sink, source.tasks)


def test_a_pool_of_spawned_processes_inside_a_handler(start_wild: Started, sink: Sink) -> None:
    """Its children import the source again, whose start() is not guarded (0.2.3 never ended)."""
    server = start_wild(EMBEDDINGS, POOL_METHOD="spawn")
    run_all(server, sink, [EMBEDDINGS.tasks[1]])


def test_a_source_with_signal_handlers_and_atexit_ends_well(start_wild: Started) -> None:
    """What comes after start(), and what atexit was given, runs once, when the service ends."""
    server = start_wild(INSIDE)
    assert "[worker 0] inside | consumer started" in server.log
    assert server.stop() == 0
    assert server.log.count("inside | after start") == 1
    assert server.log.count("inside | goodbye") == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_that_trains_in_a_subprocess(
    start_wild: Started, sink: Sink, tmp_path: Path, method: str
) -> None:
    """Run from elsewhere. Its trainer's failures are results, and its log is written once a line.

    The one difference to 0.2.3: the task's address is where the source looks for it.
    """
    source = Source([str(WILD / "finetune" / "worker.py")], [], folder=tmp_path)
    server = start_wild(source, OGPU_START_METHOD=method, WORKER_LOG_DIR=tmp_path / "logs")
    done = {"adapter_base64": "bG9yYWxvcmFsb3Jh", "artifact_sha256": "fcf6939d9963764f"}
    nothing = dict.fromkeys(done)
    failed = {"status": "failed", **nothing}
    tasks = [
        Task(
            "finetune",
            {"base_model": "llama", "unknown": 1},
            {"status": "completed", "job": "t0", **done, "error": None},
        ),
        Task(
            "finetune",
            {"base_model": "broken"},
            {**failed, "job": "t1", "error": "torch.OutOfMemoryError: CUDA out of memory"},
        ),
        Task(
            "finetune",
            {"base_model": "endless", "timeout_seconds": 0.2},
            {**failed, "job": "t2", "error": "Training exceeded timeout (0.2s)"},
        ),
        # A wrapper that its model_validate() would open: neither FastAPI nor this calls it.
        Task(
            "finetune",
            {"data": {"base_model": "broken"}},
            {"status": "completed", "job": "t3", **done, "error": None},
        ),
    ]
    run_all(server, sink, tasks)
    assert server.stop() == 0
    lines = (tmp_path / "logs" / "worker.log").read_text().splitlines()
    assert lines.count("[INFO] ogpu.service: PHASE=train_start base_model=llama") == 1
    assert lines.count("[INFO] finetune.phase: PHASE=train_start base_model=llama") == 1
    # The level that it gave the logger in @init holds for the log of the service, too.
    assert lines.count("[DEBUG] ogpu.service: heartbeat sent: train_start") == 4
    assert server.log.count("DEBUG       [worker 0 t0] heartbeat sent: train_start") == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_source_that_wires_the_service_itself(
    start_wild: Started, sink: Sink, tmp_path: Path, method: str
) -> None:
    """Constants assigned in ``server``, a ``.env`` where it is started, a log of its own."""
    (tmp_path / ".env").write_text("API_TOKEN=from-the-file\nQUEUE=results\nexport X='a b'\n")
    log_file = tmp_path / "own.log"
    source = Source([str(WILD / "wiring.py")], [], folder=tmp_path)
    # What it assigns wins over the environment, as it did: this port is taken, and not asked for.
    taken = sink.url.split(":")[2].split("/")[0]
    server = start_wild(
        source, OGPU_START_METHOD=method, PORT=0, OGPU_PORT=taken, LOG_FILE=log_file
    )
    server.post("ask", "t0", {"text": "x"})
    (delivery,) = sink.wait_for(1)
    assert (delivery.path, delivery.json) == ("/callback/results/t0", {"token": "from-the-file"})
    assert server.stop() == 0
    own = log_file.read_text().splitlines()
    said = ("DEBUG looking at x", "TIMEOUT a level of ours")
    success = "SUCCESS [t0] Function: `ask` completed successfully"
    for line in (*said, success, "INFO Starting OpenGPU Service server..."):
        assert own.count(line) == 1, own
        assert server.log.count(f"MINE {line}") == 1, server.log


def test_what_the_operator_sets_of_the_log_wins(
    start_wild: Started, sink: Sink, tmp_path: Path
) -> None:
    source = Source([str(WILD / "wiring.py")], [], folder=tmp_path)
    server = start_wild(
        source,
        OGPU_LOG_LEVEL="INFO",
        OGPU_LOG_FORMAT="plain",
        PORT=0,
        QUEUE="q",
        API_TOKEN="t",
        LOG_FILE=tmp_path / "own.log",
    )
    server.post("ask", "t0", {"text": "x"})
    sink.wait_for(1)
    server.wait_log("a level of ours")
    assert "looking at" not in server.log
    assert "MINE" not in server.log


def test_a_source_with_a_server_of_its_own(
    start_server: StartServer, sink: Sink, nothing_left_over: None
) -> None:
    """It replaces start(), and makes an application of what today's names yield.

    The init function runs in its process, the timeout is that of the frozen module: its server
    goes on without the handler, and nothing is delivered.
    """
    server = start_server(
        command=["worker.py"],
        folder=WILD / "own_server",
        wait=False,
        CALLBACK_URL=sink.url,
        HOST="127.0.0.1",
        PORT=0,
    )
    server.wait_listening()

    def free() -> bool:
        """It runs one job at a time, and says 409."""
        try:
            return server.post("job", "again", {"fail": True}).status_code == 202
        except httpx.ConnectError:
            return False

    wait_until(free, "it takes jobs")
    server.wait_log("Exception in `job`: no such dataset")
    wait_until(lambda: server.post("job", "a", {}).status_code == 202, "accepted")
    (delivery,) = sink.wait_for(1)
    assert (delivery.address, delivery.json) == (
        "a",
        {"status": "completed", "task": "a", "ready": True},
    )
    wait_until(lambda: server.post("job", "b", {"seconds": 5}).status_code == 202, "accepted")
    assert server.post("job", "c", {}).json() == {"detail": "already training"}
    server.wait_log("`job` timed out after 0.4 seconds")
    assert "Init function `load` completed successfully" in server.log
    assert "Callback sent" in server.log
    server.stop()
    assert len(sink.deliveries) == 1


def test_a_replaced_send_callback_is_not_passed_over_in_silence(
    start_server: StartServer, sink: Sink
) -> None:
    """Results are delivered by the outbox; the log says that the replacement is not called."""
    server = start_server(
        "import ogpu.service\nfrom ogpu.service import server\nfrom pydantic import BaseModel\n"
        "class Data(BaseModel):\n    n: int = 1\n"
        "@ogpu.service.expose()\ndef echo(data: Data) -> Data:\n    return data\n"
        "server.send_callback = print\nserver.start()\n",
        CALLBACK_URL=sink.url,
    )
    assert "has replaced ogpu.service.server.send_callback" in server.log
    server.post("echo", "a", {})
    (delivery,) = sink.wait_for(1)
    result: Any = delivery.json
    assert result == {"n": 1}
