"""A source with rich models: nested, enums, optionals, bounds; for the contract of the API.

The models are strict, since a lax one takes `false` for a number, which its JSON schema denies; and
no input is an `int`, since a strict one refuses 5.0, which its JSON schema allows.
"""

from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

import ogpu.service


class Genre(str, Enum):
    NOVEL = "novel"
    POEM = "poem"


class Author(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=20)]
    age: Annotated[float, Field(ge=0, le=150)] | None = None


class Book(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    title: Annotated[str, Field(max_length=50)]
    genre: Genre
    authors: Annotated[list[Author], Field(max_length=3)] = []
    price: Annotated[float, Field(ge=0, le=1000)] | None = None


class Verdict(BaseModel):
    book: Book
    stars: Annotated[int, Field(ge=1, le=5)]
    reason: str | None = None


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    books: Annotated[list[Book], Field(max_length=3)]
    urgent: bool = False
    notes: dict[str, Annotated[str, Field(max_length=20)]] | None = None


class Receipt(BaseModel):
    count: int
    first: Book | None
    genres: list[Genre]


@ogpu.service.expose()
def judge(data: Book) -> Verdict:
    """Judge a book by its title."""
    return Verdict(book=data, stars=1 + len(data.title) % 5)


@ogpu.service.expose(timeout=20)
async def order(data: Order) -> Receipt:
    """Order books; an order without any fails."""
    if not data.books:
        raise ValueError("an order needs a book")
    return Receipt(count=len(data.books), first=data.books[0], genres=[b.genre for b in data.books])


ogpu.service.start()
