"""FastAPI's application is made for the first request that needs it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ogpu.service.http.app import Routes


def test_it_is_made_once_for_all_who_ask() -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(object())
        return made[-1]

    async def ask() -> list[object]:
        routes = Routes(make)
        return await asyncio.gather(*(routes.get() for _ in range(5)))

    assert asyncio.run(ask()) == made * 5
    assert len(made) == 1


def test_it_is_made_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task may have taken all the threads there are, and is cancelled by such a request."""

    async def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio, "to_thread", refuse)
    application: Any = object()
    assert asyncio.run(Routes(lambda: application).get()) is application
