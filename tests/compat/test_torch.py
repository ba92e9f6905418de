"""Sources that import PyTorch: what may fork, what must spawn, and that both work."""

from __future__ import annotations

import importlib.util

import pytest

from conftest import StartServer
from ogpu.service.devices.cores import allowed_cores

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
    assert "(loaded: OpenMP (libgomp))" in server.log
    assert "Workers are made by spawn" in server.log
    assert server.run("product", "a")["result"]["total"] == 400**3


SHARES = """
import os
import torch
import ogpu.service
from pydantic import BaseModel
{at_import}
class Nothing(BaseModel):
    pass
class Numbers(BaseModel):
    torch: int
    started: int
    variable: str
def threads() -> int:
    return len(os.listdir("/proc/self/task"))
@ogpu.service.expose(timeout=30)
def product(data: Nothing) -> Numbers:
    before = threads()
    ones = torch.ones(1500, 1500)
    (ones @ ones).exp().sum()
    return Numbers(
        torch=torch.get_num_threads(),
        started=threads() - before,
        variable=os.environ["OMP_NUM_THREADS"],
    )
ogpu.service.start()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_computes_with_its_share_of_the_cores(
    start_server: StartServer, method: str
) -> None:
    """Two workers on these cores: PyTorch in each starts threads for half of them, and no more."""
    source = SHARES.format(at_import="")
    server = start_server(source, wait=False, OGPU_WORKERS=2, OGPU_START_METHOD=method)
    server.wait_ready(timeout_s=50)
    share = max(1, allowed_cores() // 2)
    expected = {"torch": share, "started": share - 1, "variable": str(share)}
    assert server.run("product", "a")["result"] == expected


def test_a_number_of_threads_that_the_source_has_set_is_kept(start_server: StartServer) -> None:
    """A fork has it from the template; it is none that PyTorch would take by itself."""
    own = allowed_cores() + 3
    source = SHARES.format(at_import=f"torch.set_num_threads({own})")
    server = start_server(source, wait=False, OGPU_WORKERS=2, OGPU_START_METHOD="fork")
    server.wait_ready(timeout_s=50)
    assert server.run("product", "a")["result"]["torch"] == own


PREPARED = """
import os
import ogpu.service
from pydantic import BaseModel
{at_import}
class Nothing(BaseModel):
    pass
class Numbers(BaseModel):
    torch: int
    started: int
    total: float
@ogpu.service.prepare()
def load():
    global torch, weights
    import torch
    weights = torch.ones(600, 600)
    assert float((weights @ weights).sum()) == 600**3
    assert torch.get_num_threads() == 1
@ogpu.service.expose(timeout=20)
def product(data: Nothing) -> Numbers:
    before = len(os.listdir("/proc/self/task"))
    total = float((weights @ weights).sum())
    started = len(os.listdir("/proc/self/task")) - before
    return Numbers(torch=torch.get_num_threads(), started=started, total=total)
ogpu.service.start()
"""


@pytest.mark.parametrize("at_import", ["import torch", ""], ids=["at import", "in prepare"])
@pytest.mark.parametrize("computes", [True, False], ids=["computes", "loads"])
def test_what_prepare_computes_leaves_a_fork_safe(
    start_server: StartServer, at_import: str, *, computes: bool
) -> None:
    """With one thread, whatever the user wants for workers; these have all of their share again."""
    source = PREPARED.format(at_import=at_import)
    if not computes:
        source = source.replace("    assert", "    # assert")
    server = start_server(source, wait=False, OMP_NUM_THREADS=2)
    server.wait_ready(timeout_s=50)
    assert "Workers are made by fork" in server.log
    expected = {"torch": 2, "started": 1, "total": 600.0**3}
    assert server.run("product", "a")["result"] == expected
