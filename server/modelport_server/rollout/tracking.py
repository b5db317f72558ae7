"""What a server knows of each version of a model."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic

from modelport_registry import Manifest
from modelport_server.gates.result import GateResult
from modelport_server.rollout.lifecycle import State
from modelport_server.rollout.policy import VersionSnapshot
from modelport_server.servable import Servable


@dataclass(eq=False, slots=True)
class Tracked:
    """One version and what has become of it."""

    version: int
    state: State = State.DISCOVERED
    reason: str = ""
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    since_s: float = field(default_factory=monotonic)
    in_registry: bool = True
    servable: Servable | None = None
    manifest: Manifest | None = None
    gates: tuple[GateResult, ...] = ()
    loading: asyncio.Task[None] | None = None
    failures: int = 0
    """How often it could not be read."""
    retry_at_s: float = 0.0
    """When it may be tried again, on the monotonic clock."""
    compared: str = ""
    """The rollout in which it was compared with the stable version."""
    comparing: bool = False
    accused: bool = False
    """Whether its rejection is on its way to the registry."""
    hold: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Keeps the version's folder from being collected while it is loaded."""

    def become(self, state: State, reason: str = "") -> None:
        """Changes the state."""
        self.state, self.reason = state, reason
        self.since, self.since_s = datetime.now(UTC), monotonic()

    @property
    def loaded(self) -> Servable:
        """Its servable, which it has."""
        assert self.servable is not None
        return self.servable

    def snapshot(self, now_s: float) -> VersionSnapshot:
        """Returns what the policy wants to know.

        Args:
            now_s: the time on the monotonic clock.
        """
        servable = self.servable
        return VersionSnapshot(
            state=self.state,
            leases=servable.leases if servable is not None else 0,
            streams=servable.streams if servable is not None else 0,
            age_s=now_s - self.since_s,
            in_registry=self.in_registry,
            put_off=now_s < self.retry_at_s,
            compared=self.compared,
            comparing=self.comparing,
            streams_ended=servable is not None and servable.retire_streams.is_set(),
            streams_ended_s=servable.retire_streams.age_s if servable is not None else 0.0,
        )
