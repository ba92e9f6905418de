"""Sources as they are in the wild: unchanged means unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import StartServer
from support.sink import Sink

MINIMAL = """
import ogpu.service
from pydantic import BaseModel

class Input(BaseModel):
    text: str

class Output(BaseModel):
    result: str
    confidence: float

@ogpu.service.init()
def setup():
    ogpu.service.logger.info("Loading model...")

@ogpu.service.expose()
def predict(data: Input) -> Output:
    return Output(result="positive", confidence=0.97)

ogpu.service.start()
"""
GUARDED = MINIMAL.replace(
    "ogpu.service.start()", 'if __name__ == "__main__":\n    ogpu.service.start()'
)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("source", [MINIMAL, GUARDED], ids=["unguarded", "guarded"])
def test_the_minimal_source_runs(
    start_server: StartServer, sink: Sink, source: str, method: str
) -> None:
    """As it is, with either start method: the result arrives at the callback, byte for byte."""
    server = start_server(source, OGPU_START_METHOD=method, CALLBACK_URL=sink.url)
    assert server.post("predict", "0xabc", {"text": "fine"}).status_code == 202
    (delivery,) = sink.wait_for(1)
    assert delivery.body == b'{"result":"positive","confidence":0.97}'
    assert "[worker 0] Loading model..." in server.log
    assert server.stop() == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_package_with_relative_imports_runs_with_dash_m(
    start_server: StartServer, tmp_path: Path, method: str
) -> None:
    """`python -m package.main` with `from .models import Input`."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    models, rest = MINIMAL.split("@ogpu.service.init()")
    (package / "models.py").write_text(models.replace("import ogpu.service\n", ""))
    (package / "main.py").write_text(
        f"import ogpu.service\nfrom .models import Input, Output\n@ogpu.service.init(){rest}"
    )
    server = start_server(command=["-m", "package.main"], folder=tmp_path, OGPU_START_METHOD=method)
    task = server.run("predict", "a", {"text": "x"})
    assert task["result"] == {"result": "positive", "confidence": 0.97}


def test_a_source_that_imports_its_neighbours_runs_from_elsewhere(
    start_server: StartServer, tmp_path: Path
) -> None:
    """`python folder/main.py` from another folder; a spawned worker finds the same modules."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "neighbour.py").write_text("ANSWER = 'from the neighbour'\n")
    (folder / "main.py").write_text(
        MINIMAL.replace(
            "import ogpu.service", "import ogpu.service\nfrom neighbour import ANSWER", 1
        ).replace('result="positive"', "result=ANSWER")
    )
    server = start_server(command=["folder/main.py"], folder=tmp_path, OGPU_START_METHOD="spawn")
    assert server.run("predict", "a", {"text": "x"})["result"]["result"] == "from the neighbour"


@pytest.mark.parametrize(
    ("at_import", "why"),
    [
        (
            "import threading; wait = threading.Event().wait; "  # noqa: ISC004 - one statement line
            "threading.Thread(target=wait, daemon=True, name='loader').start()",
            "started threads while it was imported (loader)",
        ),
        (
            "import sys, types; sys.modules['tensorflow'] = types.ModuleType('tensorflow')",
            "TensorFlow is loaded",
        ),
    ],
    ids=["thread", "tensorflow"],
)
def test_where_a_fork_is_not_safe_workers_are_spawned(
    start_server: StartServer, at_import: str, why: str
) -> None:
    """One log line says why; the source's tasks run all the same."""
    server = start_server(
        MINIMAL.replace("import ogpu.service", f"import ogpu.service\n{at_import}", 1)
    )
    assert server.log.count("Workers are spawned, since a fork is not safe") == 1
    assert why in server.log
    assert server.run("predict", "a", {"text": "x"})["state"] == "succeeded"


def test_handlers_that_a_worker_would_not_find_are_an_error_in_words(
    start_server: StartServer,
) -> None:
    """@expose under the main guard cannot work with spawn; the message says so."""
    head, tail = MINIMAL.split("@ogpu.service.expose()")
    body = f"@ogpu.service.expose(){tail}".replace("\n", "\n    ")
    server = start_server(
        f'{head}\nif __name__ == "__main__":\n    {body}', wait=False, OGPU_START_METHOD="spawn"
    )
    assert server.wait_exit() == 3
    assert "did not register predict" in server.log
    assert 'if __name__ == "__main__"' in server.log


def test_a_source_that_cannot_be_imported_again_says_why(
    start_server: StartServer, tmp_path: Path
) -> None:
    marker = tmp_path / "once"
    at_import = f"import pathlib; pathlib.Path({str(marker)!r}).touch(exist_ok=False)"
    server = start_server(
        MINIMAL.replace("import ogpu.service", f"import ogpu.service\n{at_import}", 1),
        wait=False,
        OGPU_START_METHOD="spawn",
    )
    assert server.wait_exit() == 3
    assert "FileExistsError" in server.log


def test_a_source_with_its_own_threads_in_init_works(start_server: StartServer) -> None:
    """@init may start threads: it runs after the fork."""
    source = MINIMAL.replace(
        '    ogpu.service.logger.info("Loading model...")',
        "    import threading, time\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    )
    server = start_server(source)
    assert "made by fork" in server.log
    assert server.run("predict", "a", {"text": "x"})["state"] == "succeeded"


def test_todays_constants_may_be_assigned_before_start(
    start_server: StartServer, sink: Sink
) -> None:
    """`ogpu.service.config.CALLBACK_URL = …` in the source, without the variable, still counts."""
    source = MINIMAL.replace(
        "ogpu.service.start()",
        f"import ogpu.service.config\nogpu.service.config.CALLBACK_URL = {sink.url!r}\n"
        "ogpu.service.start()",
    )
    server = start_server(source)
    server.post("predict", "a", {"text": "x"})
    sink.wait_for(1)


def test_the_handlers_own_subprocesses_of_this_interpreter_work(start_server: StartServer) -> None:
    source = MINIMAL.replace(
        'return Output(result="positive"',
        "import subprocess, sys\n"
        "    said = subprocess.run([sys.executable, '-c', 'print(40 + 2)'], "
        "capture_output=True, text=True).stdout.strip()\n"
        "    return Output(result=said",
    )
    assert start_server(source).run("predict", "a", {"text": "x"})["result"]["result"] == "42"
