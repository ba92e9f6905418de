"""A PyTorch model that is faster with several inputs at once.

A network of the kind that ends a recommender or a classifier of embeddings: six layers of 2048,
100 MB of weights. With one input, each weight is fetched from memory for one multiplication.
"""

import torch
from pydantic import BaseModel

TIMEOUT_S = 30
QUICK = False
WIDTH = 2048
LAYERS = 6

model: torch.nn.Module


class Numbers(BaseModel):
    values: list[float]


class Answer(BaseModel):
    """What the model made of the numbers, and how many inputs it was given at once."""

    values: list[float]
    together: int


Input, Output = Numbers, Answer


def load() -> None:
    global model  # noqa: PLW0603 - as deployed sources keep their model
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Linear(16, WIDTH)]
    for _ in range(LAYERS):
        layers += [torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 16)).eval()


def handle(data: Numbers) -> Answer:
    with torch.inference_mode():
        return Answer(values=model(torch.tensor([data.values]))[0].tolist(), together=1)


def handle_many(items: list[Numbers]) -> list[Answer]:
    with torch.inference_mode():
        rows = model(torch.tensor([item.values for item in items])).tolist()
    return [Answer(values=row, together=len(items)) for row in rows]
