"""Step 2, model: the classic convolutional network or the accurate one, from validated hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelport_trainer import _layers, _libraries
from modelport_trainer._checks import check_count, check_share
from modelport_trainer.errors import OptionError

_MOST_CONVOLUTIONS = 8
_MOST_FILTERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperParameters:
    """The shape of the classic network; image size and classes are not here, they come from the data."""

    filters: tuple[int, ...] = (32, 64)
    """Filters of each convolution, first to last."""
    kernel: int = 3
    """Side of a convolution's window, in pixels."""
    pool: int = 2
    """Side of the max-pool window after the last convolution, in pixels; 1 leaves the pool out."""
    pool_dropout: float = 0.25
    """Share of values dropped after the pool while training, 0 to below 1."""
    dense_units: int = 128
    """Units of the dense layer."""
    dense_dropout: float = 0.5
    """Share of values dropped after the dense layer while training, 0 to below 1."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.filters) <= _MOST_CONVOLUTIONS:
            raise OptionError(f"filters: give 1 to {_MOST_CONVOLUTIONS} numbers, not {len(self.filters)}")
        for count in self.filters:
            check_count("filters", count, highest=_MOST_FILTERS)
        check_count("kernel", self.kernel, highest=31)
        check_count("pool", self.pool, highest=31)
        check_count("dense_units", self.dense_units, highest=65_536)
        check_share("pool_dropout", self.pool_dropout, zero_allowed=True)
        check_share("dense_dropout", self.dense_dropout, zero_allowed=True)

    def check_fits(self, image_shape: tuple[int, int]) -> None:
        """Checks that images are large enough for the convolutions and the pool.

        Raises:
            OptionError: If they are not.
        """
        left = min(image_shape) - len(self.filters) * (self.kernel - 1)
        if left < self.pool:
            raise OptionError(
                f"{len(self.filters)} convolutions of {self.kernel} x {self.kernel} and a pool of "
                f"{self.pool} do not fit on images of {image_shape[0]} x {image_shape[1]} pixels"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AccurateNetwork:
    """The shape of the accurate network: stages of convolutions with batch normalisation, each ending in a pool."""

    stages: tuple[tuple[int, ...], ...] = ((16,), (48,), (96, 96))
    """Filters of the 3x3 convolutions of each stage; a stage halves both sides of the image."""
    dropout: float = 0.3
    """Share of values dropped before the last layer while training, 0 to below 1."""

    def __post_init__(self) -> None:
        if not 1 <= sum(map(len, self.stages)) <= _MOST_CONVOLUTIONS or not all(self.stages):
            raise OptionError(f"stages: give 1 to {_MOST_CONVOLUTIONS} convolutions, and none empty: {self.stages}")
        for count in (count for stage in self.stages for count in stage):
            check_count("stages", count, highest=_MOST_FILTERS)
        check_share("dropout", self.dropout, zero_allowed=True)

    def check_fits(self, image_shape: tuple[int, int]) -> None:
        """Checks that images are large enough for all the pools.

        Raises:
            OptionError: If they are not.
        """
        least = 2 ** len(self.stages)
        if min(image_shape) < least:
            raise OptionError(
                f"{len(self.stages)} stages, which halve an image each, do not fit on images of "
                f"{image_shape[0]} x {image_shape[1]} pixels; need {least} x {least}"
            )


Network = HyperParameters | AccurateNetwork
"""The shape of any network that can be built."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One line of a model's summary."""

    name: str
    kind: str
    output_shape: tuple[int | None, ...]
    parameters: int


def build(parameters: Network, *, image_shape: tuple[int, int], classes: int) -> Any:
    """Builds the untrained Keras model.

    It takes ``images`` uint8 ``[batch, height, width]`` and returns probabilities float32
    ``[batch, classes]``; scaling by 1/255 and the channel axis are layers of it.

    Raises:
        OptionError: If the images are too small for the parameters.
    """
    parameters.check_fits(image_shape)
    keras = _libraries.keras()
    layers = keras.layers
    images = keras.Input(image_shape, dtype="uint8", name="images")
    x = layers.Rescaling(1 / 255, name="scale")(images)
    x = layers.Reshape((*image_shape, 1), name="channel")(x)
    if isinstance(parameters, HyperParameters):
        x, name = _classic(x, parameters), "classic_cnn"
    else:
        x, name = _accurate(x, parameters), "accurate_cnn"
    probabilities = layers.Dense(classes, activation="softmax", name="probabilities")(x)
    return keras.Model(images, probabilities, name=name)


def _classic(x: Any, parameters: HyperParameters) -> Any:
    layers = _libraries.keras().layers
    for number, filters in enumerate(parameters.filters, start=1):
        x = layers.Conv2D(filters, parameters.kernel, activation="relu", name=f"conv_{number}")(x)
    if parameters.pool > 1:
        x = layers.MaxPool2D(parameters.pool, name="pool")(x)
    x = layers.Dropout(parameters.pool_dropout, name="pool_dropout")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(parameters.dense_units, activation="relu", name="dense")(x)
    return layers.Dropout(parameters.dense_dropout, name="dense_dropout")(x)


def _accurate(x: Any, parameters: AccurateNetwork) -> Any:
    layers = _libraries.keras().layers
    for number, stage in enumerate(parameters.stages, start=1):
        for place, filters in enumerate(stage, start=1):
            name = f"{number}_{place}"
            # The normalisation, which comes next, has a shift of its own.
            x = layers.Conv2D(
                filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"conv_{name}"
            )(x)
            if place == len(stage):
                # Before normalisation and ReLU, which then have a quarter to do.
                x = layers.MaxPool2D(2, name=f"pool_{number}")(x)
            x = _layers.batch_normalization(name=f"norm_{name}")(x)
            x = layers.ReLU(name=f"relu_{name}")(x)
    x = layers.Flatten(name="flatten")(x)
    return layers.Dropout(parameters.dropout, name="dropout")(x)


def summarize(model: Any) -> tuple[Layer, ...]:
    """Returns a model's layers in order, with output shapes and counts of parameters."""
    return tuple(
        Layer(layer.name, type(layer).__name__, tuple(layer.output.shape), int(layer.count_params()))
        for layer in model.layers
    )
