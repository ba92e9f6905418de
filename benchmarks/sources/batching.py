"""One PyTorch model behind two handlers: tasks one by one, and tasks in batches of up to 8.

A network of the kind that ends a recommender or a classifier of embeddings: six layers of 2048,
100 MB of weights. With one input, each weight is fetched from memory for one multiplication.
"""

import torch
from pydantic import BaseModel

import ogpu.service

WIDTH = 2048
LAYERS = 6

model: torch.nn.Module


class Numbers(BaseModel):
    values: list[float]


@ogpu.service.init()
def load() -> None:
    global model  # noqa: PLW0603 - as deployed sources keep their model
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Linear(16, WIDTH)]
    for _ in range(LAYERS):
        layers += [torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 16)).eval()


@ogpu.service.expose()
def alone(data: Numbers) -> Numbers:
    with torch.inference_mode():
        return Numbers(values=model(torch.tensor([data.values]))[0].tolist())


@ogpu.service.expose(batch_size=8, batch_window=0.01)
def batched(items: list[Numbers]) -> list[Numbers]:
    with torch.inference_mode():
        rows = model(torch.tensor([item.values for item in items])).tolist()
    return [Numbers(values=row) for row in rows]


if __name__ == "__main__":
    ogpu.service.start()
