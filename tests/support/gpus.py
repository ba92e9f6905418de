"""GPUs that are not there: a stand-in for NVML, whose file the test writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

GIB = 1 << 30
MODULES = Path(__file__).parent / "nvml"


class StandInGpus:
    """So many GPUs, as NVML would show them; ``environment`` is what a server needs for it."""

    def __init__(self, folder: Path, count: int) -> None:
        self._file = folder / "nvml.json"
        self._state: dict[str, Any] = {
            "hangs": False,
            "init_error": 0,
            "gpus": [
                {
                    "name": "NVIDIA H100 80GB HBM3",
                    "uuid": f"GPU-{index}c1{index}-uuid",
                    "used": GIB,
                    "total": 80 * GIB,
                }
                for index in range(count)
            ],
        }
        self._write()

    @property
    def environment(self) -> dict[str, str]:
        path = [str(MODULES), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"STAND_IN_NVML": str(self._file), "PYTHONPATH": os.pathsep.join(path)}

    def change(self, gpu: int, **facts: object) -> None:
        """Change what NVML says of one of them: ``used`` bytes, or an ``error``."""
        self._state["gpus"][gpu] |= facts
        self._write()

    def behave(self, **facts: object) -> None:
        """Change how NVML behaves: ``hangs``, ``init_error``."""
        self._state |= facts
        self._write()

    def _write(self) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self._state))
        new.replace(self._file)  # whoever reads it meanwhile sees the old one, whole
