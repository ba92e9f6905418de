"""What docker/ says: its Dockerfiles and compose files, read as an engine would read them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parent.parent.parent / "docker"
VENDORS = ("cpu", "nvidia", "amd")
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
_UNITS_S = {"s": 1, "m": 60, "h": 3600}


class Dockerfile:
    """The instructions of one, in order: pairs of a name and its arguments on one line."""

    def __init__(self, vendor: str) -> None:
        text = (DOCKER / f"Dockerfile.{vendor}").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        joined = "\n".join(lines).replace("\\\n", "").splitlines()
        self.instructions = [(line.split()[0], line.split(None, 1)[1]) for line in joined]

    def all(self, name: str) -> list[str]:
        return [arguments for found, arguments in self.instructions if found == name]

    def one(self, name: str) -> str:
        (arguments,) = self.all(name)
        return arguments

    @property
    def command(self) -> list[str]:
        """CMD, which is JSON in its exec form; anything else is an error."""
        return _exec_form(self.one("CMD"))

    @property
    def healthcheck(self) -> dict[str, Any]:
        """HEALTHCHECK, as a compose file would say it."""
        options, command = self.one("HEALTHCHECK").split("CMD", 1)
        said = dict(option.removeprefix("--").split("=") for option in options.split())
        health: dict[str, Any] = {name.replace("-", "_"): text for name, text in said.items()}
        health["retries"] = int(health["retries"])
        return {"test": ["CMD", *_exec_form(command)], **health}

    @property
    def environment(self) -> dict[str, str]:
        pairs = " ".join(self.all("ENV")).split()
        return dict(pair.split("=", 1) for pair in pairs)


def _exec_form(text: str) -> list[str]:
    command = json.loads(text)
    assert isinstance(command, list)
    assert all(isinstance(word, str) for word in command)
    return command


def compose_service(vendor: str, **variables: str) -> dict[str, Any]:
    """Return the service of a compose file, with the variables filled in."""
    text = (DOCKER / f"compose.{vendor}.yml").read_text(encoding="utf-8")
    (service,) = yaml.safe_load(text)["services"].values()
    filled_in = interpolate(service, variables)
    assert isinstance(filled_in, dict)
    return filled_in


def interpolate(node: object, variables: Mapping[str, str]) -> object:
    """Fill in ``${NAME:-default}`` and ``${NAME:?message}`` in all values that are text.

    Raises:
        KeyError: a variable is needed and missing; the message is that of the file.
    """

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if variables.get(name):
            return variables[name]
        if kind == "?":
            raise KeyError(rest)
        return rest or ""

    if isinstance(node, dict):
        return {key: interpolate(inner, variables) for key, inner in node.items()}
    if isinstance(node, list):
        return [interpolate(inner, variables) for inner in node]
    return _VARIABLE.sub(value, node) if isinstance(node, str) else node


def seconds(duration: str) -> float:
    """Return a duration such as 1m30s in seconds."""
    return sum(int(n) * _UNITS_S[unit] for n, unit in re.findall(r"(\d+)([smh])", duration))
