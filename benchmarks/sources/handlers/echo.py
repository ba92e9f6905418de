"""Answer the text that was sent."""

from pydantic import BaseModel

TIMEOUT_S = 30
QUICK = True


class Text(BaseModel):
    text: str


Input = Output = Text


def load() -> None:
    """Load nothing."""


def handle(data: Text) -> Text:
    return Text(text=data.text)
