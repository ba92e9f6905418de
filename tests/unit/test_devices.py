"""GPUs: which are found, which are visible, which slot gets which. Pure, on folders and texts."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpu.service.config import load_settings
from ogpu.service.devices import amd, nvidia
from ogpu.service.devices.cores import allowed_cores
from ogpu.service.devices.device import Device, Found, Memory, in_words
from ogpu.service.devices.discovery import Sight, choose, look, look_at_files
from ogpu.service.devices.plan import Wishes, deal, share_threads
from ogpu.service.devices.visible import as_written, select, visible_amd, visible_nvidia
from ogpu.service.devices.watch import DeviceThread
from ogpu.service.errors import SettingsError
from support.gpus import GIB, MODULES, StandInGpus

FOUR = [Found(f"GPU {uuid}", uuid, uuid) for uuid in ("GPU-aa1", "GPU-ab2", "GPU-b3", "GPU-c4")]
NAMELESS = [Found(), Found()]
DEVICES = [Device("nvidia", "0"), Device("nvidia", "3")]
AUTO = Wishes(None, 1, hide_gpus=False)


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found here is what the test made, on a machine with GPUs, too."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


# --- what is visible


@pytest.mark.parametrize(
    ("wanted", "entries"),
    [
        (None, ["0", "1", "2", "3"]),
        ("2,0", ["2", "0"]),
        (" 1 , 3", ["1", "3"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,-1,2", ["1"]),
        ("1,9,2", ["1"]),
        ("1,two,3", ["1"]),
        ("1gpu", ["1"]),
        ("1,2,1", []),
        ("GPU-b3", ["GPU-b3"]),
        ("GPU-b,GPU-aa", ["GPU-b", "GPU-aa"]),
        ("GPU-a,GPU-b", []),
        ("GPU-b,GPU-zz,GPU-c", ["GPU-b"]),
        ("GPU-b,0", ["GPU-b"]),
        ("GPU-b,GPU-b3", []),
        ("MIG-1,MIG-2", ["MIG-1", "MIG-2"]),
        ("MIG-1,MIG-1", []),
    ],
)
def test_visible_lists_are_read_as_cuda_reads_them(wanted: str | None, entries: list[str]) -> None:
    """In its order, up to the first entry that means nothing; one named twice: none at all."""
    assert [text for text, _ in select(wanted, FOUR)] == entries


def test_an_entry_leads_to_the_gpu_that_it_names() -> None:
    assert [one for _, one in select("3,GPU-aa1", FOUR)] == [FOUR[3]]
    assert [one for _, one in select("GPU-c,GPU-ab", FOUR)] == [FOUR[3], FOUR[1]]


def test_uuids_are_believed_where_nobody_knows_any() -> None:
    """Without NVML devices are counted by their files, which have no UUID."""
    devices = visible_nvidia(NAMELESS, {"CUDA_VISIBLE_DEVICES": "GPU-x,GPU-y"})
    assert [str(device) for device in devices] == ["nvidia:GPU-x", "nvidia:GPU-y"]


def test_in_an_order_of_the_users_own_a_number_may_be_any_gpu() -> None:
    """NVML counts by the bus: what is said of its first need not be true of CUDA's fastest."""
    own = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert visible_nvidia(FOUR, own)[0] == Device("nvidia", "0")
    by_uuid = visible_nvidia(FOUR, {**own, "CUDA_VISIBLE_DEVICES": "GPU-b"})
    assert by_uuid == [Device("nvidia", "GPU-b", "GPU GPU-b3", "GPU-b3")]


ENTRIES = st.sampled_from(
    ["0", "1", "2", "3", "4", "-1", "", " 1", "1gpu", "+2", "x", "00", "GPU-a", "GPU-aa1",
     "GPU-b", "GPU-zz", "GPU-", "MIG-1", "MIG-2", "9" * 20, "٣", "²"]
)  # fmt: skip
LISTS = st.lists(ENTRIES, max_size=6).map(",".join) | st.text(max_size=20)


