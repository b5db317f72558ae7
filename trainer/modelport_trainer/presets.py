"""Which network is trained, and how, under the name of a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from modelport_trainer.augmentation import Augmentation
from modelport_trainer.errors import OptionError
from modelport_trainer.model import AccurateNetwork, HyperParameters, Network
from modelport_trainer.training import OneCycle, TrainingOptions

PresetName = Literal["classic", "accurate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A network and how it is trained."""

    network: Network
    training: TrainingOptions
    fixed: frozenset[str] = frozenset()
    """Options of training that are not to be set beside this preset."""


PRESETS: dict[PresetName, Preset] = {
    "classic": Preset(network=HyperParameters(), training=TrainingOptions()),
    "accurate": Preset(
        network=AccurateNetwork(),
        training=TrainingOptions(
            optimizer="sgd",
            learning_rate=0.1,
            decay=1.0,
            epochs=13,
            batch_size=128,
            validation_split=0.05,
            patience=0,
            one_cycle=OneCycle(),
            augmentation=Augmentation(),
        ),
        fixed=frozenset({"loss", "optimizer", "decay", "patience"}),
    ),
}


def choose(
    name: PresetName, *, network: Mapping[str, Any] | None = None, training: Mapping[str, Any] | None = None
) -> tuple[Network, TrainingOptions]:
    """Returns a preset's network and training, with what is to be otherwise.

    Args:
        name: The preset.
        network: Fields of the network to replace.
        training: Fields of ``TrainingOptions`` to replace.

    Raises:
        OptionError: If there is no such preset, or it does not go with what is to be replaced.
    """
    if name not in PRESETS:
        raise OptionError(f"preset: {name!r} is none of {', '.join(PRESETS)}")
    preset, network, training = PRESETS[name], network or {}, training or {}
    strange = network.keys() - {field.name for field in fields(preset.network)} | training.keys() & preset.fixed
    if strange:
        raise OptionError(
            f"{', '.join(sorted(strange))}: cannot be set with the preset {name}, which has its own; leave it out"
        )
    return replace(preset.network, **network), replace(preset.training, **training)
