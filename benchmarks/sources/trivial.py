"""A source that costs nothing: what starting the service itself takes."""

from pydantic import BaseModel

import ogpu.service


class Text(BaseModel):
    text: str


@ogpu.service.init()
def load() -> None:
    """Load nothing."""


@ogpu.service.expose()
def echo(data: Text) -> Text:
    return Text(text=data.text)


if __name__ == "__main__":
    ogpu.service.start()
