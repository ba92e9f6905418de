"""What is used of ``pynvml``, on GPUs that a file describes: $STAND_IN_NVML, see ``gpus.py``.

It is read at each call, so that a test can change what a running server sees.
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_GPU_IS_LOST = 15


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(value)
        self.value = value

    def __str__(self):
        return {15: "GPU is lost", 999: "Unknown Error"}.get(self.value, f"error {self.value}")


def _state():
    state = json.loads(Path(os.environ["STAND_IN_NVML"]).read_text())
    while state["hangs"]:
        time.sleep(3600)
    return state


def _gpu(handle):
    gpu = _state()["gpus"][handle]
    if gpu.get("error"):
        raise NVMLError(gpu["error"])
    return gpu


def nvmlInit():
    if error := _state()["init_error"]:
        raise NVMLError(error)


def nvmlDeviceGetCount():
    return len(_state()["gpus"])


def nvmlDeviceGetHandleByIndex(index):
    _gpu(index)
    return index


def nvmlDeviceGetHandleByUUID(uuid):
    for index, gpu in enumerate(_state()["gpus"]):
        if uuid in (gpu["uuid"], *gpu.get("migs", [])):
            return index
    raise NVMLError(NVML_ERROR_NOT_FOUND)


def nvmlDeviceGetName(handle):
    return _gpu(handle)["name"]


def nvmlDeviceGetUUID(handle):
    return _gpu(handle)["uuid"]


def nvmlDeviceGetMemoryInfo(handle):
    gpu = _gpu(handle)
    return SimpleNamespace(used=gpu["used"], total=gpu["total"], free=gpu["total"] - gpu["used"])
