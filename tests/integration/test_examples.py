"""The examples do what their READMEs say: really run, in processes of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NEEDS_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("sklearn") is None,
    reason="PyTorch or scikit-learn is not installed (make test-torch installs them)",
)


def run(script: Path, timeout_s: float) -> str:
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_shows_a_hung_handler_killed_and_replaced() -> None:
    """`make demo`: real tasks, their results at a receiver, a kill, a replacement, the end."""
    said = run(EXAMPLES / "quickstart" / "demo.py", timeout_s=50)
    assert "timed_out" in said


@pytest.mark.torch
@NEEDS_TORCH
@pytest.mark.timeout(120)
def test_the_torch_example_classifies_digits_and_survives_a_hang() -> None:
    run(EXAMPLES / "torch" / "smoke.py", timeout_s=110)
