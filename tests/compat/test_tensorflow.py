"""Sources that import TensorFlow: when workers are spawned, and that both ways work."""

from __future__ import annotations

import importlib.util

import pytest

from conftest import StartServer

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is None,
        reason="TensorFlow is not installed (make test-ml installs it)",
    ),
    pytest.mark.timeout(120),
]

SOURCE = """
import ogpu.service
from pydantic import BaseModel
{at_import}
class Size(BaseModel):
    size: int = 400
class Total(BaseModel):
    total: float
@ogpu.service.init()
def load():
    global tf
    import tensorflow as tf
@ogpu.service.expose(timeout=20)
def product(data: Size) -> Total:
    ones = tf.ones((data.size, data.size))
    return Total(total=float(tf.reduce_sum(ones @ ones)))
ogpu.service.start()
"""


def test_an_import_in_init_leaves_a_fork_safe(start_server: StartServer) -> None:
    """The template has no TensorFlow then, so each worker has a runtime of its own."""
    server = start_server(SOURCE.format(at_import=""), wait=False)
    server.wait_ready(timeout_s=100)
    assert "Workers are made by fork" in server.log
    assert server.run("product", "a")["result"]["total"] == 400**3


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_keras_on_pytorch_is_no_tensorflow(start_server: StartServer) -> None:
    """Keras loads the library of its backend alone, so that this fork is as safe as PyTorch's."""
    at_import = "import os; os.environ['KERAS_BACKEND'] = 'torch'; import keras"
    source = SOURCE.format(at_import=at_import).replace("import tensorflow as tf", "tf = None")
    server = start_server(source, wait=False)
    server.wait_ready(timeout_s=100)
    assert "Workers are made by fork" in server.log
