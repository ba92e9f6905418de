"""The memory cgroup: found in every kind of place, read, and never the reason of a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpu.service import wire
from ogpu.service.cgroups import find_cgroup
from ogpu.service.errors import FailureReason
from ogpu.service.pool import memory
from ogpu.service.pool.evidence import describe_end, worker_died
from ogpu.service.pool.memory import (
    NOT_ASKED,
    MemoryEvidence,
    OutOfMemoryCounter,
    count_file,
    limit_files,
    parse_kills,
    parse_limit,
)
from ogpu.service.task import Task

MIB = 1 << 20
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:15 - cgroup cgroup rw,memory"
OTHERS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"""
DOCKER = "/docker/0123456789ab"


def mounts(*lines: str) -> str:
    return "\n".join((OTHERS, *lines, ""))


# what it is; /proc/self/cgroup; /proc/self/mountinfo; version and folder
PLACES = [
    (
        "v2, a service of systemd",
        "0::/system.slice/ogpu.service\n",
        mounts(V2_MOUNT),
        (2, "/sys/fs/cgroup/system.slice/ogpu.service"),
    ),
    (
        "v2, a container in a cgroup namespace of its own",
        "0::/\n",
        mounts(V2_MOUNT),
        (2, "/sys/fs/cgroup"),
    ),
    (
        "v2, a container in the host's cgroup namespace",
        f"0::{DOCKER}\n",
        mounts(V2_MOUNT.replace(" / /sys", f" {DOCKER} /sys")),
        (2, "/sys/fs/cgroup"),
    ),
    (
        "v1",
        "9:pids:/a\n4:cpu,memory:/a/b\n0::/c\n",
        mounts(V1_MOUNT.replace("rw,memory", "rw,cpu,memory")),
        (1, "/sys/fs/cgroup/memory/a/b"),
    ),
    (
        "v1, a container, which sees a part of the hierarchy",
        f"4:memory:{DOCKER}/worker\n",
        mounts(V1_MOUNT.replace(" / /sys", f" {DOCKER} /sys")),
        (1, "/sys/fs/cgroup/memory/worker"),
    ),
    (
        "hybrid, memory in v1",
        "4:memory:/a\n1:name=systemd:/b\n0::/c\n",
        mounts(V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), V1_MOUNT),
        (1, "/sys/fs/cgroup/memory/a"),
    ),
    (
        "hybrid, memory in v2",
        "7:cpu,cpuacct:/a\n1:name=systemd:/b\n0::/c\n",
        mounts(V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")),
        (2, "/sys/fs/cgroup/unified/c"),
    ),
    (
        "the host's hierarchy is mounted as well, from outside of the cgroup namespace",
        "0::/\n",
        mounts(V2_MOUNT.replace(" / /sys", " /../.. /host/sys"), V2_MOUNT),
        (2, "/sys/fs/cgroup"),
    ),
    (
        "escapes of mountinfo, colons in a path, no optional fields",
        "0::/a:b c\n",
        "30 23 0:26 /a:b\\040c /my\\040groups rw - cgroup2 none rw\n",
        (2, "/my groups"),
    ),
]
NOWHERE = [
    ("no cgroups", "", mounts(V2_MOUNT), "in no memory cgroup"),
    ("no memory controller", "7:cpu:/a\n", mounts(V1_MOUNT), "in no memory cgroup"),
    ("not mounted", "0::/a\n", OTHERS, "no mount of cgroup v2"),
    ("v1 named, v2 mounted", "4:memory:/a\n", mounts(V2_MOUNT), "no mount of cgroup v1"),
    ("another part is mounted", "0::/ab\n", V2_MOUNT.replace(" / /", " /a /"), "no mount"),
    ("mounted outside of the namespace", "0::/\n", V2_MOUNT.replace(" / /", " /.. /"), "no mount"),
    ("above the mount's root", "0::/../../x\n", V2_MOUNT.replace(" / /", " /.. /"), "no mount"),
]


@pytest.mark.parametrize(
    ("cgroups", "mountinfo", "place"), [p[1:] for p in PLACES], ids=[p[0] for p in PLACES]
)
def test_the_memory_cgroup_is_found(cgroups: str, mountinfo: str, place: tuple[int, str]) -> None:
    found = find_cgroup("memory", cgroups, mountinfo)
    assert (found.version, str(found.folder)) == place


