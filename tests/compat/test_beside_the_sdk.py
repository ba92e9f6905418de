"""Installed after the `ogpu` SDK of the package index: both work (really installed, both)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SDK = "ogpu==0.2.3"


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(240)
def test_both_distributions_work_when_ours_is_installed_after_the_sdk(tmp_path: Path) -> None:
    """`ogpu.chain` is the SDK's, `ogpu.service` is ours, and the command line tells which."""
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, SDK)
    run(*pip, ROOT)
    version = run(python, "-m", "ogpu.service", "--version")
    assert version.startswith("ogpu-service ")
    assert str(environment) in version
    code = (
        "import ogpu, ogpu.chain, ogpu.service, sys; "
        "print(ogpu.chain.ChainConfig.__module__, ogpu.service.start.__module__, "
        "'prepared' if hasattr(ogpu.service, '__version__') else 'frozen')"
    )
    assert run(python, "-c", code).split() == [
        "ogpu.chain.config",
        "ogpu.service.server",
        "prepared",
    ]
