"""Settings: read from the environment, checked, and refused with the variable's name."""

from __future__ import annotations

import pytest

from ogpu.service import config
from ogpu.service.config import Settings, describe, load_settings, variable_of
from ogpu.service.errors import SettingsError
from ogpu.service.logger import logger


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable_of(name), raising=False)


def test_the_defaults_are_those_of_the_design() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.bind) == ("0.0.0.0", 5555, "ready")
    assert (settings.workers, settings.gpus, settings.start_method) == ("auto", "auto", "auto")
    assert (settings.task_timeout, settings.queue_size, settings.drain_timeout) == (None, 1000, 8)
    assert (settings.max_body_bytes, settings.max_result_bytes) == (64 * 2**20, 256 * 2**20)
    assert (settings.callback_url, settings.callback_timeout) == (None, 30)
    assert (settings.log_level, settings.log_format) == ("INFO", "auto")


@pytest.mark.parametrize("level", ["FAIL", "NOTSET", 15])
def test_a_source_may_choose_any_level_of_its_logger(
    monkeypatch: pytest.MonkeyPatch, level: str | int
) -> None:
    """Not only those that OGPU_LOG_LEVEL takes: it ran with the frozen module."""
    before = logger.level
    try:
        logger.setLevel(level)
        assert load_settings().wanted_log_level is None
        monkeypatch.setenv("OGPU_LOG_LEVEL", str(level))
        with pytest.raises(SettingsError, match="OGPU_LOG_LEVEL"):
            load_settings()
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OGPU_PORT", "abc"),
        ("OGPU_PORT", "70000"),
        ("OGPU_PORT", "-1"),
        ("OGPU_BIND", "late"),
        ("OGPU_WORKERS", "0"),
        ("OGPU_WORKERS", "many"),
        ("OGPU_WORKERS", "1.5"),
        ("OGPU_START_METHOD", "forkserver"),
        ("OGPU_TASK_TIMEOUT", "0"),
        ("OGPU_TASK_TIMEOUT", "-3"),
        ("OGPU_TASK_TIMEOUT", "nan"),
        ("OGPU_TASK_TIMEOUT", "inf"),
        ("OGPU_QUEUE_SIZE", "0"),
        ("OGPU_MAX_BODY_BYTES", "0"),
        ("OGPU_MAX_RESULT_BYTES", "5000000000"),
        ("OGPU_DRAIN_TIMEOUT", "-1"),
        ("OGPU_CALLBACK_TIMEOUT", "0"),
        ("OGPU_LOG_LEVEL", "LOUD"),
        ("OGPU_LOG_FORMAT", "xml"),
        ("CALLBACK_URL", "ftp://example.org"),
        ("CALLBACK_URL", "nowhere"),
        ("CALLBACK_URL", "http://:80/x"),
        ("CALLBACK_URL", "http://host:0/x"),
        ("CALLBACK_URL", "http://host:port/x"),
        ("CALLBACK_URL", "http://two..dots/x"),
        ("OGPU_FAILURE_CALLBACK_URL", "https://host:99999/x"),
    ],
)
def test_an_invalid_setting_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"{variable}=.*{value}"):
        load_settings()


def test_all_invalid_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGPU_PORT", "x")
    monkeypatch.setenv("OGPU_BIND", "y")
    with pytest.raises(SettingsError, match=r"OGPU_PORT.*OGPU_BIND"):
        load_settings()


def test_an_override_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGPU_PORT", "6000")
    monkeypatch.setenv("CALLBACK_URL", "http://one")
    assert load_settings().port == 6000
    settings = load_settings(port=7000, callback_url="http://two", task_timeout=2)
    assert (settings.port, settings.callback_url, settings.task_timeout) == (7000, "http://two", 2)


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(SettingsError, match="OGPU_PROT=80"):
        load_settings(prot=80)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files write CALLBACK_URL=${CALLBACK_URL}, which is empty where nobody set it."""
    monkeypatch.setenv("CALLBACK_URL", "")
    monkeypatch.setenv("OGPU_TASK_TIMEOUT", "")
    assert load_settings().callback_url is None


def test_a_patched_constant_is_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source may assign to the frozen module's constants before start()."""
    monkeypatch.setattr(config, "SERVICE_PORT", 8123)
    monkeypatch.setattr(config, "CALLBACK_URL", "http://patched")
    settings = load_settings()
    assert (settings.port, settings.callback_url) == (8123, "http://patched")


def test_every_field_is_described_and_shown() -> None:
    shown = describe(load_settings())
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"{variable_of(name)}=" in shown


@pytest.mark.parametrize("field", ["max_body_bytes", "max_result_bytes"])
def test_what_the_journal_cannot_hold_is_no_setting(field: str) -> None:
    """SQLite holds 10^9 bytes in a value: a larger result would stop the journal for good."""
    with pytest.raises(SettingsError, match=variable_of(field)):
        load_settings(**{field: 1_000_000_000})
