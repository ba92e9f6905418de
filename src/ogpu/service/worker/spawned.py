"""The way into a fresh interpreter: the template of the spawn method, and its workers.

Runs at the very start of those processes. Each is ``python -c BOOT main …``, the way the standard
``multiprocessing`` makes its children, and a worker imports the source as that does: under the
name ``__mp_main__``, so that a ``if __name__ == "__main__"`` guard holds. What a worker needs to
know of the front crosses as JSON in argv: sys.path, sys.argv, the folder, the main module.

A worker imports the source and runs its @prepare, then lives as any other (``loop.py``). A failure
of either is told as one of @init. A standby does the same, but has no order yet: it waits for that
at its channel, between the two.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import setproctitle

from .. import wire
from ..errors import WireError
from ..logger import configure_front, configure_worker
from ..processes import die_with_parent

# sys.path comes first: with it, this package is found however the front found it.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])['main']['sys_path']; "
    "from ogpu.service.worker.spawned import {entry}; {entry}()"
)
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_PASSED_ON = (
    "sys_path",
    "sys_argv",
    "orig_dir",
    "dir",
    "init_main_from_name",
    "init_main_from_path",
)


@dataclass(frozen=True)
class Source:
    """What a fresh interpreter needs in order to be a process of the same service.

    ``main`` is what ``multiprocessing`` passes on for the import of the main module.
    """

    main: dict[str, Any]
    log_level: str | None
    log_format: str

    @classmethod
    def of_this_process(cls, log_level: str | None, log_format: str) -> Source:
        """Describe the source that this process runs.

        Only what concerns the import is passed on: the user's start method and authkey stay theirs.
        """
        data = multiprocessing.spawn.get_preparation_data("ogpu")
        main = {key: data[key] for key in _PASSED_ON if key in data}
        return cls(main, log_level, log_format)

    def to_json(self) -> str:
        """Return it as an argument of a command line."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Source:
        """Read what ``to_json`` has written."""
        return cls(**json.loads(text))


def template_command(
    control_fd: int,
    source: Source,
    start_method: str,
    hazard: str | None = None,
    front: int | None = None,
) -> list[str]:
    """Return the command line of a template; its parent is the front, by default this process."""
    parent = os.getpid() if front is None else front
    facts = (str(control_fd), start_method, str(parent), hazard or "")
    return _command("template_main", source, *facts)


def worker_command(
    channel_fd: int, stacks_fd: int, source: Source, launch: wire.Launch | wire.Standby
) -> list[str]:
    """Return the command line of a worker, or of a standby."""
    order = wire.encode_header(launch).decode() if isinstance(launch, wire.Launch) else ""
    return _command("worker_main", source, str(channel_fd), str(stacks_fd), order)


def _command(entry: str, source: Source, *arguments: str) -> list[str]:
    # The private name is the one that multiprocessing and test.support use; it has no public one.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    boot = _BOOT.format(entry=entry)
    return [sys.executable, *flags, "-c", boot, source.to_json(), *arguments]


def template_main() -> None:
    """Entry of a template's interpreter: argv is the source, and what ``template_command`` adds.

    Where the source cannot be imported, workers are spawned: each will say what went wrong.
    """
    from .failure import message_of  # noqa: PLC0415 - a worker needs nothing of this
    from .template import Template, be_template, spawn_instead  # noqa: PLC0415 - as above

    text, control_fd, start_method, parent, hazard = sys.argv[1:]
    front, source = int(parent), Source.from_json(text)
    die_with_parent(front)  # an import may take for ever, and nobody listens meanwhile
    control = socket.socket(fileno=int(control_fd))
    os.set_inheritable(control.fileno(), False)
    if start_method == "spawn":
        Template(control, "spawn", source, hazard or None).serve()
        return
    try:
        _import_source(source.main)
    except BaseException as error:  # noqa: BLE001 - a source may raise anything
        why = f"{type(error).__name__}: {message_of(error)[-wire.MAX_PACKET_TEXT_CHARS :]}"
        spawn_instead(control, source, f"the source cannot be imported again ({why})")
    configure_front(source.log_level, source.log_format)
    be_template(control, front, source, start_method, is_fresh=True)


def worker_main() -> None:
    """Entry of a worker's interpreter: argv is the source, two descriptors and the launch, if any.

    Without one it is a standby.
    """
    from .loop import report_init_failure, run_worker  # noqa: PLC0415 - see template_main
    from .stacks import arm  # noqa: PLC0415 - as above

    text, channel_fd, stacks_fd, order = sys.argv[1:]
    channel, source = socket.socket(fileno=int(channel_fd)), Source.from_json(text)
    os.set_inheritable(channel.fileno(), False)
    armed_fd = arm(int(stacks_fd))
    if not order:
        setproctitle.setproctitle("ogpu-service: standby")
    try:
        _load(source)
    except BaseException as error:  # noqa: BLE001 - told to the front, which decides
        report_init_failure(channel, error)
        os._exit(1)
    if order:
        launch = cast("wire.Launch", wire.decode_header(order.encode()))
    else:
        launch = wait_for_launch(channel)
        _take_up(launch, source, channel, armed_fd)
    os._exit(run_worker(launch, channel))


def wait_for_launch(channel: socket.socket) -> wire.Launch:
    """Wait until the standby is needed; leave where it is not any more."""
    decoder = wire.FrameDecoder(0)
    while said := channel.recv(wire.MAX_HEADER_BYTES):
        for message, _ in decoder.feed(said):  # one: the front says no more until it is ready
            if not isinstance(message, wire.Launch):
                raise WireError(f"a standby cannot do {message}")
            return message
    os._exit(0)


def _take_up(launch: wire.Launch, source: Source, channel: socket.socket, stacks_fd: int) -> None:
    """Become the worker that was ordered.

    A GPU context is bound to the devices that were visible when it was made. So where the source
    has opened one already, and the order says that others are to be seen, this process starts
    again, as a worker that knows so from its beginning.
    """
    from .birth import use_surroundings  # noqa: PLC0415 - see template_main
    from .hazards import open_gpu_device  # noqa: PLC0415 - as above

    seen = [os.environ.get(name) for name in _VISIBLE_DEVICES]
    use_surroundings(launch)
    if seen != [os.environ.get(name) for name in _VISIBLE_DEVICES] and open_gpu_device():
        for descriptor in (channel.fileno(), stacks_fd):
            os.set_inheritable(descriptor, True)
        command = worker_command(channel.fileno(), stacks_fd, source, launch)
        os.execv(command[0], command)  # noqa: S606 - our own command, no shell
    setproctitle.setproctitle(f"ogpu-service: worker {launch.slot}")


def _load(source: Source) -> None:
    """Do what a forked worker's template has done."""
    from .output import buffer_by_line  # noqa: PLC0415 - see template_main
    from .preparing import prepare_here  # noqa: PLC0415 - as above

    _import_source(source.main)
    configure_worker(source.log_level)
    buffer_by_line()
    prepare_here()


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
