"""Every kind of field that people put in a model."""
import math
import uuid
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, Literal, Optional, Union

import ogpu.service
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_serializer
from pydantic.alias_generators import to_camel


class Size(IntEnum):
    small = 1
    large = 2


class Colour(str, Enum):
    red = "red"
    blue = "blue"


class Plain(Enum):
    one = "one"


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: float


class Square(BaseModel):
    kind: Literal["square"]
    side: float


class Form(BaseModel):
    model_config = ConfigDict(
        populate_by_name=True,
        alias_generator=to_camel,
        extra="allow",
        protected_namespaces=(),
        arbitrary_types_allowed=True,
        use_enum_values=True,
        json_schema_extra={"examples": [{"modelName": "m"}]},
    )

    model_name: str
    prompt_text: Union[str, dict] = ""
    shape: Union[Circle, Square, None] = Field(default=None, discriminator="kind")
    when: datetime | str = ""
    key: uuid.UUID | str = ""
    limit: Union[int, float, None] = None
    colour: Colour = Colour.red
    tags: set[str] = set()
    steps: int = Field(20, validation_alias=AliasChoices("steps", "num_inference_steps"))


class Seen(BaseModel):
    """What the handler saw: types, too."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    types: dict[str, str]
    colour: Colour
    size: Size = Size.large
    extra: Optional[dict[str, Any]] = None
    text: str = "naïve ☃ \U0001f600"
    big: int = 2**60
    tiny: float = 1e-7


@ogpu.service.expose()
def see(form: Form) -> Seen:
    types = {name: type(getattr(form, name)).__name__ for name in Form.model_fields}
    return Seen(
        model_name=form.model_name, types=types, colour=form.colour, extra=form.model_extra or None
    )


@dataclass
class Point:
    x: float
    y: float


class Odd(BaseModel):
    """What the frozen module could not send: there these ended in the log."""

    when: datetime = datetime(2024, 5, 17, 12, 30, tzinfo=timezone.utc)
    day: date = date(2024, 5, 17)
    took: timedelta = timedelta(minutes=1, seconds=1.5)
    id: uuid.UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")
    price: Decimal = Decimal("12.50")
    raw: bytes = b"raw"
    loss: float = math.nan
    perplexity: float = math.inf
    kind: Plain = Plain.one
    where: Path = Path("/tmp/x")
    labels: set[int] = {1}
    point: Point = Point(1, 2)


@ogpu.service.expose()
def odd(form: Form) -> Odd:
    return Odd()


class Slim(BaseModel):
    text: str
    note: Optional[str] = None
    nested: Optional["Slim"] = None

    @field_serializer("text")
    def shout(self, text: str) -> str:
        return text.upper()

    def model_dump(self, **options):
        options.setdefault("exclude_none", True)
        return super().model_dump(**options)


@ogpu.service.expose()
def slim(form: Form) -> Slim:
    return Slim(text=form.model_name, nested=Slim(text="in"))


class More(Slim):
    score: float = 0.5


@ogpu.service.expose()
def more(form: Form) -> Slim:
    return More(text="a subclass")


@ogpu.service.expose()
def as_dict(form: Form) -> Slim:
    return {"text": "a dict"}


if __name__ == "__main__":
    ogpu.service.start()
