"""A model of 400 MB, all of which is read for every task; the answer is who has read it."""

import os

import torch
from pydantic import BaseModel

TIMEOUT_S = 60
QUICK = False
_PARAMETERS = 100_000_000  # of four bytes

weights: torch.Tensor
layer: torch.Tensor


class Text(BaseModel):
    text: str


Input = Output = Text


def prepare() -> None:
    global weights  # noqa: PLW0603 - as sources keep their model
    torch.manual_seed(0)
    weights = torch.rand(_PARAMETERS)


def load() -> None:
    global layer  # noqa: PLW0603 - as above
    layer = weights.view(10_000, 10_000)


def handle(_: Text) -> Text:
    with torch.inference_mode():
        assert float((layer @ torch.ones(10_000)).sum()) > 0
    return Text(text=str(os.getpid()))
