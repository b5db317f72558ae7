"""Any history of a model: whatever servers and people do to its desired state, it stays sound."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelport_registry import Phase, RegistryError, RolloutPolicy, State, Strategy
from modelport_registry import transitions as t
from modelport_registry._folder import MAX_STATE_BYTES
from modelport_registry._json import parse
from modelport_registry._state import read_state, state_json

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WHO: dict[str, Any] = {"now": NOW, "actor": "someone"}

numbers = st.integers(1, 6)
strategies = st.sampled_from(
    [
        (Strategy.IMMEDIATE,),
        (Strategy.CANARY,),
        (Strategy.SHADOW, Strategy.CANARY),
        (Strategy.MANUAL,),
        (Strategy.MANUAL, Strategy.CANARY),
    ]
)


class History(RuleBasedStateMachine):
    """One model, its versions, and everything that is done to it by somebody who sees the newest state."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.published = 0
        self.refusals: list[str] = []
        self.by_itself: list[int] = []
        """Versions that became candidates by themselves while there was a stable one."""

    @initialize(strategy=strategies)
    def begin(self, strategy: tuple[Strategy, ...]) -> None:
        self.state = t.set_policy(self.state, RolloutPolicy(strategy=strategy))

    def _do(self, transition: Callable[[State], State]) -> None:
        try:
            self.state = transition(self.state)
        except RegistryError as error:
            self.refusals.append(str(error))

    def _has(self, version: int) -> bool:
        return version <= self.published

    # What publishers and servers do.

    @precondition(lambda self: self.published < 6)
    @rule()
    def publish(self) -> None:
        self.published += 1

    @rule()
    def start_by_itself(self) -> None:
        found = t.candidate(self.state, range(1, self.published + 1))
        if found is None:
            return
        assert found not in self.state.rejected
        stable = self.state.aliases.get("stable")
        if stable is not None:
            assert found > stable
            assert found not in self.by_itself
            self.by_itself.append(found)
        self.state = t.start(self.state, found, rollout_id="r", **WHO)

    @rule()
    def advance(self) -> None:
        self._do(t.advance)

    @rule()
    def complete(self) -> None:
        self._do(lambda state: t.complete(state, NOW))

    @rule(version=numbers)
    def reject(self, version: int) -> None:
        self._do(lambda state: t.reject(state, version, "golden", "off", **WHO))

    # What people do.

    @rule(version=numbers)
    def start_by_name(self, version: int) -> None:
        if self._has(version):
            self._do(lambda state: t.start(state, version, rollout_id="r", **WHO))

    @rule(version=numbers)
    def approve(self, version: int) -> None:
        if self._has(version):
            self._do(lambda state: t.approve(state, version, rollout_id="r", **WHO))

    @rule()
    def promote(self) -> None:
        self._do(t.promote)

    @rule()
    def roll_back(self) -> None:
        self._do(lambda state: t.rollback(state, "", **WHO))

    @rule(act=st.sampled_from([t.pause, t.resume, t.unpin]))
    def steer(self, act: Callable[[State], State]) -> None:
        self._do(act)

    @rule(version=st.none() | numbers)
    def pin(self, version: int | None) -> None:
        if version is None or self._has(version):
            self._do(lambda state: t.pin(state, version, NOW))

    @rule(alias=st.sampled_from(["stable", "best"]), version=numbers)
    def point(self, alias: str, version: int) -> None:
        if self._has(version):
            self._do(lambda state: t.point(state, alias, version, NOW))

    @rule(alias=st.sampled_from(["stable", "best"]))
    def unpoint(self, alias: str) -> None:
        self._do(lambda state: t.unpoint(state, alias, NOW))

    @rule(strategy=strategies)
    def set_policy(self, strategy: tuple[Strategy, ...]) -> None:
        self._do(lambda state: t.set_policy(state, RolloutPolicy(strategy=strategy)))

    # What holds at any time.

    @invariant()
    def a_refusal_is_one_line(self) -> None:
        assert all(len(text) <= 1024 and "\n" not in text for text in self.refusals)

    @invariant()
    def the_version_in_charge_was_not_rejected(self) -> None:
        assert self.state.aliases.get("stable") not in self.state.rejected

    @invariant()
    def a_rollout_is_sound(self) -> None:
        rollout = self.state.rollout
        if rollout is None:
            return
        assert self.state.pin is None
        assert rollout.version not in self.state.rejected
        assert rollout.version <= self.state.considered
        assert rollout.previous != rollout.version
        stable = self.state.aliases.get("stable")
        assert (rollout.phase is Phase.WATCH) == (stable == rollout.version)
        assert (rollout.current is not None) == (rollout.phase is Phase.STEP)
        if rollout.phase is not Phase.WATCH:
            assert rollout.previous == stable
            assert stable is not None or not rollout.steps

    @invariant()
    def a_pin_is_in_charge_unless_it_was_rejected(self) -> None:
        pin = self.state.pin
        assert pin is None or pin in self.state.rejected or self.state.aliases.get("stable") == pin

    @invariant()
    def it_comes_back_as_it_was_written(self) -> None:
        data = state_json(self.state)
        assert len(data) < MAX_STATE_BYTES
        assert read_state(parse(data, "the state")) == self.state

    def teardown(self) -> None:
        """Whatever has happened, a rollout comes to its end by itself."""
        state = self.state
        for _ in range(20):
            if state.rollout is None:
                return
            state = t.complete(state, NOW) if state.rollout.phase is Phase.WATCH else t.advance(t.resume(state))
        raise AssertionError("the rollout goes on for ever")


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
