"""What an engine process is told to load, and what it says once it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelport_registry import SignatureSpec, TensorSpec
from modelport_server.engines.kinds import FLOAT32, TENSORFLOW
from modelport_server.engines.parallel import ALONE, Parallelism
from modelport_server.gates.result import GateResult


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What an engine process should load."""

    root: Path
    model: str
    version: int
    largest: int
    """The largest batch that it will be given, in rows."""
    allow_ops: tuple[str, ...] = ()
    """Operations that the safety gate lets pass although it would refuse them."""
    baseline: Mapping[str, SignatureSpec] | None = None
    """The signatures of the version in charge; None without one, and then nothing is compared."""
    allow_signature_changes: bool = False
    """Whether the signatures may differ from the baseline in ways that break callers."""
    in_haste: bool = False
    """Whether it may load at the ordinary priority and on all cores, because nobody is served yet."""
    engine: str = TENSORFLOW
    """What runs it: one of ``kinds.ENGINES``."""
    precision: str = FLOAT32
    """What it computes in: one of ``kinds.PRECISIONS``."""
    parallelism: Parallelism | None = None
    """How many batches it runs at once, on how many threads; None: what suits most models."""

    def to_json(self) -> dict[str, Any]:
        """Returns it as the front sends it."""
        baseline = None if self.baseline is None else {name: asdict(spec) for name, spec in self.baseline.items()}
        return {
            "root": str(self.root),
            "model": self.model,
            "version": self.version,
            "largest": self.largest,
            "allow_ops": self.allow_ops,
            "baseline": baseline,
            "allow_signature_changes": self.allow_signature_changes,
            "in_haste": self.in_haste,
            "engine": self.engine,
            "precision": self.precision,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> LoadOrder:
        """Returns the order that the front sent."""
        baseline = document["baseline"]
        return cls(
            Path(document["root"]),
            document["model"],
            document["version"],
            document["largest"],
            tuple(document["allow_ops"]),
            None if baseline is None else {name: _signature(spec) for name, spec in baseline.items()},
            document["allow_signature_changes"],
            document["in_haste"],
            document["engine"],
            document["precision"],
        )


def _signature(document: Mapping[str, Any]) -> SignatureSpec:
    return SignatureSpec(document["name"], _tensors(document["inputs"]), _tensors(document["outputs"]))


def _tensors(documents: list[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(one["name"], one["dtype"], None if one["shape"] is None else tuple(one["shape"]))
        for one in documents
    )


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an engine process says once it can run batches."""

    engine: str
    golden_examples: int
    dependent: tuple[str, ...]
    """Signatures that look batched, but whose rows depend on each other."""
    gates: tuple[GateResult, ...] = field(default=())
    """What each gate found, in order."""
    parallelism: Parallelism = ALONE
    """How many batches it runs at once."""
    best_size: int = 0
    """The fewest rows with which batches are as fast as with any number, in rows per second; 0 if none ran."""
    efficient_size: int = 0
    """With how many rows a batch takes no more than half as long again per row as with any number; 0 if none ran."""
