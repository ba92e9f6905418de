"""A TensorFlow source: a small Keras network learns to read handwritten digits, then reads them.

TensorFlow does not promise to survive a fork, and once it has computed it does not. So the service
makes workers of fresh interpreters here, each of which imports this file, and says so in its log.
Nothing has to be set for that.
"""

from typing import Annotated

import numpy as np
import tensorflow as tf
from pydantic import BaseModel, Field
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ogpu.service

SEED = 0
EPOCHS = 8
INK = 16.0  # the darkest that a pixel can be

model: tf.keras.Model

Pixel = Annotated[float, Field(ge=0, le=INK)]


class Image(BaseModel):
    pixels: list[Pixel] = Field(
        min_length=64, max_length=64, description="8 x 8 pixels, row by row: 0 is paper, 16 is ink"
    )


class Digit(BaseModel):
    digit: int = Field(ge=0, le=9, description="the digit that it most likely is")
    probability: float = Field(ge=0, le=1, description="how likely, in the model's opinion")


class Nothing(BaseModel):
    pass


@ogpu.service.init()
def train() -> None:
    """Learn from four fifths of the data set; a real source loads its weights here."""
    global model  # noqa: PLW0603 - set once in each worker, before its first task
    tf.keras.utils.set_random_seed(SEED)
    images, held_out_images, digits, held_out_digits = train_test_split(
        *load_digits(return_X_y=True), test_size=0.2, random_state=SEED
    )
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input((8, 8, 1)),
            tf.keras.layers.Conv2D(32, 3, activation="relu", padding="same"),
            tf.keras.layers.Conv2D(32, 3, activation="relu"),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=tf.keras.optimizers.Adam(0.003),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(scaled(images), digits, epochs=EPOCHS, batch_size=32, verbose=0)
    _, accuracy = model.evaluate(scaled(held_out_images), held_out_digits, verbose=0)
    ogpu.service.logger.info(
        "%.1f %% of %d held-out digits are read correctly", 100 * accuracy, len(held_out_digits)
    )


@ogpu.service.expose(timeout=10)
def classify(data: Image) -> Digit:
    """Read one handwritten digit."""
    probabilities = model(scaled(np.array([data.pixels])), training=False).numpy()[0]
    digit = int(probabilities.argmax())
    return Digit(digit=digit, probability=float(probabilities[digit]))


@ogpu.service.expose(timeout=2)
def hang(data: Nothing) -> Digit:  # noqa: ARG001 - a handler takes a model
    """Loop for ever inside TensorFlow's runtime; it is there to be killed at its deadline."""
    count_for_ever()
    raise AssertionError("a loop without an end has ended")


@tf.function
def count_for_ever() -> tf.Tensor:
    return tf.while_loop(lambda _: True, lambda number: (number + 1,), (tf.constant(0.0),))[0]


def scaled(images: np.ndarray) -> np.ndarray:
    return (images / INK).reshape(-1, 8, 8, 1).astype("float32")


if __name__ == "__main__":
    ogpu.service.start()
