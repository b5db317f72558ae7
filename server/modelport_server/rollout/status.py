"""What people and callers can know of the models: a board that the rollout writes and ``rpc`` reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from modelport_registry import JSON, SignatureSpec
from modelport_server.engines.choice import Attempt
from modelport_server.engines.parallel import Parallelism
from modelport_server.gates.result import GateResult
from modelport_server.rollout.lifecycle import State


@dataclass(frozen=True, slots=True)
class SignatureStatus:
    """A signature as it is served."""

    spec: SignatureSpec
    batched: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionStatus:
    """One version."""

    version: int
    state: State
    reason: str
    since: datetime
    engine: str = ""
    engines: tuple[Attempt, ...] = ()
    """How each engine did that was tried."""
    parallelism: Parallelism | None = None
    """How many of its batches run at once; None until it is loaded."""
    max_batch_size: int = 0
    """The most rows that run together; 0 until it is loaded."""
    golden_examples: int = 0
    signatures: tuple[SignatureStatus, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model."""

    name: str
    serving: int | None
    aliases: Mapping[str, int]
    versions: tuple[VersionStatus, ...]
    """Highest first."""

    @property
    def settled(self) -> bool:
        """Whether a version serves, or none is on its way."""
        coming = (State.DISCOVERED, State.VERIFYING, State.LOADING, State.WARMING)
        return self.serving is not None or not any(version.state in coming for version in self.versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a version answered since the step of its rollout began."""

    calls: int
    errors: int
    calls_per_s: float
    """Over the last seconds."""
    p50_ms: float
    """Median time from a call's arrival to its answer, in milliseconds."""
    p99_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutVersion:
    """One version's part in a rollout."""

    version: int
    place: str
    """``stable``, ``candidate`` or ``previous``."""
    state: State
    share: float
    """The share of the calls that name no version, 0 to 1."""
    gates: tuple[GateResult, ...] = ()
    """Those that have ended, in their order."""
    traffic: Traffic | None = None
    """None while nothing is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStatus:
    """One step of a rollout's plan."""

    kind: str
    """``shadow`` or ``canary``."""
    share: float
    bake_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStatus:
    """A model's rollout as this server sees it."""

    model: str
    generation: int
    """Of the registry's desired state."""
    stable: int | None
    """The version in charge by the registry; None before the first."""
    pin: int | None = None
    id: str = ""
    """Empty if no rollout is under way; then phase, version, previous and steps are empty too."""
    phase: str = ""
    """``gates``, ``step`` or ``watch``."""
    version: int | None = None
    previous: int | None = None
    steps: tuple[StepStatus, ...] = ()
    step: int = 0
    """Index into ``steps`` while the phase is ``step``."""
    paused: bool = False
    phase_age_s: float = 0.0
    """How long this server has seen the present phase or step, in seconds."""
    bake_s: float = 0.0
    """How long the present step, or the watch, has to last at least, in seconds."""
    verdict: str = ""
    """What the comparison says for now, in one line for people."""
    figures: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    """The numbers behind the verdict."""
    versions: tuple[RolloutVersion, ...] = ()
    """Those that have a part in it, the stable one first."""
    last_version: int | None = None
    last_outcome: str = ""
    """``promoted``, ``rejected``, ``rolled back`` or ``replaced``; empty if there was none."""
    last_reason: str = ""
    rejected: Mapping[int, str] = field(default_factory=dict[int, str])
    """Every rejected version with gate and reason."""
    considered: int = 0
    """The highest version that ever was a candidate; 0 before the first."""


class StatusBoard:
    """The newest status of every model, and a way to wait for changes."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[int, ModelStatus | None]] = {}
        self._edition = 0
        self._changed = asyncio.Event()
        self.rollouts: dict[str, Callable[[], RolloutStatus]] = {}
        """How to ask for each model's rollout; kept up to date by the rollout's manager."""

    def rollout(self, name: str) -> RolloutStatus | None:
        """Returns a model's rollout as it is now; None if there is no such model."""
        found = self.rollouts.get(name)
        return found() if found is not None else None

    @property
    def edition(self) -> int:
        """Goes up with every change."""
        return self._edition

    def models(self) -> list[ModelStatus]:
        """Returns every model's status, by name."""
        return [status for _, (_, status) in sorted(self._models.items()) if status is not None]

    def model(self, name: str) -> ModelStatus | None:
        """Returns one model's status; None if there is no such model."""
        return self._models.get(name, (0, None))[1]

    def since(self, edition: int) -> list[tuple[str, ModelStatus | None]]:
        """Returns the models that have changed after ``edition``; None for one that is gone."""
        return [(name, status) for name, (at, status) in sorted(self._models.items()) if at > edition]

    def post(self, name: str, status: ModelStatus | None) -> None:
        """Takes a model's new status, None when it is gone, and wakes those who wait if it differs."""
        if self.model(name) == status:
            return
        self._edition += 1
        self._models[name] = (self._edition, status)
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, edition: int) -> None:
        """Returns as soon as there is something newer than ``edition``."""
        while self._edition <= edition:
            await self._changed.wait()