@given(LISTS)
def test_any_list_names_different_gpus_that_are_here(wanted: str) -> None:
    """Whatever the text is; and what a worker is told names the same GPU by itself."""
    entries = select(wanted, FOUR)
    known = [one for text, one in entries if not text.startswith("MIG-")]
    assert all(one in FOUR for one in known)
    assert len({id(one) for one in known}) == len(known)
    for text, one in entries:
        assert select(text, FOUR) == [(text, one)]


@given(LISTS, LISTS)
def test_what_comes_after_an_invalid_entry_changes_nothing(before: str, after: str) -> None:
    if "MIG-" not in before:
        assert select(f"{before},-1,{after}", FOUR) == select(f"{before},-1", FOUR)


@given(LISTS)
def test_a_list_that_is_believed_ends_as_cuda_ends_it(wanted: str) -> None:
    assert all(text and not text.startswith("-") for text in as_written(wanted))
    assert as_written("0, 2,-1,3") == ["0", "2"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["amd:0", "amd:1", "amd:2", "amd:3"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, ["amd:1"]),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"HIP_VISIBLE_DEVICES": ""}, ["amd:0", "amd:1", "amd:2", "amd:3"]),
        ({"CUDA_VISIBLE_DEVICES": "2"}, ["amd:2"]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "2"}, ["amd:0"]),
        ({"ROCR_VISIBLE_DEVICES": "3,1"}, ["amd:0", "amd:1"]),
        ({"ROCR_VISIBLE_DEVICES": "3,1", "HIP_VISIBLE_DEVICES": "1,2"}, ["amd:1"]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_amds_lists_are_read_one_after_the_other(
    environment: dict[str, str], expected: list[str]
) -> None:
    """ROCR_VISIBLE_DEVICES first; HIP counts what that leaves."""
    assert [str(device) for device in visible_amd(FOUR, environment)] == expected


def test_amds_second_list_counts_what_the_first_leaves() -> None:
    both = {"ROCR_VISIBLE_DEVICES": "3,1", "HIP_VISIBLE_DEVICES": "1"}
    assert visible_amd(FOUR, both)[0].source == FOUR[1].source


# --- what is chosen


def sight(*devices: Device) -> Sight:
    return Sight(list(devices), is_any_here=True)


def test_a_list_takes_gpus_by_their_places_in_what_is_visible() -> None:
    assert choose(sight(*DEVICES), (1,), {}) == [DEVICES[1]]
    assert choose(sight(*DEVICES), None, {}) == DEVICES


@pytest.mark.parametrize("positions", [(2,), (0, 5)])
def test_one_beyond_what_is_visible_is_refused(positions: tuple[int, ...]) -> None:
    """With the variable's name, and what there is."""
    with pytest.raises(SettingsError, match=r"OGPU_GPUS=.*no GPU . .*0 = nvidia:0, 1 = nvidia:3"):
        choose(sight(*DEVICES), positions, {})


def test_where_nothing_can_be_found_a_list_is_believed(tmp_path: Path) -> None:
    """WSL2 and Jetson have none of the files that GPUs are known by."""
    nothing = Sight()
    assert choose(nothing, (0, 2), {}, tmp_path) == [Device("nvidia", "0"), Device("nvidia", "2")]
    assert len(nothing.warnings) == 1
    shown = {"CUDA_VISIBLE_DEVICES": "5,7"}
    assert choose(Sight(), (1,), shown, tmp_path) == [Device("nvidia", "7")]
    with pytest.raises(SettingsError, match=r"no GPU 2 .*0 = nvidia:5"):
        choose(Sight(), (2,), shown, tmp_path)
    assert choose(Sight(), None, shown, tmp_path) == []


@pytest.mark.parametrize(
    ("value", "kept", "positions"),
    [
        ("auto", "auto", None),
        ("none", "none", None),
        (" 0, 2 ", "0,2", (0, 2)),
        (1, "1", (1,)),
        ([2, 0], "2,0", (2, 0)),
    ],
)
def test_settings_of_gpus(value: object, kept: str, positions: tuple[int, ...] | None) -> None:
    settings = load_settings(gpus=value)
    assert (settings.gpus, settings.gpu_positions) == (kept, positions)


@given(st.text(max_size=12) | st.lists(st.integers(-2, 12), max_size=4))
def test_any_other_value_is_refused_by_name(value: object) -> None:
    try:
        settings = load_settings(gpus=value)
    except SettingsError as error:
        assert "OGPU_GPUS" in str(error)  # noqa: PT017 - both ways out are allowed
        return
    positions = settings.gpu_positions
    assert settings.gpus in ("auto", "none") or (
        positions is not None and len(set(positions)) == len(positions) > 0
    )


# --- who gets what


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 5), st.integers(1, 64))
def test_devices_are_dealt_round(workers: int, per_gpu: int, count: int, cores: int) -> None:
    """No device has two slots more than another; each slot sees its own, and no other."""
    devices = [Device("nvidia", str(index)) for index in range(count)]
    plans = deal(Wishes(workers, per_gpu, hide_gpus=False), devices, cores, {})
    assert len(plans) == workers
    uses = [sum(plan.device is device for plan in plans) for device in devices]
    assert not uses or max(uses) - min(uses) <= 1
    for plan in plans:
        if plan.device is not None:
            assert plan.environment["CUDA_VISIBLE_DEVICES"] == plan.device.visible_as
            assert plan.is_shared == (uses[devices.index(plan.device)] > 1)
        assert ("TF_FORCE_GPU_ALLOW_GROWTH" in plan.environment) == plan.is_shared
    assert len(deal(Wishes(None, per_gpu, hide_gpus=False), devices, cores, {})) == (
        per_gpu * count or 1
    )


