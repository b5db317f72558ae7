"""How long a phase of a rollout has been seen, who is compared with whom in it, and how often."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from modelport_registry import Phase, Rollout, RolloutPolicy, State, Step, StepKind
from modelport_server.rollout import spare
from modelport_server.rollout.bake import Bake
from modelport_server.rollout.evidence import Outcome

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


@dataclass(eq=False)
class Fake:
    """What a bake needs of a servable."""

    version: int
    observers: tuple[Any, ...] = ()
    oldest_wait_s: float = 0.0
    pid: int = 0


SHADOWED = replace(ROLLOUT, steps=(Step(StepKind.SHADOW, 1.0, 60.0), *ROLLOUT.steps))
ANSWER = Outcome.ANSWERED


def _servables(*versions: int) -> dict[int, Any]:
    return {version: Fake(version) for version in versions}


def _state(rollout: Rollout) -> State:
    return replace(State(), rollout=rollout)


def _answer(servable: Any, count: int) -> None:
    for _ in range(count):
        servable.observers[0].evidence.on_call(ANSWER, 0.001)


class SlowClock(Clock):
    """Time that passes by itself, a bit at every look at it."""

    step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize(("took_s", "holds_s"), [(0.0, 0.2), (0.001, 0.5), (0.1, 1.2)])
def test_a_verdict_holds_for_as_long_as_comparing_is_dear(took_s: float, holds_s: float) -> None:
    clock = SlowClock()
    bake, servables = Bake(clock), _servables(1, 2)
    bake.follow(_state(ROLLOUT), servables)
    clock.step = took_s
    first = bake.verdict(_state(ROLLOUT))
    clock.step = 0.0
    began_s = clock.now - took_s
    clock.now = began_s + 0.95 * holds_s
    assert bake.verdict(_state(ROLLOUT)) is first
    clock.now = began_s + 1.05 * holds_s
    assert bake.verdict(_state(ROLLOUT)) is not first


def test_who_gets_copies_is_told_while_the_step_lasts() -> None:
    bake, servables = Bake(), _servables(1, 2)
    bake.follow(_state(SHADOWED), servables)
    assert bake.copied_to is servables[2]
    shadow = servables[1].observers[1]
    bake.follow(_state(SHADOWED), servables)
    assert servables[1].observers[1] is shadow
    again = {**servables, 2: Fake(2)}  # its engine was started anew
    bake.follow(_state(SHADOWED), cast("Any", again))
    assert bake.copied_to is again[2]
    bake.follow(_state(replace(SHADOWED, step=1)), cast("Any", again))
    assert bake.copied_to is None
    assert len(again[1].observers) == 1


def test_whether_there_is_a_core_to_spare_is_looked_up_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no call would ever be copied."""
    clock = Clock()
    monkeypatch.setattr(spare, "monotonic", clock)
    idle_s = 0.0
    monkeypatch.setattr(spare, "_idle_s", lambda: idle_s)
    bake, servables = Bake(), _servables(1, 2)
    bake.follow(_state(SHADOWED), servables)
    shadow = servables[1].observers[1]
    assert not shadow.has_time
    for free_cores, has_time in ((1.0, True), (0.2, False), (1.0, True)):
        clock.now += 0.25
        idle_s += 0.25 * free_cores
        bake.follow(_state(SHADOWED), servables)
        assert shadow.has_time == has_time
    clock.now += 5.0  # nobody has looked since
    assert not shadow.has_time


def test_the_watch_compares_with_the_whole_rollout() -> None:
    bake, servables = Bake(), _servables(1, 2)
    bake.follow(_state(ROLLOUT), servables)
    _answer(servables[1], 40)
    watched = replace(ROLLOUT, phase=Phase.WATCH, step=0, baseline={"calls": 5000, "failed": 7})
    bake.follow(_state(watched), servables)
    verdict = bake.verdict(_state(watched))
    assert verdict is not None
    assert (verdict.figures["stable_calls"], verdict.figures["stable_errors"]) == (5000, 7)
    late = Bake()  # a server that has not seen any of it
    late.follow(_state(watched), servables)
    verdict = late.verdict(_state(watched))
    assert verdict is not None
    assert verdict.figures["stable_calls"] == 5000


def test_without_anything_to_compare_with_there_is_no_verdict() -> None:
    bake, servables = Bake(), _servables(2)
    alone = replace(ROLLOUT, phase=Phase.WATCH, previous=None, steps=())
    bake.follow(_state(alone), servables)
    assert bake.verdict(_state(alone)) is None
