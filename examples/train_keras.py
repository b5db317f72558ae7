"""Publishes a Keras model of one's own, with two inputs of different types and two outputs.

python examples/train_keras.py models
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from modelport.exceptions import ModelportError
from modelport_registry import Lineage, Registry
from modelport_trainer.deployment import publish_keras

ITEMS = 50


def make_model() -> Any:
    """Returns a small model that rates an item for a user and says how likely the user is to like it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported
    import keras as untyped  # pyright: ignore[reportMissingTypeStubs]

    keras: Any = untyped
    user = keras.Input((3,), name="user")
    item = keras.Input((), dtype="int64", name="item")
    joined = keras.layers.Concatenate()([user, keras.layers.Embedding(ITEMS, 8)(item)])
    hidden = keras.layers.Dense(16, activation="relu")(joined)
    rating = keras.layers.Dense(1)(hidden)
    sureness = keras.layers.Dense(1, activation="sigmoid")(hidden)
    return keras.Model({"user": user, "item": item}, {"rating": rating, "sureness": sureness})


def main(registry: Path) -> None:
    """Trains for a moment on made-up ratings and publishes the result."""
    random = np.random.default_rng(0)
    users = random.normal(size=(512, 3)).astype(np.float32)
    items = random.integers(0, ITEMS, 512)
    ratings = users[:, :1] + items[:, None] / ITEMS
    inputs = {"user": users, "item": items}
    model = make_model()
    liked = (ratings > ratings.mean()).astype(np.float32)
    model.compile("adam", {"rating": "mse", "sureness": "binary_crossentropy"})
    history = model.fit(inputs, {"rating": ratings, "sureness": liked}, epochs=5, verbose=0).history

    published = publish_keras(
        Registry(registry),
        "ratings",
        model,
        {"user": users[:32], "item": items[:32]},
        metrics={"loss": float(history["loss"][-1])},
        lineage=Lineage(source="made up", parameters={"epochs": 5}),
    )
    print(f"published ratings/{published.version}, {published.manifest.golden} golden examples")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python train_keras.py REGISTRY")
    try:
        main(Path(sys.argv[1]))
    except ModelportError as error:
        sys.exit(f"error: {error}")
