"""What may become of a model's desired state, one function at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import pytest

from modelport_registry import (
    JSON,
    Ended,
    Phase,
    RegistryError,
    Rejection,
    Rollout,
    RolloutPolicy,
    State,
    Step,
    StepKind,
    Strategy,
    parse_step,
    parse_strategy,
)
from modelport_registry import transitions as t

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BAD = Rejection("golden", "off by 3", NOW, "someone")
CANARY = RolloutPolicy(strategy=(Strategy.CANARY,))
MANUAL = RolloutPolicy(strategy=(Strategy.MANUAL,))
PROMOTED = Ended(2, 1, "promoted", "", NOW)

start = partial(t.start, rollout_id="r", now=NOW, actor="someone")
approve = partial(t.approve, rollout_id="r", now=NOW, actor="someone")
reject = partial(t.reject, gate="golden", reason="off by 3", now=NOW, actor="someone")
rollback = partial(t.rollback, reason="", now=NOW, actor="someone")
complete = partial(t.complete, now=NOW)
pin = partial(t.pin, now=NOW)


def _stable(version: int | None, **more: object) -> State:
    aliases = {} if version is None else {"stable": version}
    fields: dict[str, object] = {"aliases": aliases, "considered": version or 0, **more}
    return State(**fields)  # type: ignore[arg-type]


def _candidate(version: int, previous: int | None, phase: Phase = Phase.GATES, step: int = 0) -> State:
    """Returns a state with a canary under way."""
    begun = start(_stable(previous, policy=CANARY), version)
    assert begun.rollout is not None
    state = replace(begun, rollout=replace(begun.rollout, phase=phase, step=step))
    return replace(state, aliases={"stable": version}) if phase is Phase.WATCH else state


class TestCandidate:
    @pytest.mark.parametrize(
        ("state", "versions", "expected"),
        [
            (State(), [], None),
            (State(), [1], 1),
            (State(), [1, 2, 3], 3),
            (_stable(1), [1], None),
            (_stable(1), [1, 2, 4], 4),
            (_stable(4), [1, 2], None),
            (_stable(1, considered=3), [1, 2, 3], None),
            (_stable(1, considered=3), [1, 2, 3, 4], 4),
            (_stable(None, considered=3), [1, 2, 3], 3),
            (_stable(1, rejected={3: BAD}), [1, 2, 3], 2),
            (_stable(None, rejected={1: BAD}), [1], None),
            (_stable(None, rejected={3: BAD}, considered=3), [1, 2, 3], 2),
            (_stable(1, pin=1), [1, 2], None),
            (_stable(1, policy=MANUAL), [1, 2], None),
            (_stable(None, policy=MANUAL), [1, 2], None),
            (_candidate(2, 1), [1, 2, 3], None),
            (_candidate(2, 1, Phase.STEP), [1, 2, 3], None),
            (_candidate(2, 1, Phase.WATCH), [1, 2, 3], 3),
            (_candidate(2, 1, Phase.WATCH), [1, 2], None),
        ],
    )
    def test_it_is_the_newest_that_was_never_tried(
        self, state: State, versions: list[int], expected: int | None
    ) -> None:
        assert t.candidate(state, versions) == expected


class TestStart:
    def test_the_plan_is_the_policys(self) -> None:
        state = start(_stable(1, policy=CANARY), 2, reason="new data")
        assert state.rollout == Rollout(
            id="r",
            version=2,
            previous=1,
            steps=CANARY.canary_steps,
            started=NOW,
            actor="someone",
            reason="new data",
        )
        assert (state.considered, state.aliases) == (2, {"stable": 1})

    def test_another_strategy_can_be_asked_for(self) -> None:
        state = start(_stable(1), 2, strategy=(Strategy.SHADOW,))
        assert state.rollout is not None
        assert state.rollout.steps == (Step(StepKind.SHADOW, 1.0, 60.0),)
        with pytest.raises(RegistryError, match="immediate goes with no other"):
            start(_stable(1), 2, strategy=(Strategy.IMMEDIATE, Strategy.CANARY))

    def test_the_first_version_of_all_has_nothing_to_be_compared_with(self) -> None:
        state = start(_stable(None, policy=CANARY), 1)
        assert state.rollout is not None
        assert (state.rollout.steps, state.rollout.previous) == ((), None)

    def test_an_older_version_can_be_started_by_name(self) -> None:
        state = start(_stable(5), 3)
        assert (state.rollout and state.rollout.version, state.considered) == (3, 5)

    def test_it_ends_the_rollout_of_a_version_that_is_being_watched(self) -> None:
        state = start(_candidate(2, 1, Phase.WATCH), 3)
        assert (state.rollout and state.rollout.version, state.rollout and state.rollout.previous) == (3, 2)
        assert state.last == Ended(2, 1, "promoted", "", NOW)

    def test_a_watch_that_is_paused_holds_up_the_next(self) -> None:
        watched = _candidate(2, 1, Phase.WATCH)
        assert t.candidate(watched, [1, 2, 3]) == 3
        assert t.candidate(t.pause(watched), [1, 2, 3]) is None
        assert t.candidate(t.resume(t.pause(watched)), [1, 2, 3]) == 3

    def test_a_long_reason_is_cut(self) -> None:
        state = start(_stable(1), 2, reason="x" * 9999)
        assert state.rollout is not None
        assert len(state.rollout.reason) == 500

    @pytest.mark.parametrize(
        ("state", "version", "message"),
        [
            (_stable(1, rejected={2: BAD}), 2, r"version 2 was rejected \(golden: off by 3\): approve it first"),
            (_stable(2), 2, "version 2 is in charge already"),
            (_stable(1, pin=1), 2, "version 1 is pinned: take the pin off first, with modelport pin --remove"),
            (_candidate(2, 1), 3, "version 2 is being rolled out: wait for its end, or roll it back first"),
            (_candidate(2, 1, Phase.STEP), 3, "version 2 is being rolled out"),
            (_candidate(2, 1), 2, "version 2 is being rolled out"),
            (t.pause(_candidate(2, 1, Phase.WATCH)), 3, "the watch of version 2 is paused: let it go on first"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, state: State, version: int, message: str) -> None:
        with pytest.raises(RegistryError, match=message):
            start(state, version)


class TestAdvance:
    def test_from_the_gates_through_all_steps_into_charge(self) -> None:
        state = _candidate(2, 1)
        for step in range(3):
            state = t.advance(state)
            assert state.rollout is not None
            assert (state.rollout.phase, state.rollout.step) == (Phase.STEP, step)
            assert state.rollout.current == CANARY.canary_steps[step]
            assert state.aliases == {"stable": 1}
        state = t.advance(state)
        assert state.rollout is not None
        assert (state.rollout.phase, state.rollout.step, state.rollout.current) == (Phase.WATCH, 0, None)
        assert state.aliases == {"stable": 2}
        state = complete(state)
        assert (state.rollout, state.last) == (None, Ended(2, 1, "promoted", "", NOW))

    def test_what_the_version_before_did_is_added_up(self) -> None:
        state = _candidate(2, 1)
        for calls in (100, 900, 9_000, 50):
            state = t.advance(state, {"calls": calls, "failed": calls // 50, "caller_faults": 0})
        assert state.rollout is not None
        assert state.rollout.phase is Phase.WATCH
        assert state.rollout.baseline == {"calls": 10_050, "failed": 201}

    def test_what_another_version_did_is_not_the_baseline(self) -> None:
        state = t.advance(replace(_candidate(3, 2), promotions=(PROMOTED,)), {"calls": 1000, "failed": 900})
        put_back = reject(state, 2)
        assert put_back.rollout is not None
        assert (put_back.rollout.previous, put_back.rollout.baseline) == (1, {})
        alone = reject(t.advance(_candidate(3, 2), {"calls": 1000}), 2)
        assert alone.rollout is not None
        assert (alone.rollout.previous, alone.rollout.phase, alone.rollout.baseline) == (None, Phase.WATCH, {})

    def test_without_steps_the_gates_are_enough(self) -> None:
        state = t.advance(start(_stable(1), 2))
        assert state.aliases == {"stable": 2}
        assert state.rollout is not None
        assert state.rollout.phase is Phase.WATCH

    @pytest.mark.parametrize("act", [t.advance, t.promote])
    def test_what_is_in_charge_goes_no_further(self, act: Callable[[State], State]) -> None:
        with pytest.raises(RegistryError, match="version 2 is in charge already"):
            act(_candidate(2, 1, Phase.WATCH))

    @pytest.mark.parametrize("phase", [Phase.GATES, Phase.STEP])
    def test_what_is_not_in_charge_is_not_complete(self, phase: Phase) -> None:
        with pytest.raises(RegistryError, match="version 2 is not in charge yet"):
            complete(_candidate(2, 1, phase))

    @pytest.mark.parametrize("act", [t.advance, t.promote, complete, t.pause, t.resume])
    def test_nothing_comes_of_nothing(self, act: Callable[[State], State]) -> None:
        with pytest.raises(RegistryError, match="no rollout is under way"):
            act(_stable(1))


class TestPromote:
    def test_in_a_step_it_takes_over_at_once(self) -> None:
        state = t.promote(t.pause(_candidate(2, 1, Phase.STEP, 1)))
        assert state.aliases == {"stable": 2}
        assert state.rollout is not None
        assert (state.rollout.phase, state.rollout.paused) == (Phase.WATCH, False)

    def test_in_the_gates_it_drops_the_steps_and_no_gate(self) -> None:
        state = t.promote(_candidate(2, 1))
        assert state.aliases == {"stable": 1}
        assert state.rollout is not None
        assert (state.rollout.phase, state.rollout.steps) == (Phase.GATES, ())
        assert t.advance(state).aliases == {"stable": 2}


class TestReject:
    @pytest.mark.parametrize(
        ("phase", "outcome"),
        [(Phase.GATES, "rejected"), (Phase.STEP, "rolled back"), (Phase.WATCH, "rolled back")],
    )
    def test_it_ends_the_rollout_and_the_one_before_is_in_charge(self, phase: Phase, outcome: str) -> None:
        state = reject(_candidate(2, 1, phase), 2)
        assert (state.rollout, state.aliases, state.rejected) == (None, {"stable": 1}, {2: BAD})
        assert state.last == Ended(2, 1, outcome, "golden: off by 3", NOW)

    def test_again_it_changes_nothing(self) -> None:
        state = reject(_candidate(2, 1), 2)
        assert reject(state, 2) is state

    def test_of_a_version_that_has_no_part_in_anything(self) -> None:
        state = reject(_candidate(3, 2), 1)
        assert state == replace(_candidate(3, 2), rejected={1: BAD})

    def test_of_the_stable_version_after_its_rollout(self) -> None:
        state = reject(_stable(2, promotions=(PROMOTED,)), 2)
        assert (state.aliases, state.last) == ({"stable": 1}, Ended(2, 1, "rolled back", "golden: off by 3", NOW))

    @pytest.mark.parametrize(
        "state",
        [
            _stable(2, promotions=(PROMOTED,), rejected={1: BAD}),
            _stable(2),
            _stable(2, last=Ended(3, 2, "rolled back", "", NOW)),
            _candidate(2, None, Phase.WATCH),
        ],
    )
    def test_with_nothing_to_go_back_to_no_version_is_stable(self, state: State) -> None:
        rejected = reject(state, 2)
        assert (rejected.aliases, rejected.rollout) == ({}, None)

    def test_the_stable_version_gives_way_to_its_own_predecessor_under_a_candidate(self) -> None:
        state = reject(replace(_candidate(3, 2, Phase.STEP, 1), promotions=(PROMOTED,)), 2)
        assert state.aliases == {"stable": 1}
        assert state.rollout is not None
        assert (state.rollout.version, state.rollout.previous, state.rollout.phase) == (3, 1, Phase.STEP)

    def test_a_candidate_with_no_rival_left_needs_no_steps(self) -> None:
        in_gates = reject(_candidate(3, 2), 2)
        assert in_gates.rollout is not None
        assert (in_gates.aliases, in_gates.rollout.steps, in_gates.rollout.previous) == ({}, (), None)
        in_step = reject(_candidate(3, 2, Phase.STEP), 2)
        assert in_step.rollout is not None
        assert (in_step.aliases, in_step.rollout.phase) == ({"stable": 3}, Phase.WATCH)

    def test_a_pin_stays(self) -> None:
        state = reject(_stable(2, pin=2), 2)
        assert (state.pin, state.aliases, t.candidate(state, [1, 2, 3])) == (2, {}, None)

    def test_other_aliases_stay(self) -> None:
        state = reject(_stable(2, aliases={"stable": 2, "best": 2}), 2)
        assert state.aliases == {"best": 2}


class TestRollback:
    @pytest.mark.parametrize("phase", Phase)
    def test_under_way_it_rejects_the_candidate(self, phase: Phase) -> None:
        state = rollback(_candidate(2, 1, phase), reason="complaints")
        assert (state.rollout, state.aliases) == (None, {"stable": 1})
        assert state.rejected == {2: Rejection("rollback", "complaints", NOW, "someone")}

    def test_afterwards_it_puts_the_version_before_back(self) -> None:
        state = rollback(_stable(2, promotions=(PROMOTED,)))
        assert state.aliases == {"stable": 1}
        assert state.rejected[2].gate == "rollback"
        assert t.candidate(state, [1, 2]) is None

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (State(), "there is no version to go back to"),
            (_stable(2), "there is no version to go back to"),
            (_stable(3, promotions=(PROMOTED,)), "there is no version to go back to"),
            (_stable(2, last=Ended(3, 2, "rolled back", "", NOW)), "there is no version to go back to"),
            (
                _stable(2, promotions=(PROMOTED,), rejected={1: BAD}),
                "version 1, which was in charge before, was rejected",
            ),
            (_stable(2, promotions=(PROMOTED,), pin=2), "version 2 is pinned: pin another one instead"),
        ],
    )
    def test_into_the_unknown_is_refused(self, state: State, message: str) -> None:
        with pytest.raises(RegistryError, match=message):
            rollback(state)


def test_after_a_candidate_that_failed_there_is_still_a_way_back() -> None:
    state = t.complete(_candidate(2, 1, Phase.WATCH), NOW)
    state = reject(start(state, 3), 3)
    assert state.last is not None
    assert (state.last.version, state.aliases) == (3, {"stable": 2})
    assert rollback(state).aliases == {"stable": 1}


def test_the_way_back_is_as_long_as_the_way_there() -> None:
    state = _stable(1)
    for version in (2, 3, 4):
        state = t.complete(t.advance(start(state, version)), NOW)
    for version in (3, 2, 1):
        state = rollback(state)
        assert state.aliases == {"stable": version}
    with pytest.raises(RegistryError, match="there is no version to go back to"):
        rollback(state)


def test_the_way_back_passes_by_what_was_rejected_since() -> None:
    state = _stable(1)
    for version in (2, 3, 4):
        state = t.complete(t.advance(start(state, version)), NOW)
    state = reject(reject(state, 3), 2)
    assert state.aliases == {"stable": 4}
    assert rollback(state).aliases == {"stable": 1}
    with pytest.raises(RegistryError, match="version 3, which was in charge before, was rejected"):
        rollback(reject(state, 1))


def promoted(*versions: int) -> State:
    """Returns what is so after these have been put in charge one after another, each by a rollout."""
    state = _stable(versions[0])
    for version in versions[1:]:
        state = t.complete(t.advance(start(state, version)), NOW)
    return state


def test_the_way_back_never_leads_to_where_it_began() -> None:
    state = reject(promoted(1, 2, 3, 2), 3)
    with pytest.raises(RegistryError, match="version 3, which was in charge before, was rejected"):
        rollback(state)


def test_the_way_back_leads_past_what_was_collected() -> None:
    state = t.forget(promoted(1, 2, 3, 4), (3,))
    assert rollback(state).aliases == {"stable": 2}
    assert rollback(rollback(state)).aliases == {"stable": 1}
    state = t.forget(promoted(1, 2, 3, 2, 4), (3,))
    assert [(ended.version, ended.previous) for ended in state.promotions] == [(2, 1), (4, 2)]
    assert rollback(rollback(state)).aliases == {"stable": 1}
    assert t.forget(promoted(1, 2), ()).promotions == promoted(1, 2).promotions
    first = replace(PROMOTED, previous=None)
    assert t.forget(_stable(2, promotions=(first,)), (1,)).promotions == (first,)


def test_pause_and_resume() -> None:
    state = t.pause(_candidate(2, 1))
    assert state.rollout is not None
    assert state.rollout.paused
    assert t.pause(state) == state
    assert t.resume(state) == _candidate(2, 1)
    assert t.resume(_candidate(2, 1)) == _candidate(2, 1)


class TestApprove:
    def test_a_rejected_version_is_tried_again(self) -> None:
        state = approve(reject(_candidate(2, 1), 2), 2)
        assert state.rejected == {}
        assert state.rollout is not None
        assert (state.rollout.version, state.rollout.phase) == (2, Phase.GATES)

    def test_the_pinned_version_just_serves_again(self) -> None:
        state = approve(reject(_stable(2, pin=2), 2), 2)
        assert (state.rejected, state.rollout, state.pin) == ({}, None, 2)
        assert state.aliases == {"stable": 2}

    def test_the_pinned_version_takes_the_place_of_the_one_that_stood_in(self) -> None:
        state = reject(_stable(2, pin=2, promotions=(PROMOTED,)), 2)
        assert state.aliases == {"stable": 1}
        assert approve(state, 2).aliases == {"stable": 2}

    def test_a_manual_policy_starts_versions_so(self) -> None:
        state = approve(_stable(1, policy=MANUAL), 2)
        assert state.rollout is not None
        assert state.rollout.version == 2

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (_stable(1), "version 2 is not rejected: there is nothing to approve"),
            (_stable(1, rejected={2: BAD}, pin=1), "version 1 is pinned"),
            (replace(_candidate(3, 1), rejected={2: BAD}), "version 3 is being rolled out"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, state: State, message: str) -> None:
        with pytest.raises(RegistryError, match=message):
            approve(state, 2)


class TestPin:
    def test_the_present_version_by_default(self) -> None:
        assert pin(_stable(2), None) == _stable(2, pin=2)

    def test_another_version_takes_over(self) -> None:
        assert pin(_stable(2), 1) == replace(_stable(2, pin=1), aliases={"stable": 1})

    @pytest.mark.parametrize(("phase", "version", "outcome"), [
        (Phase.GATES, 1, "replaced"),
        (Phase.STEP, 2, "replaced"),
        (Phase.WATCH, 1, "replaced"),
        (Phase.WATCH, 2, "promoted"),
    ])  # fmt: skip
    def test_a_rollout_under_way_ends(self, phase: Phase, version: int, outcome: str) -> None:
        state = pin(_candidate(2, 1, phase), version)
        assert (state.rollout, state.pin, state.aliases) == (None, version, {"stable": version})
        assert state.last == Ended(2, 1, outcome, f"version {version} was pinned", NOW)

    def test_it_holds_until_it_is_off(self) -> None:
        state = pin(_stable(1), 1)
        assert t.candidate(state, [1, 2]) is None
        state = t.unpin(state)
        assert state == _stable(1)
        assert t.candidate(state, [1, 2]) == 2
        assert t.unpin(state) == state

    def test_what_makes_no_sense_is_refused(self) -> None:
        with pytest.raises(RegistryError, match="no version is in charge yet: name the one to pin"):
            pin(State(), None)
        with pytest.raises(RegistryError, match=r"version 2 was rejected .+ approve it first"):
            pin(_stable(1, rejected={2: BAD}), 2)


class TestAliases:
    def test_stable_is_a_pin(self) -> None:
        assert t.point(_stable(1), "stable", 2, NOW) == pin(_stable(1), 2)
        assert t.unpoint(pin(_stable(1), 2), "stable", NOW) == replace(_stable(1), aliases={})

    def test_another_alias_is_only_a_name(self) -> None:
        state = t.point(_candidate(2, 1), "best", 1, NOW)
        assert state == replace(_candidate(2, 1), aliases={"stable": 1, "best": 1})
        assert t.unpoint(state, "best", NOW) == _candidate(2, 1)

    def test_without_stable_nothing_is_watched_and_there_is_no_rival(self) -> None:
        watched = t.unpoint(_candidate(2, 1, Phase.WATCH), "stable", NOW)
        assert (watched.rollout, watched.last and watched.last.outcome) == (None, "replaced")
        in_gates = t.unpoint(_candidate(2, 1), "stable", NOW)
        assert in_gates.rollout is not None
        assert in_gates.rollout.steps == ()


def test_the_policy_leaves_a_rollout_under_way_as_it_is() -> None:
    state = t.set_policy(_candidate(2, 1), MANUAL)
    assert (state.policy, state.rollout) == (MANUAL, _candidate(2, 1).rollout)


class TestPolicy:
    def test_the_plan_follows_the_strategies_in_their_order(self) -> None:
        policy = RolloutPolicy(
            strategy=(Strategy.MANUAL, Strategy.SHADOW, Strategy.CANARY),
            canary_steps=(Step(StepKind.CANARY, 0.2, 5.0),),
            shadow_share=0.5,
            shadow_bake_s=7.0,
        )
        assert policy.manual
        assert policy.plan() == (Step(StepKind.SHADOW, 0.5, 7.0), Step(StepKind.CANARY, 0.2, 5.0))
        assert policy.plan((Strategy.IMMEDIATE,)) == ()
        assert RolloutPolicy().plan() == ()
        assert not RolloutPolicy().manual

    def test_it_comes_back_as_it_was_written(self) -> None:
        policy = RolloutPolicy(
            strategy=(Strategy.SHADOW, Strategy.CANARY),
            canary_steps=(Step(StepKind.CANARY, 0.2, 5.0),),
            watch_s=3.0,
            min_calls=7,
            allow_ops=("ReadFile",),
            allow_signature_changes=True,
        )
        assert RolloutPolicy.from_json({**policy.to_json(), "of_the_future": 1}) == policy
        assert RolloutPolicy().to_json() == {}

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"strategy": ()}, "a strategy is immediate, canary, shadow or manual"),
            ({"strategy": (Strategy.CANARY, Strategy.CANARY)}, "a strategy is"),
            ({"strategy": (Strategy.IMMEDIATE, Strategy.SHADOW)}, "immediate goes with no other"),
            ({"canary_steps": ()}, "canary_steps must be 1 to 100, not 0"),
            ({"canary_steps": (Step(StepKind.CANARY, 0.1, 1.0),) * 101}, "canary_steps must be 1 to 100"),
            ({"canary_steps": (Step(StepKind.SHADOW, 0.1, 1.0),)}, "canary_steps must be of the kind canary"),
            ({"shadow_share": 0.0}, "shadow_share must be in"),
            ({"watch_s": math.nan}, "watch_s must be in"),
            ({"keep_warm_s": math.inf}, "keep_warm_s must be in"),
            ({"min_calls": 0}, "min_calls must be in"),
            ({"min_calls": 10**400}, "min_calls must be in .+, not a huge number"),
            ({"max_latency_ratio": 0.9}, "max_latency_ratio must be in"),
            ({"min_agreement": 1.1}, "min_agreement must be in"),
        ],
    )
    def test_what_is_out_of_range_is_refused(self, fields: dict[str, object], message: str) -> None:
        with pytest.raises(RegistryError, match=message):
            RolloutPolicy(**fields)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("strategy", "canary"),
            ("strategy", ["fast"]),
            ("strategy", [1]),
            ("canary_steps", [0.1]),
            ("canary_steps", [{"kind": "canary", "share": "0.1", "bake_s": 1}]),
            ("watch_s", "60"),
            ("watch_s", True),
            ("min_calls", 1.5),
            ("min_calls", -1),
            ("max_speed_ratio", 10**400),
            ("allow_ops", "ReadFile"),
            ("allow_ops", [1]),
            ("allow_signature_changes", 1),
        ],
    )
    def test_what_cannot_be_read_is_named(self, name: str, value: JSON) -> None:
        with pytest.raises(RegistryError, match=f"{name}|share"):
            RolloutPolicy.from_json({name: value})

    def test_strategies_in_words(self) -> None:
        assert parse_strategy("shadow+canary") == (Strategy.SHADOW, Strategy.CANARY)
        assert parse_strategy(" Immediate ") == (Strategy.IMMEDIATE,)
        for text in ("", "fast", "canary+", "canary,shadow"):
            with pytest.raises(RegistryError, match="is no strategy: use immediate, canary, shadow, manual"):
                parse_strategy(text)

    def test_steps_in_words(self) -> None:
        assert parse_step("10%:60s") == Step(StepKind.CANARY, 0.1, 60.0)
        assert parse_step("0.5%:5m") == Step(StepKind.CANARY, 0.005, 300.0)
        assert parse_step("100%:1h") == Step(StepKind.CANARY, 1.0, 3600.0)
        for text in ("", "10%", "10:60s", "10%:60", "-1%:1s", "10%:1d", "1e1%:1s"):
            with pytest.raises(RegistryError, match="is no step: write a share and a time, such as 10%:60s"):
                parse_step(text)
        for text in ("0%:1s", "101%:1s"):
            with pytest.raises(RegistryError, match="a step's share must be above 0% and at most 100%"):
                parse_step(text)
        with pytest.raises(RegistryError, match="a step must last 0 s to 30 days"):
            parse_step("1%:721h")
