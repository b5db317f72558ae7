"""What tests of rollouts ask of the registry, and how they wait for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from modelport_registry import (
    JournalEntry,
    Phase,
    Registry,
    Rejection,
    Rollout,
    RolloutPolicy,
    State,
    Step,
    StepKind,
    Strategy,
)
from tests.support.server import wait_for

AT_ONCE = RolloutPolicy(watch_s=0.0, keep_warm_s=0.0)
"""A version that has passed its gates takes over, and the one before it goes at once."""


def canary_policy(*steps: tuple[float, float], watch_s: float = 1.0, min_calls: int = 50) -> RolloutPolicy:
    """Returns a policy of canary steps, each a share and seconds."""
    return RolloutPolicy(
        strategy=(Strategy.CANARY,),
        canary_steps=tuple(Step(StepKind.CANARY, share, bake_s) for share, bake_s in steps),
        watch_s=watch_s,
        keep_warm_s=0.0,
        min_calls=min_calls,
    )


@dataclass(frozen=True, slots=True)
class Watched:
    """One model of a registry."""

    registry: Registry
    model: str
    check: Callable[[], None] = lambda: None
    """Raises if waiting has become senseless."""
    timeout_s: float = 120.0

    @property
    def state(self) -> State:
        """The desired state."""
        return self.registry.state(self.model)

    @property
    def rollout(self) -> Rollout:
        """The rollout under way."""
        rollout = self.state.rollout
        assert rollout is not None
        return rollout

    def wait(self, condition: Callable[[State], bool], what: str) -> State:
        """Returns the state once ``condition`` holds of it."""
        found: list[State] = []

        def holds() -> bool:
            found[:] = [self.state]
            return condition(found[0])

        try:
            wait_for(holds, what, self.check, self.timeout_s)
        except AssertionError as error:
            lines = "\n".join(f"{one.action} {one.version} {one.reason}" for one in self.journal()[-20:])
            raise AssertionError(f"{error}; the state is {self.state}, the journal ends\n{lines}") from error
        return found[0]

    def wait_phase(self, phase: Phase, step: int = 0, version: int | None = None) -> None:
        """Returns once a rollout is in a phase and step."""

        def reached(state: State) -> bool:
            assert version not in state.rejected, state.rejected
            one = state.rollout
            return one is not None and (one.phase, one.step) == (phase, step) and version in (None, one.version)

        self.wait(reached, f"{phase} {step}")

    def wait_rejected(self, version: int) -> Rejection:
        """Returns why a version was rejected, once it has been."""
        return self.wait(lambda state: version in state.rejected, f"{version} to be rejected").rejected[version]

    def wait_stable(self, version: int) -> None:
        """Returns once a version is in charge."""
        self.wait(lambda state: state.aliases.get("stable") == version, f"{version} to be stable")

    def wait_over(self, version: int) -> str:
        """Returns how the rollout of a version ended, once it has."""

        def over(state: State) -> bool:
            return state.rollout is None and state.last is not None and state.last.version == version

        last = self.wait(over, f"the rollout of {version} to end").last
        assert last is not None
        return last.outcome

    def journal(self, version: int | None = None, action: str = "") -> list[JournalEntry]:
        """Returns the journal's lines, of one version or action if asked for."""
        return [
            entry
            for entry in self.registry.journal(self.model)
            if version in (None, entry.version) and action in ("", entry.action)
        ]

    def decisions(self, version: int) -> list[str]:
        """Returns what was decided about a version, in order."""
        wanted = ("rollout started", "step", "promoted", "rollout completed", "rejected", "rolled back")
        return [entry.action for entry in self.journal(version) if entry.action in wanted]


def details(entry: JournalEntry) -> dict[str, Any]:
    """Returns what else a line of the journal says."""
    return cast("dict[str, Any]", dict(entry.details))
