"""The models that are measured with, made by TensorFlow in a process of its own.

``small``   a convolutional classifier of 28x28 images, some 100,000 weights
``resnet``  ResNet-50 (He et al. 2015, as keras.applications has it), 25.6 million weights, random ones
``both``    the small one as ``serving_default`` and ResNet-50 beside it as ``resnet``
``classic`` the classic MNIST network, 1.2 million weights; made by itself
``light``   a single layer, which takes next to no time; made by itself

Each folder holds ``saved_model`` and, per signature, the golden examples as ``.npz``.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.stage import say
from modelport.names import DEFAULT_SIGNATURE
from modelport_registry import Golden

RESNET = "resnet"
CLASSIC = "classic"
LIGHT = "light"
IMAGE = (28, 28)
LARGE_IMAGE = (224, 224, 3)
_EXAMPLES = 8
_LAST = f"both/{RESNET}.npz"
_INPUTS, _OUTPUTS = "inputs.", "outputs."


def made(folder: Path, *, quick: bool = False) -> Path:
    """Returns the folder with all models, made if there are none yet.

    A process that ends makes them, so that this one stays free of TensorFlow.

    Args:
        folder: where they are, or where to make them.
        quick: make something small instead of ResNet-50.
    """
    if not (folder / _LAST).exists():
        _make(folder, *["--quick"] * quick)
    return folder


def classic(folder: Path) -> Path:
    """Returns the classic network's folder, made if there is none yet."""
    return _alone(folder, CLASSIC)


def light(folder: Path) -> Path:
    """Returns the folder of the network of one layer, made if there is none yet."""
    return _alone(folder, LIGHT)


def _alone(folder: Path, name: str) -> Path:
    if not (folder / name / "saved_model").exists():
        _make(folder, f"--{name}")
    return folder / name


def _make(folder: Path, *options: str) -> None:
    say("making the models")
    command = [sys.executable, "-m", "bench.models", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: the models can't be made: {done.stderr[-2000:]}")


def golden(folder: Path) -> list[Golden]:
    """Returns a model's golden examples."""
    return [_load(path) for path in sorted(folder.glob("*.npz"))]


def _load(path: Path) -> Golden:
    # Random weights give no sharp answers: what is near zero may differ by more than the default.
    with np.load(path) as arrays:
        inputs = {name.removeprefix(_INPUTS): arrays[name] for name in arrays if name.startswith(_INPUTS)}
        outputs = {name.removeprefix(_OUTPUTS): arrays[name] for name in arrays if name.startswith(_OUTPUTS)}
    return Golden(path.stem, inputs, outputs, rtol=1e-3, atol=1e-4)


def _library(name: str) -> Any:
    """Returns a library that has no types of its own."""
    return importlib.import_module(name)


def _small() -> Any:
    keras = _library("keras")
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(IMAGE),
            layers.Reshape((*IMAGE, 1)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def _light() -> Any:
    layers = _library("keras").layers
    inner = [layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(10, activation="softmax")]
    return _library("keras").Sequential([_library("keras").Input(IMAGE), *inner])


def _resnet(quick: bool) -> Any:
    keras = _library("keras")
    if not quick:
        return keras.applications.ResNet50(weights=None)
    layers = keras.layers
    return keras.Sequential([keras.Input(LARGE_IMAGE), layers.GlobalAveragePooling2D(), layers.Dense(10)])


def _save(folder: Path, parts: Mapping[str, Any], *, cast: bool = True) -> None:
    tf = _library("tensorflow")
    module = tf.Module()
    module.weights = [variable.value for part in parts.values() for variable in part.variables]  # as the trainer does
    signatures = {name: _signature(part, cast=cast) for name, part in parts.items()}
    tf.saved_model.save(module, str(folder / "saved_model"), signatures=signatures)
    for name, part in parts.items():
        images = np.random.default_rng(0).integers(0, 256, (_EXAMPLES, *part.input_shape[1:])).astype(np.uint8)
        outputs = signatures[name](tf.constant(images))
        named: dict[str, Any] = {_OUTPUTS + key: tensor.numpy() for key, tensor in outputs.items()}
        named[_INPUTS + "images"] = images
        np.savez(folder / f"{name}.npz", **named)


def _signature(part: Any, *, cast: bool) -> Any:
    tf = _library("tensorflow")

    def answer(images: Any) -> dict[str, Any]:
        return {"probabilities": part(tf.cast(images, tf.float32) if cast else images, training=False)}

    spec = tf.TensorSpec((None, *part.input_shape[1:]), tf.uint8, name="images")
    return tf.function(answer, input_signature=[spec]).get_concrete_function()


def main() -> None:
    """Makes all models in the folder that is given."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    keras = _library("keras")
    keras.utils.set_random_seed(1)
    folder = Path(sys.argv[1])
    if f"--{CLASSIC}" in sys.argv:
        from modelport_trainer.model import HyperParameters, build

        network = build(HyperParameters(), image_shape=IMAGE, classes=10)
        _save(folder / CLASSIC, {DEFAULT_SIGNATURE: network}, cast=False)
        return
    if f"--{LIGHT}" in sys.argv:
        _save(folder / LIGHT, {DEFAULT_SIGNATURE: _light()})
        return
    small, resnet = _small(), _resnet("--quick" in sys.argv)
    _save(folder / "small", {DEFAULT_SIGNATURE: small})
    _save(folder / "resnet", {DEFAULT_SIGNATURE: resnet})
    _save(folder / "both", {DEFAULT_SIGNATURE: small, RESNET: resnet})


if __name__ == "__main__":
    main()
