"""What a source registers: the errors of the frozen module, and its importable names."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, List  # noqa: UP035 - as sources of Python 3.8 have it

import pytest
from pydantic import BaseModel

import ogpu.service
from ogpu.service import decorators, handler


class Model(BaseModel):
    text: str = ""


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)


@pytest.fixture
def capture_records() -> Iterator[Records]:
    records = Records()
    ogpu.service.logger.addHandler(records)
    yield records
    ogpu.service.logger.removeHandler(records)


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "_handlers", {})
    monkeypatch.setattr(handler, "_init_function", None)
    monkeypatch.setattr(handler, "_prepare_function", None)


def test_expose_registers_and_returns_the_function_itself() -> None:
    @ogpu.service.expose(timeout=1.5)
    def predict(data: Model) -> Model:
        return data

    assert handler.registered()["predict"].function is predict
    assert handler.registered()["predict"].timeout_s == 1.5
    assert predict(Model(text="direct")).text == "direct"


def test_a_second_handler_of_one_name_is_a_value_error() -> None:
    def predict(data: Model) -> Model:
        return data

    ogpu.service.expose()(predict)
    with pytest.raises(ValueError, match="`predict` is already registered"):
        ogpu.service.expose()(predict)


@pytest.mark.parametrize(
    "timeout", [0, -1, 0.0, float("nan"), float("inf"), "5", True, False, [], 1j, object()]
)
def test_a_bad_timeout_is_a_value_error_that_names_the_function(timeout: object) -> None:
    def predict(data: Model) -> Model:
        return data

    with pytest.raises(ValueError, match="predict"):
        ogpu.service.expose(timeout=timeout)(predict)  # type: ignore[arg-type]
    assert handler.get_handlers() == []


@pytest.mark.parametrize(("timeout", "seconds"), [(1, 1.0), (0.25, 0.25), (None, None)])
def test_a_good_timeout_is_kept_in_seconds(timeout: float | None, seconds: float | None) -> None:
    def predict(data: Model) -> Model:
        return data

    ogpu.service.expose(timeout)(predict)
    assert handler.registered()["predict"].timeout_s == seconds


@pytest.mark.parametrize("grace", [-1, float("nan"), float("inf"), "5", True, 1e12])
def test_a_grace_is_a_number_of_seconds(grace: object) -> None:
    """Bad ones are named with their function, and register nothing; 0 is a good one."""

    def predict(data: Model) -> Model:
        return data

    with pytest.raises(ValueError, match=r"`predict`: grace must be a number of seconds"):
        ogpu.service.expose(grace=grace)(predict)  # type: ignore[arg-type]
    assert handler.get_handlers() == []
    ogpu.service.expose(grace=0)(predict)
    assert handler.registered()["predict"].grace_s == 0


def test_a_batch_takes_and_returns_lists() -> None:
    """The models are those of one item; the window is 0.01 s unless it is given."""

    def embed(items: list[Model]) -> list[Model]:
        return items

    def old_names(items: List[Model]) -> List[Model]:  # noqa: UP006 - sources of Python 3.8
        return items

    ogpu.service.expose(batch_size=8)(embed)
    ogpu.service.expose(batch_size=1, batch_window=0)(old_names)
    assert handler.get_handlers() == [(embed, Model, Model), (old_names, Model, Model)]
    assert handler.registered()["embed"].batching == handler.Batching(8, 0.01)
    assert handler.registered()["old_names"].batching == handler.Batching(1, 0.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 1024"),
        ({"batch_size": 1025}, "batch_size must be"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"batch_size": 2, "batch_window": -1}, "batch_window must be a number of seconds"),
        ({"batch_size": 2, "batch_window": "1"}, "batch_window must be"),
        ({"batch_window": 1}, "batch_window is of no use without batch_size"),
    ],
)
def test_bad_numbers_of_a_batch_are_value_errors(options: Any, says: str) -> None:
    def embed(items: list[Model]) -> list[Model]:
        return items

    with pytest.raises(ValueError, match=f"`embed`: {says}"):
        ogpu.service.expose(**options)(embed)
    assert handler.get_handlers() == []


def test_lists_go_with_a_batch_size_and_models_without() -> None:
    def takes_one(item: Model) -> Model:
        return item

    def returns_one(items: list[Model]) -> Model:
        return items[0]

    def takes_names(items: list[str]) -> list[Model]:
        return [Model(text=item) for item in items]

    def takes_lists(items: list[Model]) -> list[Model]:
        return items

    for function in (takes_one, returns_one, takes_names):
        with pytest.raises(TypeError, match=r"has a batch_size: it must take a list\[...\]"):
            ogpu.service.expose(batch_size=2)(function)
    with pytest.raises(TypeError, match=r"must be a subclass of pydantic\.BaseModel"):
        ogpu.service.expose()(takes_lists)


def test_expose_without_parentheses_says_what_to_write() -> None:
    def predict(data: Model) -> Model:
        return data

    with pytest.raises(ValueError, match=r"`predict`: write `@expose\(\)`"):
        ogpu.service.expose(predict)  # type: ignore[arg-type]


def no_return(data: Model):  # type: ignore[no-untyped-def]
    return data


def no_argument() -> Model:
    return Model()


def two_arguments(data: Model, more: Model) -> Model:
    return data


def bare_argument(data) -> Model:  # type: ignore[no-untyped-def]
    return Model()


def text_in(data: str) -> Model:
    return Model()


def text_out(data: Model) -> str:
    return ""


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (no_return, "must have a return type"),
        (no_argument, "exactly ONE input argument .got 0."),
        (two_arguments, "exactly ONE input argument .got 2."),
        (bare_argument, "Input to `bare_argument` must be a subclass"),
        (text_in, "Input to `text_in` must be a subclass"),
        (text_out, "Return type of `text_out` must be a subclass"),
    ],
)
def test_a_wrong_signature_is_a_type_error(function: object, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        ogpu.service.expose()(function)  # type: ignore[type-var]


def test_init_is_registered_once_and_takes_nothing() -> None:
    def load() -> None: ...

    def load_more() -> None: ...

    def load_from(path: str) -> None: ...

    with pytest.raises(TypeError, match="must take no arguments"):
        ogpu.service.init()(load_from)
    assert ogpu.service.init()(load) is load
    assert handler.get_init_handler() is load
    with pytest.raises(ValueError, match="`load` is already registered"):
        ogpu.service.init()(load_more)


def test_the_frozen_registry_functions_work() -> None:
    def predict(data: Model) -> Model:
        return data

    def load() -> None: ...

    handler.add_handler(predict, Model, Model)
    handler.add_init_handler(load)
    assert handler.get_handlers() == [(predict, Model, Model)]
    assert handler.get_init_handler() is load
    assert decorators.init is ogpu.service.init
    assert decorators.expose is ogpu.service.expose


def test_without_a_pool_a_function_with_a_timeout_gives_up(capture_records: Records) -> None:
    """What ``get_handlers()`` yields does what it did in 0.2.3, for sources with their own server.

    None after the timeout, and where the handler raises; the log says why.
    """
    go_on = threading.Event()

    @ogpu.service.expose(timeout=0.05)
    def predict(data: Model) -> Model:
        if data.text == "hang":
            go_on.wait(10)
        if data.text == "raise":
            raise RuntimeError("no such model")
        return Model(text=threading.current_thread().name)

    ((function, *models),) = handler.get_handlers()
    assert models == [Model, Model]
    assert function.__name__ == "predict"
    assert function(Model()).text != threading.current_thread().name
    assert function(Model(text="raise")) is None
    assert function(Model(text="hang")) is None
    go_on.set()
    assert [(r.levelname, r.getMessage()) for r in capture_records.seen] == [
        ("FAIL", "Exception in `predict`: no such model"),
        ("TIMEOUT", "`predict` timed out after 0.05 seconds"),
    ]


def test_every_frozen_name_is_importable() -> None:
    """Design §3: what deployed sources import or patch stays where it was."""
    from ogpu.service.config import (
        CALLBACK_URL,
        PROTOCOL_VERSION,
        PROVIDER_ADDRESS,
        SDK_VERSION,
        SENTRY_DSN,
        SERVICE_HOST,
        SERVICE_PORT,
        SOURCE_ADDRESS,
    )
    from ogpu.service.handler import (
        add_handler,
        add_init_handler,
        get_handlers,
        get_init_handler,
    )
    from ogpu.service.logger import logger
    from ogpu.service.server import lifespan, send_callback, start

    assert (SERVICE_HOST, SERVICE_PORT) == ("0.0.0.0", 5555)
    assert (SOURCE_ADDRESS, PROVIDER_ADDRESS) == ("0xundefined", "0xundefined")
    assert (CALLBACK_URL, PROTOCOL_VERSION, SENTRY_DSN) == (None, None, None)
    assert SDK_VERSION[0].isdigit()
    assert all(map(callable, (add_handler, add_init_handler, get_handlers, get_init_handler)))
    assert callable(start)
    assert callable(lifespan)
    assert callable(send_callback)
    assert logger is ogpu.service.logger


def test_everything_public_is_listed() -> None:
    assert set(ogpu.service.__all__) == {
        "__version__",
        "RecycleWorker",
        "TaskTimeout",
        "current_task",
        "current_tasks",
        "expose",
        "init",
        "logger",
        "prepare",
        "start",
    }
    assert all(hasattr(ogpu.service, name) for name in ogpu.service.__all__)


def test_the_logger_calls_found_in_deployed_sources_exist() -> None:
    """`ogpu.service.exception(...)` in an except block must not raise an AttributeError."""
    for name in ("debug", "info", "warning", "error", "exception"):
        assert callable(getattr(ogpu.service, name))


def test_prepare_is_registered_once_and_takes_nothing() -> None:
    @ogpu.service.prepare()
    def fetch() -> None: ...

    assert handler.get_prepare_handler() is fetch
    with pytest.raises(ValueError, match="`fetch` is already registered"):
        ogpu.service.prepare()(fetch)


def test_a_prepare_with_arguments_is_a_type_error() -> None:
    def fetch(where: str) -> None: ...

    with pytest.raises(TypeError, match="Prepare function `fetch` must take no arguments"):
        ogpu.service.prepare()(fetch)
    assert handler.get_prepare_handler() is None


def test_a_warmup_is_an_instance_of_the_input_model() -> None:
    def predict(data: Model) -> Model:
        return data

    with pytest.raises(TypeError, match="`predict`: warmup must be an instance of Model"):
        ogpu.service.expose(warmup={"text": "x"})(predict)  # type: ignore[arg-type]
    assert handler.get_handlers() == []
    ogpu.service.expose(warmup=Model(text="x"))(predict)
    assert handler.registered()["predict"].warmup == Model(text="x")
