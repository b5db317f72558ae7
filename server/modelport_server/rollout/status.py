"""What people and callers can know of the models: a board that the rollout writes and ``rpc`` reads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from modelport_registry import SignatureSpec
from modelport_server.rollout.policy import State


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


class StatusBoard:
    """The newest status of every model, and a way to wait for changes."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[int, ModelStatus | None]] = {}
        self._edition = 0
        self._changed = asyncio.Event()

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
