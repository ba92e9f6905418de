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

# sys.path comes first: with it, this package is found however the front found it.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2])['sys_path']; "
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


def template_command(control_fd: int) -> list[str]:
    """Return the command line of a template that imports no source."""
    return _command("template_main", str(control_fd), preparation())


def worker_command(channel_fd: int, prepared: str, launch: wire.Launch) -> list[str]:
    """Return the command line of a worker."""
    return _command("worker_main", str(channel_fd), prepared, wire.encode_header(launch).decode())


def _command(entry: str, *arguments: str) -> list[str]:
    # The private name is the one that multiprocessing and test.support use; it has no public one.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    return [sys.executable, *flags, "-c", _BOOT.format(entry=entry), *arguments]


def template_main() -> None:
    """Entry of the template's interpreter: argv is the control descriptor and the preparation."""
    from .template import Template  # noqa: PLC0415 - a worker's interpreter needs no template

    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    template = Template(control, sys.argv[2])
    template.serve()


def worker_main() -> None:
    """Entry of a worker's interpreter: argv is the channel, the preparation and the launch."""
    from .loop import report_init_failure, run_worker  # noqa: PLC0415 - see template_main

    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    launch = cast("wire.Launch", wire.decode_header(sys.argv[3].encode()))
    try:
        _import_source(json.loads(sys.argv[2]))
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
