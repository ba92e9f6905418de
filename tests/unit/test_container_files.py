"""The files in docker/: what their linter and their schema (make lint) cannot know."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

import pytest

from ogpu.service.config import SERVICE_PORT, load_settings
from support.image import DOCKER, VENDORS, Dockerfile, compose_service, seconds

ROOT = DOCKER.parent
RENDER_GROUP = {"RENDER_GID": "992"}
# From SIGTERM to the end, beyond OGPU_DRAIN_TIMEOUT: workers, server and outbox have 5 s each.
ENDING_S = 15


def service_of(vendor: str) -> dict[str, Any]:
    return compose_service(vendor, **RENDER_GROUP)


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_base_is_pinned_and_names_no_host(vendor: str) -> None:
    """A whole version, so that a build next year has the same base."""
    base = Dockerfile(vendor).one("FROM")
    assert re.fullmatch(r"[a-z]+(/[a-z0-9.-]+)?:\d+\.\d+\.\d+(-[a-z0-9.-]+)?", base), base


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_source_runs_as_pid_one_without_rights(vendor: str) -> None:
    """In exec form no shell keeps SIGTERM from the service; the user is a number, and not root."""
    file = Dockerfile(vendor)
    assert file.command == ["python", "main.py"]
    assert file.all("ENTRYPOINT") == []
    user, group = file.one("USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    names = [name for name, _ in file.instructions]
    assert "RUN" not in names[names.index("USER") :]


@pytest.mark.parametrize("vendor", VENDORS)
def test_what_is_kept_is_in_volumes(vendor: str) -> None:
    """The journal, and the home with its caches of models; all else is read-only."""
    file, service = Dockerfile(vendor), service_of(vendor)
    volumes = json.loads(file.one("VOLUME"))
    assert [volume.split(":")[1] for volume in service["volumes"]] == volumes
    environment = file.environment
    assert environment["OGPU_STATE_DIR"] in volumes
    for name in ("HOME", "HF_HOME", "TORCH_HOME"):
        assert any(PurePosixPath(environment[name]).is_relative_to(v) for v in volumes)
    assert f"--owner=ogpu --group=ogpu {' '.join(volumes)}" in file.all("RUN")[-4]
    assert service["read_only"] is True
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_service_is_installed_after_what_the_source_needs(vendor: str) -> None:
    """The ogpu SDK among its requirements would overwrite the service; and pip check comes last."""
    runs = Dockerfile(vendor).all("RUN")
    last, before = runs[-1], runs[-2]
    assert "pip install --requirement requirements.txt" in before
    assert "pip install --no-deps ." in last
    assert last.endswith("pip check")


def test_the_build_gets_what_it_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    copied = [
        name
        for arguments in Dockerfile("cpu").all("COPY")
        if "--from" not in arguments
        for name in arguments.split()[:-1]
    ]
    assert {"pyproject.toml", "src"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}\n" in ignored


@pytest.mark.parametrize("vendor", VENDORS)
def test_image_and_compose_file_agree_on_the_health_check(vendor: str) -> None:
    assert service_of(vendor)["healthcheck"] == Dockerfile(vendor).healthcheck


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_contract_of_the_compose_files(vendor: str) -> None:
    """What providers' own files have: the port, the way to the host, the callback's URL."""
    service = service_of(vendor)
    assert service["ports"] == [f"5555:{SERVICE_PORT}"]
    assert Dockerfile(vendor).one("EXPOSE") == str(SERVICE_PORT)
    assert service["extra_hosts"] == ["host.docker.internal:host-gateway"]
    assert service["environment"] == {"CALLBACK_URL": ""}
    changed = compose_service(vendor, PORT="80", CALLBACK_URL="http://host/x", **RENDER_GROUP)
    assert changed["ports"] == ["80:5555"]
    assert changed["environment"] == {"CALLBACK_URL": "http://host/x"}
    assert service["init"] is True
    build = service["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).name == f"Dockerfile.{vendor}"
    assert (DOCKER / build["additional_contexts"]["source"] / "main.py").exists()


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_stop_leaves_time_for_the_drain(vendor: str) -> None:
    grace_s = seconds(service_of(vendor)["stop_grace_period"])
    assert grace_s >= load_settings().drain_timeout + ENDING_S


def test_the_vendors_differ_in_their_devices_alone() -> None:
    services = {vendor: service_of(vendor) for vendor in VENDORS}
    devices = {
        vendor: {
            key: service.pop(key) for key in ("deploy", "devices", "group_add") if key in service
        }
        for vendor, service in services.items()
    }
    for service in services.values():
        del service["build"]["dockerfile"]
    assert services["cpu"] == services["nvidia"] == services["amd"]
    reservation = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    nvidia = {"resources": {"reservations": {"devices": [reservation]}}}
    amd = {"devices": ["/dev/kfd", "/dev/dri"], "group_add": ["992"]}
    assert devices == {"cpu": {}, "nvidia": {"deploy": nvidia}, "amd": amd}


def test_an_amd_gpu_needs_the_number_of_its_group() -> None:
    """No default can be right: it is another one on each host."""
    with pytest.raises(KeyError, match="stat --format=%g /dev/kfd"):
        compose_service("amd")


def test_the_variables_are_documented() -> None:
    """Each that a compose file reads is in the table of docker/README.md, and no other."""
    documented = re.findall(r"^\| `(\w+)`", (DOCKER / "README.md").read_text(), re.MULTILINE)
    files = "".join((DOCKER / f"compose.{vendor}.yml").read_text() for vendor in VENDORS)
    assert set(documented) == set(re.findall(r"\$\{(\w+)", files))
