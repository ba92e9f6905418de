"""The examples do what their READMEs say: really run, in processes of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    reason = f"not installed: {', '.join(missing)} (make test-ml installs it)"
    return pytest.mark.skipif(bool(missing), reason=reason)


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


def test_a_training_is_stopped_with_its_tree_and_goes_on_later() -> None:
    """Progress, a checkpoint at the deadline, the next run from there, a tree that is killed."""
    said = run(EXAMPLES / "subprocess_trainer" / "smoke.py", timeout_s=50)
    assert "0xstubborn: timed_out, and of its 4 processes none is left" in said


@pytest.mark.torch
@needs("torch", "sklearn")
@pytest.mark.timeout(120)
def test_the_torch_example_classifies_digits_and_survives_a_hang() -> None:
    run(EXAMPLES / "torch" / "smoke.py", timeout_s=110)


@pytest.mark.tensorflow
@needs("tensorflow", "sklearn")
@pytest.mark.timeout(150)
def test_the_tensorflow_example_spawns_and_survives_a_hang() -> None:
    """Nothing is set: the service finds out that it has to spawn, and says so."""
    run(EXAMPLES / "tensorflow" / "smoke.py", timeout_s=140)
