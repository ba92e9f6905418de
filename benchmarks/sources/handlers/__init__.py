"""The handlers that are measured, a module each, the same for every peer.

A module has ``Input`` and ``Output`` (pydantic models), ``load()``, which every worker calls before
its first task, ``handle(Input) -> Output``, and ``TIMEOUT_S`` for those that stop a handler.
``QUICK`` says whether it may run on a server's event loop, as its author would let it, since nobody
waits long then. Some have ``handle_many(list[Input]) -> list[Output]`` for those that batch, and
``prepare()``, which is called before ``load()``: once, before there are workers, by those that can.
"""

import importlib
import os
from types import ModuleType


def chosen() -> ModuleType:
    """Return the module that BENCHMARK_HANDLERS names."""
    return importlib.import_module(f"{__name__}.{os.environ['BENCHMARK_HANDLERS']}")


def prepare_and_load() -> None:
    """Do both in each worker, for those that have no way to prepare once for all."""
    module = chosen()
    getattr(module, "prepare", lambda: None)()
    module.load()
