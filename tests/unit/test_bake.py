"""How long a phase of a rollout has been seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from modelport_registry import Phase, Rollout, RolloutPolicy, State
from modelport_server.rollout.bake import Bake

ROLLOUT = Rollout(
    id="r",
    version=2,
    previous=1,
    steps=RolloutPolicy().canary_steps,
    phase=Phase.STEP,
    started=datetime(2026, 1, 1, tzinfo=UTC),
    actor="somebody",
)


@dataclass
class Clock:
    """Time that passes when it is told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def _follow(bake: Bake, rollout: Rollout | None) -> None:
    bake.follow(replace(State(), rollout=rollout), {})


def test_a_pause_stops_the_clock_of_a_step() -> None:
    clock = Clock()
    bake = Bake(clock)
    _follow(bake, ROLLOUT)
    clock.now += 20.0
    assert bake.age_s == 20.0
    for _ in range(2):  # it is asked again and again meanwhile
        _follow(bake, replace(ROLLOUT, paused=True))
        clock.now += 500.0
        assert bake.age_s == 20.0
    _follow(bake, ROLLOUT)
    clock.now += 3.0
    assert bake.age_s == 23.0


def test_the_next_step_begins_anew_after_a_pause() -> None:
    clock = Clock()
    bake = Bake(clock)
    _follow(bake, replace(ROLLOUT, paused=True))
    clock.now += 50.0
    _follow(bake, replace(ROLLOUT, step=1))
    clock.now += 2.0
    assert bake.age_s == 2.0
    _follow(bake, None)
    assert bake.age_s == 0.0
