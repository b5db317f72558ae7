"""A rollout as the registry keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from modelport_registry._policy import Step


class Phase(StrEnum):
    """How far a rollout is."""

    GATES = "gates"
    """Servers load the candidate and check it."""
    STEP = "step"
    """It is in one of the plan's steps."""
    WATCH = "watch"
    """It is in charge, and compared with what its predecessor did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A candidate on its way into service."""

    id: str
    """Any text that no other rollout has."""
    version: int
    """The candidate."""
    previous: int | None
    """The version that was in charge when it began."""
    steps: tuple[Step, ...]
    phase: Phase = Phase.GATES
    step: int = 0
    """Index of the present step while the phase is ``STEP``."""
    paused: bool = False
    started: datetime
    """UTC, by the clock of whoever started it."""
    actor: str
    """Who started it."""
    reason: str = ""
    baseline: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many calls the version before had in what is over of the rollout, and how many failed; empty for none."""

    @property
    def current(self) -> Step | None:
        """The present step; None in other phases."""
        return self.steps[self.step] if self.phase is Phase.STEP else None


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a version is not served."""

    gate: str
    """The gate that it failed; ``bake`` or ``rollback`` for what came after them, ``crash`` for a failing engine."""
    reason: str
    at: datetime
    actor: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How the last rollout ended."""

    version: int
    previous: int | None
    outcome: str
    """``promoted``, ``rejected``, ``rolled back`` or ``replaced``."""
    reason: str
    at: datetime
