"""A PyTorch source: it learns to read handwritten digits in @init, then reads them.

Importing torch up here is fine, since workers are forked from a process that has imported it. What
computes (a matrix product, a tensor on the GPU) belongs into @init and the handlers: a process
that has computed cannot be forked, and each worker would have to import torch again.
"""

from typing import Annotated

import torch
from pydantic import BaseModel, Field
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ogpu.service

SEED = 0
ROUNDS = 150
INK = 16.0  # the darkest that a pixel can be
SPINNING_CYCLES = 10**14  # of the GPU's clock: more than half a day

model: torch.nn.Module
device: torch.device

Pixel = Annotated[float, Field(ge=0, le=INK)]


class Image(BaseModel):
    pixels: list[Pixel] = Field(
        min_length=64, max_length=64, description="8 x 8 pixels, row by row: 0 is paper, 16 is ink"
    )


class Digit(BaseModel):
    digit: int = Field(ge=0, le=9, description="the digit that it most likely is")
    probability: float = Field(ge=0, le=1, description="how likely, in the model's opinion")


class Matrix(BaseModel):
    size: int = Field(1000, ge=1, le=20_000, description="rows and columns")


@ogpu.service.init()
def train() -> None:
    """Learn from four fifths of the data set; a real source loads its weights here."""
    global model, device  # noqa: PLW0603 - set once in each worker, before its first task
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    ).to(device)
    images, held_out_images, digits, held_out_digits = (
        torch.as_tensor(part, device=device)
        for part in train_test_split(
            *load_digits(return_X_y=True), test_size=0.2, random_state=SEED
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(scaled(images)), digits).backward()
        optimizer.step()
    with torch.inference_mode():
        right = model(scaled(held_out_images)).argmax(dim=1) == held_out_digits
    ogpu.service.logger.info(
        "On %s: %.1f %% of %d held-out digits are read correctly",
        device,
        100 * right.float().mean().item(),
        len(right),
    )


@ogpu.service.expose(timeout=10, batch_size=8, batch_window=0.01)
def classify(items: list[Image]) -> list[Digit]:
    """Read one handwritten digit; those that wait at the same time are read together."""
    images = torch.tensor([item.pixels for item in items], device=device)
    with torch.inference_mode():
        best = model(scaled(images)).softmax(dim=1).max(dim=1)
    return [
        Digit(digit=digit, probability=probability)
        for digit, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@ogpu.service.expose(timeout=2)
def hang(data: Matrix) -> Digit:
    """Multiply matrices for ever; it is there to be killed at its deadline."""
    matrix = torch.rand(data.size, data.size, device=device)
    product = matrix
    while True:
        product = torch.nn.functional.normalize(product @ matrix)


if torch.cuda.is_available():  # a question to the driver's library; it opens no device here

    class Kernel(BaseModel):
        bytes: int = Field(1 << 30, ge=1, description="memory of the GPU to hold meanwhile")

    @ogpu.service.expose(timeout=5)
    def hang_kernel(data: Kernel) -> Digit:
        """Start a kernel that spins for hours, and wait for it in C, which no exception ends."""
        held = torch.zeros(data.bytes, dtype=torch.uint8, device=device)
        torch.cuda._sleep(SPINNING_CYCLES)  # noqa: SLF001 - PyTorch's own tests hang with it
        torch.cuda.synchronize()
        return Digit(digit=int(held[0]), probability=0)


def scaled(images: torch.Tensor) -> torch.Tensor:
    return images.float() / INK


if __name__ == "__main__":
    ogpu.service.start()
