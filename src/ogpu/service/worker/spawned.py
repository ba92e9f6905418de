"""The way into a fresh interpreter: the template of the spawn method, and its workers.

Runs at the very start of those processes. Each is ``python -c BOOT main …``, the way the standard
``multiprocessing`` makes its children, and a worker imports the source as that does: under the
name ``__mp_main__``, so that a ``if __name__ == "__main__"`` guard holds. What a worker needs to
know of the front crosses as JSON in argv: sys.path, sys.argv, the folder, the main module.
"""

from __future__ import annotations

import json
import multiprocessing.process
import multiprocessing.spawn
import os
import runpy
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

from .. import wire
from ..processes import die_with_parent

# sys.path comes first: with it, this package is found however the front found it.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])['sys_path']; "
    "from ogpu.service.worker.spawned import {entry}; {entry}()"
)
_PASSED_ON = (
    "sys_path",
    "sys_argv",
    "orig_dir",
    "dir",
    "init_main_from_name",
    "init_main_from_path",
)


def preparation() -> str:
    """Return, as JSON, what a fresh interpreter needs in order to import the same source.

    Only what concerns the import is passed on: the user's start method and authkey stay theirs.
    """
    data = multiprocessing.spawn.get_preparation_data("ogpu")
    return json.dumps({key: data[key] for key in _PASSED_ON if key in data})


def template_command(control_fd: int, prepared: str, start_method: str) -> list[str]:
    """Return the command line of a template."""
    return _command("template_main", prepared, str(control_fd), start_method, str(os.getpid()))


def worker_command(
    channel_fd: int, stacks_fd: int, prepared: str, launch: wire.Launch
) -> list[str]:
    """Return the command line of a worker."""
    order = wire.encode_header(launch).decode()
    return _command("worker_main", prepared, str(channel_fd), str(stacks_fd), order)


def _command(entry: str, *arguments: str) -> list[str]:
    # The private name is the one that multiprocessing and test.support use; it has no public one.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    return [sys.executable, *flags, "-c", _BOOT.format(entry=entry), *arguments]


def template_main() -> None:
    """Entry of a template's interpreter: argv is the preparation, a descriptor, a method, a parent.

    Where the source cannot be imported, workers are spawned: each will say what went wrong.
    """
    from .hazards import fork_hazard  # noqa: PLC0415 - a worker's interpreter needs no template
    from .template import Template  # noqa: PLC0415 - as above

    prepared, control_fd, start_method, parent = sys.argv[1:]
    die_with_parent(int(parent))  # an import may take for ever, and nobody listens meanwhile
    control = socket.socket(fileno=int(control_fd))
    os.set_inheritable(control.fileno(), False)
    method, hazard = "spawn", None
    if start_method != "spawn":
        try:
            _import_source(json.loads(prepared))
        except BaseException as error:  # noqa: BLE001 - a source may raise anything
            hazard = f"the source cannot be imported again ({type(error).__name__}: {error})"
        else:
            hazard = fork_hazard() if start_method == "auto" else None
        method = "fork" if hazard is None else "spawn"
    Template(control, method, prepared, hazard).serve()


def worker_main() -> None:
    """Entry of a worker's interpreter: argv is the preparation, two descriptors and the launch."""
    from .loop import report_init_failure, run_worker  # noqa: PLC0415 - see template_main
    from .stacks import arm  # noqa: PLC0415 - as above

    prepared, channel_fd, stacks_fd, order = sys.argv[1:]
    channel = socket.socket(fileno=int(channel_fd))
    os.set_inheritable(channel.fileno(), False)
    arm(int(stacks_fd))
    launch = cast("wire.Launch", wire.decode_header(order.encode()))
    try:
        _import_source(json.loads(prepared))
    except BaseException as error:  # noqa: BLE001 - told to the front, which decides
        report_init_failure(channel, error)
        os._exit(1)
    os._exit(run_worker(launch, channel))


def _import_source(data: dict[str, Any]) -> None:
    """Import the main module as ``__mp_main__``; start() sees ``_inheriting`` and returns."""
    main = data.get("init_main_from_name", "")
    if main == "__main__":  # `python folder`: sys.path[0] is the folder
        del data["init_main_from_name"]
        data["init_main_from_path"] = str(Path(data["sys_path"][0], "__main__.py"))
    process = cast("Any", multiprocessing.process.current_process())
    process._inheriting = True  # noqa: SLF001 - what multiprocessing.spawn sets around the same call
    try:
        multiprocessing.spawn.prepare(data)
        if main.endswith(".__main__"):  # `python -m package`, which multiprocessing leaves out
            module = types.ModuleType("__mp_main__")
            sys.modules["__main__"] = sys.modules["__mp_main__"] = module
            vars(module).update(runpy.run_module(main, run_name="__mp_main__", alter_sys=True))
    finally:
        del process._inheriting  # noqa: SLF001 - as above
