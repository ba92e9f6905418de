"""Sources that import PyTorch: what may fork, what must spawn, and that both work."""

from __future__ import annotations

import importlib.util

import pytest

from conftest import StartServer

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None,
        reason="PyTorch is not installed (make test-torch installs it)",
    ),
]

SOURCE = """
import numpy
import torch
import ogpu.service
from pydantic import BaseModel
{at_import}
class Size(BaseModel):
    size: int = 400
class Total(BaseModel):
    total: float
@ogpu.service.expose(timeout=20)
def product(data: Size) -> Total:
    ones = torch.ones(data.size, data.size)
    return Total(total=float((ones @ ones).sum()))
ogpu.service.start()
"""


def test_importing_numpy_and_torch_leaves_a_fork_safe(start_server: StartServer) -> None:
    """OpenBLAS's threads, which importing NumPy starts, are no hazard; products work after it."""
    server = start_server(SOURCE.format(at_import="torch.cuda.is_available()"))
    assert "Workers are made by fork" in server.log
    assert server.run("product", "a")["result"]["total"] == 400**3


def test_numeric_code_at_import_means_spawn(start_server: StartServer) -> None:
    """libgomp's threads do not survive a fork: its child would hang in its first product."""
    at_import = "torch.set_num_threads(2); torch.ones(600, 600) @ torch.ones(600, 600)"
    server = start_server(SOURCE.format(at_import=at_import), wait=False)
    server.wait_ready(timeout_s=50)
    assert "OpenMP (libgomp) has threads" in server.log
    assert "Workers are made by spawn" in server.log
    assert server.run("product", "a")["result"]["total"] == 400**3