def test_what_the_user_has_set_stays() -> None:
    user = {"TF_FORCE_GPU_ALLOW_GROWTH": "false", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    environment = deal(Wishes(None, 2, hide_gpus=False), DEVICES, 8, user)[0].environment
    assert "TF_FORCE_GPU_ALLOW_GROWTH" not in environment
    assert environment["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    assert deal(AUTO, DEVICES, 8, {})[0].environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_no_gpu_is_to_be_seen() -> None:
    environment = deal(Wishes(None, 1, hide_gpus=True), [], 8, {})[0].environment
    assert environment["CUDA_VISIBLE_DEVICES"] == environment["HIP_VISIBLE_DEVICES"] == "-1"
    assert not any("VISIBLE" in name for name in deal(AUTO, [], 8, {})[0].environment)


def test_an_amd_device_is_shown_by_hips_variable() -> None:
    environment = deal(AUTO, [Device("amd", "1")], 8, {})[0].environment
    assert environment["HIP_VISIBLE_DEVICES"] == "1"
    assert not any(name.startswith("CUDA") for name in environment)


def test_cores_are_shared_among_the_workers() -> None:
    assert set(share_threads(7, 2, {}).values()) == {"3"}
    assert set(share_threads(1, 4, {}).values()) == {"1"}
    assert "MKL_NUM_THREADS" not in share_threads(8, 2, {"MKL_NUM_THREADS": "5"})
    # What the user says to OpenMP the others heed by themselves, but TensorFlow.
    assert list(share_threads(8, 2, {"OMP_NUM_THREADS": "5"})) == ["TF_NUM_INTRAOP_THREADS"]


# --- what is found


def nvidia_tree(root: Path, gpus: dict[str, tuple[int, str]], files: range) -> None:
    for bus, (minor, uuid) in gpus.items():
        folder = root / "proc/driver/nvidia/gpus" / bus
        folder.mkdir(parents=True)
        (folder / "information").write_text(
            f"Model: \t\t NVIDIA A100\nIRQ:   \t\t 72\nGPU UUID: \t {uuid}\n"
            f"Bus Type: \t PCIe\nDevice Minor: \t {minor}\n"
        )
    (root / "dev").mkdir()
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-caps", *(f"nvidia{n}" for n in files)):
        (root / "dev" / name).touch()


def test_the_driver_tells_of_gpus_in_the_order_of_their_buses(tmp_path: Path) -> None:
    """Whatever their minor numbers are, and only of those whose device file is in the container."""
    gpus = {
        "0000:07:00.0": (2, "GPU-07"),
        "0000:0a:00.0": (0, "GPU-????????-????"),
        "0000:4a:00.0": (1, "GPU-4a"),
    }
    nvidia_tree(tmp_path, gpus, range(0, 3, 2))
    assert nvidia.find_by_driver(tmp_path) == [
        Found("NVIDIA A100", "GPU-07"),
        Found("NVIDIA A100", None),
    ]


def test_device_files_are_counted_where_nobody_tells_more(tmp_path: Path) -> None:
    nvidia_tree(tmp_path, {}, range(3, 5))
    assert [str(d) for d in look({}, tmp_path).visible] == ["nvidia:0", "nvidia:1"]
    assert [str(d) for d in look_at_files({}, tmp_path).visible] == ["nvidia:0", "nvidia:1"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandInGpus:
    """Three GPUs, as NVML tells them to this process."""
    gpus = StandInGpus(tmp_path, 3)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(str(MODULES))
    monkeypatch.setenv("STAND_IN_NVML", gpus.environment["STAND_IN_NVML"])
    return gpus


def test_nvml_leaves_out_what_it_may_not_touch(gpus: StandInGpus, tmp_path: Path) -> None:
    """CUDA does not count it either: the next one has its number."""
    gpus.change(1, error=4)
    gpus.change(2, name="the other one", used=5 * GIB)
    found = look({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path)
    device = Device("nvidia", "1", "the other one", "GPU-2c12-uuid")
    assert (found.visible, found.memory) == ([device], {device: Memory(5 * GIB, 80 * GIB)})
    assert found.warnings == ["NVIDIA GPU 1 is left out: error 4"]


def test_mig_instances_are_read_by_their_own_name(gpus: StandInGpus, tmp_path: Path) -> None:
    """One that NVML does not know is visible all the same: CUDA may know it."""
    gpus.change(2, migs=["MIG-2a"], used=3 * GIB)
    found = look({"CUDA_VISIBLE_DEVICES": "MIG-2a,MIG-99"}, tmp_path)
    assert [str(device) for device in found.visible] == ["nvidia:MIG-2a", "nvidia:MIG-99"]
    assert list(found.memory.values()) == [Memory(3 * GIB, 80 * GIB)]


def test_nvml_that_fails_leaves_the_device_files(gpus: StandInGpus, tmp_path: Path) -> None:
    """With a warning, where there are any: the container lacks a part of the driver."""
    gpus.behave(init_error=999)
    nvidia_tree(tmp_path, {}, range(1))
    found = look({}, tmp_path)
    assert [str(device) for device in found.visible] == ["nvidia:0"]
    assert "NVML cannot be used (Unknown Error)" in found.warnings[0]


def amd_tree(root: Path) -> Path:
    """Two GPUs of three: one is another container's, and its node cannot be read."""
    (root / "dev/dri").mkdir(parents=True)
    (root / "dev/kfd").touch()
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    for node, simds, minor, unique_id in ((0, 0, 0, 0), (2, 304, 136, 255), (1, 304, 128, 0)):
        (nodes / str(node)).mkdir(parents=True)
        (nodes / str(node) / "properties").write_text(
            f"cpu_cores_count 0\nsimd_count {simds}\nunique_id {unique_id}\n"
            f"drm_render_minor {minor}\n"
        )
        (root / f"dev/dri/renderD{minor}").touch()
    (nodes / "3").mkdir()
    card = root / "sys/class/drm/renderD136/device"
    card.mkdir(parents=True)
    (card / "product_name").write_text("AMD Instinct MI300X\n")
    (card / "mem_info_vram_used").write_text("1024\n")
    (card / "mem_info_vram_total").write_text("4096\n")
    return card


def test_amds_gpus_are_the_nodes_with_simd_units(tmp_path: Path) -> None:
    """In KFD's order, where the container has their render node; memory is read in sysfs."""
    card = amd_tree(tmp_path)
    assert amd.find(tmp_path) == [
        Found(None, None, None),
        Found("AMD Instinct MI300X", "GPU-00000000000000ff", str(card)),
    ]
    found = look({"HIP_VISIBLE_DEVICES": "1"}, tmp_path)
    device = Device("amd", "1", "AMD Instinct MI300X", str(card))
    assert (found.visible, found.memory) == ([device], {device: Memory(1024, 4096)})
    (card / "mem_info_vram_used").write_text("a lot")
    assert amd.read(str(card)) is None
    (tmp_path / "dev/kfd").unlink()
    assert amd.find(tmp_path) == []


def test_nvidias_come_before_amds(tmp_path: Path) -> None:
    """A pool has devices of one kind, since its libraries are built for one."""
    amd_tree(tmp_path)
    (tmp_path / "dev/nvidia0").touch()
    assert [str(d) for d in look({}, tmp_path).visible] == ["nvidia:0"]
    hidden = look({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path)
    assert (hidden.visible, hidden.is_any_here) == ([], True)


def test_a_device_in_words() -> None:
    device = Device("nvidia", "0", "NVIDIA H100")
    assert in_words(device, Memory(1, 80 << 30)) == "nvidia:0 (NVIDIA H100, 80 GiB)"
    assert in_words(Device("nvidia", "0"), None) == "nvidia:0"


@pytest.mark.parametrize(
    ("version", "files", "cores"),
    [
        (2, {"box/cpu.max": "max 100000\n"}, None),
        (2, {"box/cpu.max": "50000 100000\n"}, 1),
        (2, {"box/cpu.max": "max 100000\n", "cpu.max": "100000 100000\n"}, 1),
        (2, {"box/cpu.max": "99999999 100000\n"}, None),
        (2, {"box/cpu.max": "garbage"}, None),
        (2, {}, None),
        (1, {"box/cpu.cfs_quota_us": "-1\n", "box/cpu.cfs_period_us": "100000\n"}, None),
        (1, {"box/cpu.cfs_quota_us": "60000\n", "box/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_cores_are_those_that_the_cgroup_allows(
    tmp_path: Path, version: int, files: dict[str, str], cores: int | None
) -> None:
    """Its own limit and those above it; None: as many as the affinity says."""
    mount, proc = tmp_path / "cgroup", tmp_path / "proc"
    (mount / "box").mkdir(parents=True)
    proc.mkdir()
    (proc / "cgroup").write_text("0::/box\n" if version == 2 else "3:cpu,cpuacct:/box\n")
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,cpu,cpuacct"
    (proc / "mountinfo").write_text(f"30 23 0:26 / {mount} rw shared:4 - {kind}\n")
    for name, text in files.items():
        (mount / name).write_text(text)
    assert allowed_cores(proc) == (allowed_cores(tmp_path / "nowhere") if cores is None else cores)


# --- drivers that hang or fail


def test_a_look_that_hangs_is_given_up() -> None:
    """Devices are counted by their files then, and the thread ends when it can."""
    is_released = []
    thread = DeviceThread(
        lambda: [time.sleep(0.01) for _ in iter(lambda: bool(is_released), True)] and Sight(),
        lambda: Sight([Device("nvidia", "0")], is_any_here=True),
    )
    thread.start()
    found = thread.found(limit_s=0.05)
    assert found.visible == [Device("nvidia", "0")]
    assert "has not answered within 0.05 s" in found.warnings[0]
    thread.watch(found.visible, found)
    assert thread.memory_of(found.visible[0]) is None
    is_released.append(True)
    thread._thread.join(5)
    assert not thread._thread.is_alive()


def test_a_look_that_fails_is_no_end() -> None:
    def fail() -> Sight:
        raise AttributeError("no nvmlInit")

    thread = DeviceThread(fail, lambda: Sight([Device("nvidia", "0")], is_any_here=True))
    thread.start()
    found = thread.found()
    assert found.visible == [Device("nvidia", "0")]
    assert "no nvmlInit" in found.warnings[0]
    thread.watch([], found)
    thread._thread.join(5)
    assert not thread._thread.is_alive()
