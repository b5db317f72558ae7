"""The small values that the registry takes and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelport_registry._json import JSON
from modelport_registry._manifest import Manifest
from modelport_registry._policy import RolloutPolicy
from modelport_registry._rollout import Ended, Rejection, Rollout

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs for one signature, and the outputs that a version must reproduce before it serves.

    Where the signature is batched, each row is an example; elsewhere the whole is one call.
    """

    signature: str
    """The signature's name."""
    inputs: Mapping[str, NDArray[Any]]
    """Every input by name."""
    outputs: Mapping[str, NDArray[Any]]
    """The outputs to compare, by name."""
    rtol: float = 1e-4
    """Relative tolerance."""
    atol: float = 1e-5
    """Absolute tolerance."""


@dataclass(frozen=True, slots=True)
class State:
    """What should be so: changed as a whole, one generation at a time."""

    generation: int = 0
    """Grows by one with every change; 0 before the first."""
    aliases: Mapping[str, int] = field(default_factory=dict[str, int])
    """Version numbers by alias."""
    collected: int = 0
    """The highest number that garbage collection removed: none up to it is given out again."""
    pin: int | None = None
    """The version that stays in charge whatever is published; None if versions are rolled out."""
    rollout: Rollout | None = None
    """The rollout under way."""
    last: Ended | None = None
    """How the last one ended."""
    promotions: Sequence[Ended] = ()
    """The latest ones that ended with their version in charge, oldest first: what there is to go back to."""
    rejected: Mapping[int, Rejection] = field(default_factory=dict[int, Rejection])
    """Versions that must not serve until they are approved by name."""
    considered: int = 0
    """The highest version that ever was a candidate."""
    policy: RolloutPolicy = field(default_factory=RolloutPolicy)
    """How versions come into service."""
    other: Mapping[str, JSON] = field(default_factory=dict[str, JSON], repr=False)
    """Fields that this code does not know, kept as they are."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One line of a model's journal."""

    time: datetime
    """UTC, by the writer's clock."""
    action: str
    """What was done, for example ``publish``."""
    version: int | None
    """The version it was done to, if to one."""
    actor: str
    """User and machine."""
    reason: str
    """Why, in words; may be empty."""
    details: Mapping[str, JSON]
    """Anything else: a change of the desired state has its ``new_generation``, and a version ``manifest_sha256``."""


@dataclass(frozen=True, slots=True)
class Published:
    """What a publish wrote."""

    model: str
    """The model's name."""
    version: int
    """The number that the version got."""
    path: Path
    """Its folder."""
    manifest: Manifest
    """Its manifest."""
    warnings: tuple[str, ...]
    """What the publisher should know, a line each."""


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What garbage collection removed, or would remove."""

    removed: Mapping[str, tuple[int, ...]]
    """Version numbers by model, ascending; models without any are left out."""
    leased: Mapping[str, tuple[int, ...]]
    """Old versions that were spared because a server holds them."""
    leftovers: int
    """Folders of publishes that never ended."""
    freed_bytes: int
    """Their size together."""
    dry_run: bool
    """Whether nothing was touched."""
