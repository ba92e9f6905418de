"""Serve Python handlers on GPUs, in worker processes that are really killed at the deadline.

Example:
    >>> import ogpu.service
    >>> @ogpu.service.init()
    ... def load() -> None: ...
    >>> @ogpu.service.expose(timeout=30)
    ... def predict(data: Input) -> Output: ...
    >>> ogpu.service.start()
"""

from __future__ import annotations

import os

# torch.cuda.is_available() at module level would open a GPU context in the process that forks; with
# this it asks NVML instead (pytorch#83973). It has to be there before torch is first imported.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from . import config
from .context import RecycleWorker, TaskTimeout, current_task, current_tasks
from .decorators import expose, init, prepare
from .logger import logger
from .server import start

__version__ = config.SDK_VERSION

# `ogpu.service.exception(...)` and its like are found in deployed sources, in except blocks.
debug = logger.debug
info = logger.info
warning = logger.warning
error = logger.error
exception = logger.exception

__all__ = [
    "RecycleWorker",
    "TaskTimeout",
    "__version__",
    "current_task",
    "current_tasks",
    "expose",
    "init",
    "logger",
    "prepare",
    "start",
]