@pytest.mark.parametrize(
    ("cgroups", "mountinfo", "why"), [n[1:] for n in NOWHERE], ids=[n[0] for n in NOWHERE]
)
def test_where_there_is_none_it_is_said(cgroups: str, mountinfo: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        find_cgroup("memory", cgroups, mountinfo)


def test_the_count_of_both_versions_is_read() -> None:
    events = "low 0\nhigh 0\nmax 17\noom 4\noom_kill 3\noom_group_kill 1\n"
    assert parse_kills(events) == 3
    assert parse_kills("oom_kill_disable 1\nunder_oom 0\noom_kill 12\n") == 12
    with pytest.raises(ValueError, match=r"Linux 4\.13"):
        parse_kills("oom_kill_disable 0\nunder_oom 0\n")


def test_the_limit_of_both_versions_is_read() -> None:
    assert parse_limit("314572800\n") == 300 * MIB
    assert parse_limit("max\n") is None
    assert parse_limit("9223372036854771712\n") is None


# Texts that are nearly right reach further than those that are not right at all.
_WORDS = st.sampled_from(
    ["0", "4", ":", "::", "memory", ",", "/", "/..", "/a", "..", " ", " - ", "cgroup", "cgroup2",
     "rw", "\n", "\\040", "\\777", "oom_kill", "9" * 5000, "-1", "max", "\0", "\ud800", "\u2028"]
)  # fmt: skip
_TEXTS = st.one_of(st.text(), st.lists(_WORDS, max_size=40).map("".join))


@given(_TEXTS, _TEXTS)
def test_any_text_is_a_value_or_a_value_error(one: str, other: str) -> None:
    for parse in (
        lambda: count_file(find_cgroup("memory", one, other)),
        lambda: list(limit_files(find_cgroup("memory", "0::/a/b", one + V2_MOUNT))),
        lambda: parse_kills(one),
        lambda: parse_limit(one),
    ):
        try:
            assert parse() != []
        except ValueError as error:
            assert str(error)  # noqa: PT017 - both ways out are allowed, and no other


class Kernel:
    """What the kernel would show a process: /proc and a cgroup two levels below the mount."""

    def __init__(self, folder: Path, version: int) -> None:
        self.version = version
        self.proc, self.mount_point = folder / "proc", folder / "cgroup"
        self.cgroup = self.mount_point / "pod" / "box"
        self.cgroup.mkdir(parents=True)
        self.proc.mkdir()
        mount = V2_MOUNT if version == 2 else V1_MOUNT.replace("/memory rw", " rw")
        self.write(self.proc / "mountinfo", mount.replace("/sys/fs/cgroup", str(self.mount_point)))
        self.write(self.proc / "cgroup", "0::/pod/box" if version == 2 else "4:memory:/pod/box")
        self.kills(5)  # of earlier times

    @staticmethod
    def write(file: Path, text: str) -> None:
        file.write_text(text + "\n", encoding="utf-8")

    @property
    def count_file(self) -> Path:
        return self.cgroup / ("memory.events" if self.version == 2 else "memory.oom_control")

    def kills(self, count: int) -> None:
        self.write(self.count_file, f"under_oom 0\noom_kill {count}")

    def limit(self, folder: Path, limit: str) -> None:
        name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        self.write(folder / name, limit)


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def kernel(tmp_path: Path, request: pytest.FixtureRequest) -> Kernel:
    return Kernel(tmp_path, request.param)


def test_a_kill_explains_one_death(kernel: Kernel) -> None:
    """Those counted before the start explain none; two at once explain two, and no third."""
    counter = OutOfMemoryCounter(kernel.proc)
    assert counter.explain_death() == MemoryEvidence(out_of_memory=False)
    kernel.kills(7)
    deaths = [counter.explain_death().out_of_memory for _ in range(3)]
    assert deaths == [True, True, False]


def test_a_kill_that_explained_nothing_is_forgotten(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its victim was no worker: a death much later is not blamed on it."""
    clock = [1000.0]
    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    counter = OutOfMemoryCounter(kernel.proc)
    kernel.kills(7)
    counter.look()
    clock[0] += memory.EXPLAINS_FOR_S - 1
    assert counter.explain_death().out_of_memory is True
    clock[0] += 2
    assert counter.explain_death().out_of_memory is False


def test_the_lowest_limit_above_is_told(kernel: Kernel) -> None:
    """The cgroup's own limit may be none, and one above it hold; what is not there is no matter."""
    counter = OutOfMemoryCounter(kernel.proc)
    kernel.kills(7)
    assert counter.explain_death() == MemoryEvidence(out_of_memory=True)
    kernel.limit(kernel.cgroup, "max" if kernel.version == 2 else "9223372036854771712")
    kernel.limit(kernel.cgroup.parent, str(300 * MIB))
    kernel.limit(kernel.mount_point, str(400 * MIB))
    kernel.limit(kernel.mount_point.parent, str(100 * MIB))  # no cgroup any more
    assert counter.explain_death().limit_bytes == 300 * MIB


def test_a_count_that_cannot_be_read_is_told_with_the_reason(kernel: Kernel) -> None:
    """And counting goes on from what is read when it can be read again."""
    counter = OutOfMemoryCounter(kernel.proc)
    kernel.count_file.unlink()
    why = f"cannot read {kernel.count_file}: No such file or directory"
    assert counter.explain_death() == MemoryEvidence(out_of_memory=None, why_unknown=why)
    kernel.kills(9)
    assert counter.explain_death() == MemoryEvidence(out_of_memory=False)
    kernel.kills(10)
    assert counter.explain_death().out_of_memory is True


def test_without_proc_it_is_told_as_well(tmp_path: Path) -> None:
    evidence = OutOfMemoryCounter(tmp_path).explain_death()
    assert evidence.out_of_memory is None
    assert evidence.why_unknown == f"cannot read {tmp_path / 'cgroup'}: No such file or directory"


@given(_TEXTS, _TEXTS, _TEXTS)
def test_no_content_of_any_file_makes_it_raise(
    tmp_path_factory: pytest.TempPathFactory, cgroups: str, mountinfo: str, count: str
) -> None:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"), 2)
    counter = OutOfMemoryCounter(kernel.proc)
    files = {kernel.count_file: count}
    files |= {kernel.proc / "cgroup": cgroups, kernel.proc / "mountinfo": mountinfo}
    for file, text in files.items():
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    for asked in (counter, OutOfMemoryCounter(kernel.proc)):
        evidence = asked.explain_death()
        assert (evidence.out_of_memory is None) == bool(evidence.why_unknown)


GONE = wire.Gone(0, 1, None, 9)


@pytest.mark.parametrize(
    ("evidence", "says"),
    [
        (NOT_ASKED, "was ended by SIGKILL"),
        (
            MemoryEvidence(out_of_memory=True, limit_bytes=300 * MIB),
            "ran out of memory (the limit is 300 MiB) and was ended by SIGKILL",
        ),
        (
            MemoryEvidence(out_of_memory=True),
            "ran out of memory (no limit is known) and was ended by SIGKILL",
        ),
        (
            MemoryEvidence(out_of_memory=None, why_unknown="for a reason"),
            "was ended by SIGKILL (whether it ran out of memory cannot be told: for a reason)",
        ),
    ],
)
def test_an_end_is_described_with_what_is_known_of_memory(
    evidence: MemoryEvidence, says: str
) -> None:
    assert describe_end(GONE, evidence) == says


TASK = Task(1, "task_1", "f", "a", b"{}")
OUT_OF_MEMORY = MemoryEvidence(out_of_memory=True, limit_bytes=300 * MIB)


def ending(memory_evidence: MemoryEvidence, *, channel_broken: bool) -> tuple[FailureReason, str]:
    outcome = worker_died(
        TASK, GONE, None, None, channel_broken=channel_broken, memory=memory_evidence
    )
    assert outcome.error is not None
    return outcome.error.reason, outcome.error.message


def test_a_task_is_told_what_to_do_about_memory() -> None:
    """Also where its worker was still dying after its channel's grace, and so killed by us."""
    for channel_broken in (False, True):
        reason, message = ending(OUT_OF_MEMORY, channel_broken=channel_broken)
        assert reason is FailureReason.OUT_OF_MEMORY
        assert "the limit is 300 MiB" in message
        assert "raise the memory limit of the container" in message


def test_a_task_is_told_where_memory_was_not_the_reason() -> None:
    unknown = MemoryEvidence(out_of_memory=None, why_unknown="for a reason")
    reason, message = ending(unknown, channel_broken=False)
    assert reason is FailureReason.WORKER_DIED
    assert "SIGKILL (whether it ran out of memory cannot be told: for a reason)" in message
    for channel_broken in (False, True):
        reason, message = ending(NOT_ASKED, channel_broken=channel_broken)
        assert reason is FailureReason.WORKER_DIED
        assert "memory" not in message
