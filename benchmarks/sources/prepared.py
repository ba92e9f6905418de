"""A source whose model is 400 MB in host memory, loaded once by @prepare."""

import time

import torch
from pydantic import BaseModel

import ogpu.service

PARAMETERS = 100_000_000  # of four bytes


class Text(BaseModel):
    text: str


weights: torch.Tensor
layer: torch.Tensor


@ogpu.service.prepare()
def fetch() -> None:
    global weights  # noqa: PLW0603 - as sources keep their model
    weights = torch.rand(PARAMETERS)


@ogpu.service.init()
def load() -> None:
    global layer  # noqa: PLW0603 - as above
    layer = weights.view(10_000, 10_000)


@ogpu.service.expose()
def predict(_: Text) -> Text:
    """Read all of the model."""
    with torch.inference_mode():
        return Text(text=str(float((layer @ torch.ones(10_000)).sum())))


@ogpu.service.expose()
def echo(data: Text) -> Text:
    return data


@ogpu.service.expose(timeout=0.2)
def hang(_: Text) -> Text:
    while True:
        time.sleep(0.01)


ogpu.service.start()
