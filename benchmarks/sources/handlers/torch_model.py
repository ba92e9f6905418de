"""A source with a usual start: torch at module level, a small model that each worker loads."""

import torch
from pydantic import BaseModel

TIMEOUT_S = 30
QUICK = False

model: torch.nn.Module


class Text(BaseModel):
    text: str


Input = Output = Text


def load() -> None:
    global model  # noqa: PLW0603 - as deployed sources keep their model
    model = torch.nn.Linear(64, 64).eval()


def handle(data: Text) -> Text:
    """Run the model, and answer with the text that was sent."""
    with torch.inference_mode():
        assert model(torch.ones(64)).shape == (64,)
    return Text(text=data.text)
