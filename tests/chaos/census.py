"""What there is of a service, to be compared: processes, descriptors, files, memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import psutil

from support.processes import is_standby, kinds_of_descriptors, open_descriptors
from support.waiting import wait_until

from .stage import Stage

# Large answers pass through the front, and its allocator keeps some of that: 30 MB after 20 of
# them, and no more after 200.
RSS_SLACK_BYTES = 64 * 2**20
KEPT_CONNECTIONS = 1  # our own
_OF_A_STANDBY = 4  # the template keeps its channel, its output, its stacks and its pidfd


@dataclass(frozen=True)
class Census:
    """What may not grow; descriptors without those of connections.

    Those to the receiver are not counted: the outbox keeps some for a while, for the next results.
    """

    front_descriptors: int
    template_descriptors: int
    clients: int
    rss_bytes: int


def settled_census(stage: Stage) -> Census:
    """Return what there is when nothing changes: a connection may end between two looks."""

    def same_twice() -> Census | None:
        first, second = take_census(stage), take_census(stage)
        return first if replace(first, rss_bytes=0) == replace(second, rss_bytes=0) else None

    census = wait_until(same_twice, "the descriptors stay the same", 10)
    assert census is not None
    return census


def take_census(stage: Stage) -> Census:
    connections = stage.front.net_connections("tcp")
    standbys = [process for process in stage.below() if is_standby(process)]
    clients = [c for c in connections if c.laddr.port == stage.port and c.raddr]
    return Census(
        open_descriptors(stage.front.pid) - len(connections),
        open_descriptors(stage.template) - _OF_A_STANDBY * len(standbys),
        len(clients),
        stage.front.memory_info().rss,
    )


def check_nothing_left(stage: Stage, before: Census) -> None:
    """The pool is whole, and what the row brought into the world is gone, soon."""
    stage.wait_whole()
    try:
        wait_until(lambda: not left_behind(stage, before), "nothing is left", 10)
    except AssertionError:
        left = left_behind(stage, before)
        assert left == [], left


def left_behind(stage: Stage, before: Census) -> list[str]:
    """Return what there is that should not be there."""
    now = take_census(stage)
    left = [*strangers(stage), *zombies(stage), *temporary_files(stage)]
    left += [
        f"{kind}: {getattr(now, kind)}, before {getattr(before, kind)}"
        for kind in ("front_descriptors", "template_descriptors")
        if getattr(now, kind) > getattr(before, kind)
    ]
    if left and now.front_descriptors > before.front_descriptors:
        left.append(f"the front has {kinds_of_descriptors(stage.front.pid)}")
    if now.rss_bytes > stage.rss_at_first + RSS_SLACK_BYTES:
        left.append(f"the front has {now.rss_bytes} bytes, at first {stage.rss_at_first}")
    if now.clients > KEPT_CONNECTIONS:
        left.append(f"{now.clients} connections of clients")
    return left


def strangers(stage: Stage) -> list[str]:
    """Return the processes below the front that are not the service; it may have one standby."""
    ours = {stage.template, *(slot["pid"] for slot in stage.pool())}
    others = [process for process in stage.below() if process.pid not in ours]
    standbys = [process for process in others if is_standby(process)]
    return [str(process) for process in others if process not in standbys[:1]]


def zombies(stage: Stage) -> list[str]:
    """Return the children that front and template have not buried."""
    children = [*stage.front.children(), *psutil.Process(stage.template).children()]
    found = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(str(child))
    return found


def temporary_files(stage: Stage) -> list[str]:
    """Return what there is beside a folder for each worker, in one for the service.

    A worker that was the standby has that one's folder, too, and there may be a standby.
    """
    wanted = {f"{slot['slot']}-{slot['generation']}" for slot in stage.pool()} | {"lock"}
    found = list(stage.temp.iterdir())
    inside = [path for folder in found for path in folder.iterdir() if path.name not in wanted]
    standbys = [path for path in inside if path.name.startswith("standby-")]
    inside = [path for path in inside if path not in standbys[: len(stage.pool()) + 1]]
    return [str(path) for path in [*found[1:], *inside]]
