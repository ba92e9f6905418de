"""A source with a usual start: torch at module level, a small model in @init."""

import torch
from pydantic import BaseModel

import ogpu.service


class Numbers(BaseModel):
    values: list[float]


model: torch.nn.Module


@ogpu.service.init()
def load() -> None:
    global model  # noqa: PLW0603 - as deployed sources keep their model
    model = torch.nn.Linear(64, 64).eval()


@ogpu.service.expose()
def predict(data: Numbers) -> Numbers:
    with torch.inference_mode():
        return Numbers(values=model(torch.tensor(data.values)).tolist())


if __name__ == "__main__":
    ogpu.service.start()
