"""Embeddings, in the style of a typed code base: generics, root models, a process pool."""
from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
from functools import lru_cache
from typing import Generic, TypeVar

import ogpu.service
from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

T = TypeVar("T")
START_METHOD = os.getenv("POOL_METHOD", "fork")


class Texts(RootModel[list[str]]):
    pass


class Request(BaseModel):
    """Refers to classes that come below, and to itself."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    texts: Texts
    options: Options = Field(default_factory=lambda: Options())
    next: Request | None = None

    @model_validator(mode="after")
    def not_too_many(self) -> Request:
        if len(self.texts.root) > 100:
            raise ValueError("100 texts at most")
        return self


class Options(BaseModel):
    model_config = ConfigDict(frozen=True)

    size: int = Field(default=4, gt=0, le=8, multiple_of=2)
    normalize: bool = True


class Page(BaseModel, Generic[T]):
    items: list[T]
    total: int
    links: dict[str, str] = {}


class Vector(BaseModel):
    values: tuple[float, ...]
    norm: float


class Vectors(RootModel[list[list[float]]]):
    pass


@lru_cache(maxsize=None)
def embed(text: str, size: int) -> tuple[float, ...]:
    digest = hashlib.sha256(text.encode()).digest()
    return tuple(byte / 256 for byte in digest[:size])


def embed_one(work: tuple[str, Options]) -> Vector:
    text, options = work
    values = embed(text, options.size)
    norm = math.sqrt(sum(v * v for v in values))
    if options.normalize and norm:
        values = tuple(round(v / norm, 6) for v in values)
    return Vector(values=values, norm=round(norm, 6))


@ogpu.service.expose(timeout=60)
def embeddings(request: Request) -> Page[Vector]:
    items = [embed_one((text, request.options)) for text in request.texts.root]
    depth = 0
    while request.next is not None:
        request, depth = request.next, depth + 1
    return Page(items=items, total=len(items), links={"depth": str(depth)})


@ogpu.service.expose(timeout=60)
def embed_in_pool(request: Request) -> Vectors:
    """CPU work in processes: they import this file again where they are spawned."""
    work = [(text, request.options) for text in request.texts.root]
    with multiprocessing.get_context(START_METHOD).Pool(2) as pool:
        return Vectors([list(v.values) for v in pool.map(embed_one, work)])


ogpu.service.start()
