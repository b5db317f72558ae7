"""The rollout's policy: what to do next about a model, as a pure function."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport_registry import Ended, Phase, Rejection, Rollout, RolloutPolicy, Step, StepKind, Strategy, transitions
from modelport_registry import State as Desired
from modelport_registry.transitions import STABLE, promotion
from modelport_server.rollout.comparison import Verdict, VerdictKind
from modelport_server.rollout.lifecycle import COMING, LOADED, State
from modelport_server.rollout.policy import (
    DECISIONS,
    LAST_CALLS_S,
    LONGEST_WATCH,
    STREAM_END_S,
    Action,
    ModelSnapshot,
    Verb,
    VersionSnapshot,
    aspired,
    charge,
    next_action,
    share,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
D, V, L, W, A, G, T, R = (
    State.DISCOVERED, State.VERIFYING, State.LOADING, State.WARMING,
    State.AVAILABLE, State.DRAINING, State.RETIRED, State.REJECTED,
)  # fmt: skip
HELD = VersionSnapshot(state=G, streams=1)
BUSY = VersionSnapshot(state=G, leases=1)
ALIASED = VersionSnapshot(state=A)
"""Loaded before it was a candidate."""
BAD = Rejection("golden", "off", NOW, "somebody")
STEPS = (Step(StepKind.CANARY, 0.1, 30.0), Step(StepKind.CANARY, 0.5, 30.0))
WORSE, FINE, WAITING, DOUBTFUL = (
    Verdict(kind, "because", {})
    for kind in (VerdictKind.WORSE, VerdictKind.FINE, VerdictKind.WAITING, VerdictKind.DOUBTFUL)
)


def _rollout(version: int, previous: int | None, phase: Phase = Phase.GATES, step: int = 0) -> Rollout:
    return Rollout(
        id="r", version=version, previous=previous, steps=STEPS, phase=phase, step=step, started=NOW, actor="somebody"
    )


def _desired(stable: int | None = None, rollout: Rollout | None = None, **more: object) -> Desired:
    """Returns a state in which every version up to the stable one has been a candidate."""
    aliases = {STABLE: stable} if stable is not None else {}
    considered = max(stable or 0, rollout.version if rollout is not None else 0)
    fields: dict[str, object] = {"aliases": aliases, "rollout": rollout, "considered": considered, **more}
    return replace(Desired(), **fields)  # type: ignore[arg-type]


def _model(
    versions: dict[int, State | VersionSnapshot],
    desired: Desired | None = None,
    serving: int | None = None,
    beside: int = 2,
    **more: object,
) -> ModelSnapshot:
    fields: dict[str, object] = {
        "versions": {
            n: VersionSnapshot(state=v, compared="r") if isinstance(v, State) else v for n, v in versions.items()
        },
        "desired": desired if desired is not None else _desired(serving),
        "serving": serving,
        "max_beside_stable": beside,
        "pinned_stream_limit_s": 60.0,
        **more,
    }
    return ModelSnapshot(**fields)  # type: ignore[arg-type]


IN_GATES = _desired(1, _rollout(2, 1))
IN_STEP = _desired(1, _rollout(2, 1, Phase.STEP))
IN_WATCH = _desired(2, _rollout(2, 1, Phase.WATCH))
PAUSED_WATCH = _desired(2, replace(_rollout(2, 1, Phase.WATCH), paused=True))
WATCHED_S = RolloutPolicy().watch_s
AFTER_A_BAD_ONE = _desired(
    2,
    promotions=(Ended(2, 1, "promoted", "", NOW),),
    last=Ended(3, 2, "rolled back", "", NOW),
    rejected={3: BAD},
)
WARM = _desired(2, promotions=(Ended(2, 1, "promoted", "", NOW),))


@pytest.mark.parametrize(
    ("snapshot", "action"),
    [
        (_model({}), None),
        # candidates
        (_model({1: D}), Action(Verb.START, 1)),
        (_model({1: D, 2: D}), Action(Verb.START, 2)),
        (_model({1: A, 2: D}, serving=1), Action(Verb.START, 2)),
        (_model({1: A, 2: D}, serving=1, deciding=True), None),
        (_model({1: A, 2: D, 3: D}, IN_GATES, serving=1), Action(Verb.LOAD, 2)),
        (_model({1: A, 2: A, 3: D}, IN_WATCH, serving=2), Action(Verb.START, 3)),
        (_model({1: A, 2: D}, _desired(1, pin=1), serving=1), None),
        (_model({1: A, 2: R}, _desired(1, rejected={2: BAD}), serving=1), None),
        (_model({1: A, 2: D}, _desired(1, policy=RolloutPolicy(strategy=(Strategy.MANUAL,))), serving=1), None),
        (_model({1: A, 2: VersionSnapshot(state=T, in_registry=False)}, serving=1), None),
        # the gates
        (_model({1: D, 2: D}, IN_GATES), Action(Verb.LOAD, 1)),
        (_model({1: A, 2: D}, IN_GATES, serving=1), Action(Verb.LOAD, 2)),
        (_model({1: A, 2: L}, IN_GATES, serving=1), None),
        (_model({1: A, 2: A}, IN_GATES, serving=1), Action(Verb.ADVANCE, 2)),
        (_model({1: A, 2: A}, _desired(1, replace(_rollout(2, 1), paused=True)), serving=1), None),
        (_model({1: A}, IN_GATES, serving=1), Action(Verb.ROLL_BACK, 2)),
        (_model({1: A}, IN_GATES, serving=1, listing_is_current=False), None),
        (_model({1: A, 2: ALIASED}, IN_GATES, serving=1), Action(Verb.COMPARE, 2)),
        (_model({1: A, 2: replace(ALIASED, comparing=True)}, IN_GATES, serving=1), None),
        (_model({1: A, 2: ALIASED}, IN_STEP, serving=1, verdict=FINE, phase_age_s=30), Action(Verb.COMPARE, 2)),
        (_model({1: A, 2: VersionSnapshot(state=D, put_off=True)}, IN_GATES, serving=1), None),
        # the steps
        (_model({1: A, 2: A}, IN_STEP, serving=1, verdict=FINE, phase_age_s=29), None),
        (_model({1: A, 2: A}, IN_STEP, serving=1, verdict=FINE, phase_age_s=30), Action(Verb.ADVANCE, 2)),
        (_model({1: A, 2: A}, IN_STEP, serving=1, verdict=WAITING, phase_age_s=999), None),
        (_model({1: A, 2: A}, IN_STEP, serving=1, verdict=DOUBTFUL, phase_age_s=999), None),
        (_model({1: A, 2: A}, IN_STEP, serving=1, phase_age_s=999), None),
        (_model({1: A, 2: L}, IN_STEP, serving=1, verdict=FINE, phase_age_s=30), None),
        (_model({1: A, 2: A}, IN_STEP, serving=1, verdict=WORSE), Action(Verb.ROLL_BACK, 2)),
        (_model({1: A, 2: A}, IN_STEP, serving=1, verdict=WORSE, deciding=True), None),
        # the watch
        (_model({1: A, 2: A}, IN_WATCH, serving=1), Action(Verb.SERVE, 2)),
        (_model({1: A, 2: A}, IN_WATCH, serving=2, phase_age_s=WATCHED_S - 1), None),
        (_model({1: A, 2: A}, IN_WATCH, serving=2, phase_age_s=WATCHED_S), Action(Verb.COMPLETE, 2)),
        (_model({1: A, 2: A}, IN_WATCH, serving=2, verdict=WORSE), Action(Verb.ROLL_BACK, 2)),
        (_model({1: A, 2: A}, IN_WATCH, serving=2, verdict=WAITING, phase_age_s=WATCHED_S), Action(Verb.COMPLETE, 2)),
        (_model({1: A, 2: A}, IN_WATCH, serving=2, verdict=DOUBTFUL, phase_age_s=WATCHED_S), None),
        (
            _model({1: A, 2: A}, IN_WATCH, serving=2, verdict=DOUBTFUL, phase_age_s=LONGEST_WATCH * WATCHED_S),
            Action(Verb.COMPLETE, 2),
        ),
        (_model({1: A, 2: A, 3: D}, PAUSED_WATCH, serving=2, verdict=FINE, phase_age_s=999), None),
        (_model({1: A, 2: A}, PAUSED_WATCH, serving=2, verdict=WORSE), Action(Verb.ROLL_BACK, 2)),
        (_model({1: T, 2: A}, IN_WATCH, serving=2), Action(Verb.LOAD, 1)),
        # the predecessor stays warm for a while
        (_model({1: A, 2: A}, WARM, serving=2, promoted_age_s=1.0), None),
        (_model({1: A, 2: A}, WARM, serving=2, promoted_age_s=RolloutPolicy().keep_warm_s), Action(Verb.DRAIN, 1)),
        (_model({1: A, 2: A}, WARM, serving=2), Action(Verb.DRAIN, 1)),
        (_model({1: T, 2: A}, WARM, serving=2, promoted_age_s=1.0), None),
        (_model({1: A, 2: A, 3: R}, AFTER_A_BAD_ONE, serving=2, promoted_age_s=1.0), None),
        # what goes
        (_model({1: A, 2: A}, serving=2), Action(Verb.DRAIN, 1)),
        (_model({1: HELD, 2: A}, serving=2), None),
        (_model({1: G, 2: A}, serving=2), Action(Verb.RETIRE, 1)),
        (_model({1: replace(HELD, age_s=61), 2: A}, serving=2), Action(Verb.END_STREAMS, 1)),
        (_model({1: replace(HELD, age_s=61, streams_ended=True), 2: A}, serving=2), None),
        (_model({1: replace(HELD, streams_ended=True, streams_ended_s=6), 2: A}, serving=2), Action(Verb.RETIRE, 1)),
        (_model({1: replace(BUSY, streams_ended=True, streams_ended_s=9), 2: A}, serving=2), None),
        (_model({1: BUSY, 2: A}, serving=2), None),
        (_model({1: A, 2: HELD}, _desired(1, rejected={2: BAD}), serving=1), Action(Verb.END_STREAMS, 2)),
        (_model({1: A, 2: L}, _desired(1, rejected={2: BAD}), serving=1), Action(Verb.ABANDON, 2)),
        (_model({1: A, 2: BUSY}, _desired(1, rejected={2: BAD}), serving=1), Action(Verb.END_STREAMS, 2)),
        (_model({1: A, 2: replace(BUSY, age_s=6)}, _desired(1, rejected={2: BAD}), serving=1), Action(Verb.RETIRE, 2)),
        # the registry decides who is in charge
        (_model({1: A, 2: A}, _desired(1, considered=2), serving=2), Action(Verb.SERVE, 1)),
        (_model({1: A, 2: A}, _desired(2, pin=1), serving=2), Action(Verb.SERVE, 1)),
        (_model({1: HELD, 2: A}, _desired(1, considered=2), serving=2), Action(Verb.REVIVE, 1)),
        (_model({1: T, 2: A}, _desired(1, considered=2), serving=2), Action(Verb.LOAD, 1)),
        (_model({1: A}, _desired(9), serving=1), None),
        (_model({1: A, 2: R}, _desired(2, pin=2, rejected={2: BAD}), serving=1), None),
        (_model({1: D, 2: R}, _desired(1, pin=2, rejected={2: BAD})), Action(Verb.LOAD, 1)),
        # an alias keeps what it names
        (_model({1: D, 2: A}, _desired(2, aliases={STABLE: 2, "old": 1}), serving=2), Action(Verb.LOAD, 1)),
        (_model({1: A, 2: A}, _desired(2, aliases={STABLE: 2, "old": 1}), serving=2), None),
        # a folder that is gone
        (_model({1: VersionSnapshot(state=A, in_registry=False)}, serving=1), None),
        # room beside the one in charge
        (_model({1: HELD, 2: HELD, 3: A, 4: D}, _desired(3, _rollout(4, 3)), 3), Action(Verb.END_STREAMS, 1)),
        (_model({1: HELD, 3: A, 4: D}, _desired(3, _rollout(4, 3)), 3), Action(Verb.LOAD, 4)),
        (_model({1: HELD, 3: A, 4: D}, _desired(3, _rollout(4, 3)), 3, beside=1), Action(Verb.END_STREAMS, 1)),
        (
            _model(
                {2: A, 3: A, 4: D},
                _desired(3, _rollout(4, 3), promotions=(Ended(3, 2, "promoted", "", NOW),)),
                3,
                beside=1,
                promoted_age_s=1.0,
            ),
            Action(Verb.DRAIN, 2),
        ),
    ],
)
def test_the_next_step(snapshot: ModelSnapshot, action: Action | None) -> None:
    assert next_action(snapshot) == action


def test_the_oldest_streams_are_ended_first() -> None:
    young, old = replace(HELD, age_s=5), replace(HELD, age_s=9)
    snapshot = _model({1: young, 2: old, 3: A, 4: D}, _desired(3, _rollout(4, 3)), serving=3)
    assert next_action(snapshot) == Action(Verb.END_STREAMS, 2)


def test_the_share_is_the_steps_own() -> None:
    assert share(_model({1: A, 2: A}, IN_STEP, serving=1)) == (2, StepKind.CANARY, 0.1)
    assert share(_model({1: A, 2: L}, IN_STEP, serving=1)) is None
    assert share(_model({1: A, 2: ALIASED}, IN_STEP, serving=1)) is None
    assert share(_model({1: A, 2: A}, IN_GATES, serving=1)) is None
    assert share(_model({1: A, 2: A}, IN_WATCH, serving=2)) is None


_version = st.builds(
    VersionSnapshot,
    state=st.sampled_from([D, T, V, L, W, A, G]),
    leases=st.integers(0, 2),
    streams=st.integers(0, 2),
    age_s=st.sampled_from([0.0, 100.0]),
    in_registry=st.booleans(),
    streams_ended=st.booleans(),
    streams_ended_s=st.sampled_from([0.0, 100.0]),
    compared=st.sampled_from(["", "r1", "r2", "r3"]),
)


@st.composite
def _snapshots(draw: st.DrawFn) -> ModelSnapshot:
    versions = draw(st.dictionaries(st.integers(1, 6), _version, max_size=6))
    desired = draw(_desires(sorted(versions)))
    versions = {
        n: replace(version, state=R) if n in desired.rejected and version.state in (D, T) else version
        for n, version in versions.items()
    }
    available = [n for n, version in versions.items() if version.state is A]
    return ModelSnapshot(
        versions=versions,
        desired=desired,
        serving=draw(st.sampled_from([None, *available])),
        max_beside_stable=draw(st.integers(1, 3)),
        pinned_stream_limit_s=60.0,
        phase_age_s=draw(st.sampled_from([0.0, 1000.0])),
        promoted_age_s=draw(st.sampled_from([0.0, 1000.0])),
        verdict=draw(st.sampled_from([None, WORSE, FINE, WAITING])),
    )


@st.composite
def _desires(draw: st.DrawFn, versions: list[int]) -> Desired:
    """Returns what a registry may ask for after any history."""
    desired = Desired()
    for verb in draw(st.lists(st.sampled_from(["start", "advance", "complete", "reject", "alias"]), max_size=8)):
        rollout = desired.rollout
        if verb == "start" and (found := transitions.candidate(desired, versions)) is not None:
            desired = transitions.start(desired, found, rollout_id=f"r{found}", now=NOW, actor="somebody")
        elif verb == "advance" and rollout is not None and rollout.phase is not Phase.WATCH:
            desired = transitions.advance(desired)
        elif verb == "complete" and rollout is not None and rollout.phase is Phase.WATCH:
            desired = transitions.complete(desired, now=NOW)
        elif verb == "reject" and rollout is not None:
            desired = transitions.reject(desired, rollout.version, "golden", "off", now=NOW, actor="somebody")
        elif verb == "alias" and versions:
            desired = replace(desired, aliases={**desired.aliases, "old": draw(st.sampled_from(versions))})
    return desired


def _beside(snapshot: ModelSnapshot) -> int:
    kept = {charge(snapshot), snapshot.serving, *snapshot.desired.aliases.values()}
    return sum(version.state in LOADED and n not in kept for n, version in snapshot.versions.items())


@given(_snapshots())
@settings(max_examples=400, deadline=None)
def test_a_step_never_hurts(snapshot: ModelSnapshot) -> None:
    action = next_action(snapshot)
    assert next_action(snapshot) == action
    if action is None or action.verb in DECISIONS:
        return
    version = snapshot.versions[action.version]
    serving = snapshot.serving
    if action.verb is Verb.SERVE:
        assert version.state is State.AVAILABLE
        assert action.version == charge(snapshot)
    if action.verb in (Verb.DRAIN, Verb.RETIRE, Verb.END_STREAMS):
        assert action.version != serving
        assert action.verb is Verb.DRAIN or version.state is State.DRAINING
    if action.verb is Verb.RETIRE:
        cut_off = action.version in snapshot.desired.rejected and version.age_s > LAST_CALLS_S
        assert version.leases == 0 or cut_off
        assert version.streams == 0 or version.streams_ended_s > STREAM_END_S or (cut_off and version.streams_ended)
    if action.verb is Verb.LOAD:
        assert not version.put_off
        assert version.state in (State.DISCOVERED, State.RETIRED)
        assert version.in_registry
        assert action.version not in snapshot.desired.rejected
        assert not any(other.state in COMING for other in snapshot.versions.values())
        kept = {charge(snapshot), *snapshot.desired.aliases.values()}
        assert action.version in kept or _beside(snapshot) < snapshot.max_beside_stable


@given(_snapshots())
@settings(max_examples=400, deadline=None)
def test_a_decision_has_its_grounds(snapshot: ModelSnapshot) -> None:
    action = next_action(snapshot)
    if action is None or action.verb not in DECISIONS:
        return
    rollout = snapshot.desired.rollout
    if action.verb is Verb.START:
        assert action.version not in snapshot.desired.rejected
        assert snapshot.versions[action.version].in_registry
        return
    assert rollout is not None
    assert rollout.version == action.version
    if action.verb is Verb.ROLL_BACK:
        assert snapshot.verdict is WORSE or action.version not in snapshot.versions
    if action.verb is Verb.ADVANCE:
        assert snapshot.versions[action.version].state is A
        assert snapshot.versions[action.version].compared == rollout.id
        assert rollout.phase is Phase.GATES or snapshot.verdict is FINE
    if action.verb is Verb.COMPLETE:
        assert rollout.phase is Phase.WATCH


def _after(snapshot: ModelSnapshot, action: Action) -> ModelSnapshot:
    """Returns the snapshot once an action has succeeded and every stream has ended that was asked to."""
    if action.verb in DECISIONS:
        return _decided(snapshot, action)
    version = snapshot.versions[action.version]
    rollout = snapshot.desired.rollout
    if rollout is not None and action.verb in (Verb.COMPARE, Verb.LOAD):
        version = replace(version, compared=rollout.id)
    if action.verb is Verb.COMPARE:
        return replace(snapshot, versions={**snapshot.versions, action.version: version})
    states = {
        Verb.LOAD: State.AVAILABLE,
        Verb.ABANDON: State.DISCOVERED,
        Verb.DRAIN: State.DRAINING,
        Verb.REVIVE: State.AVAILABLE,
        Verb.RETIRE: State.RETIRED,
    }
    if action.verb is Verb.SERVE:
        return replace(snapshot, serving=action.version)
    if action.verb is Verb.END_STREAMS:
        version = replace(version, streams_ended=True, leases=0, streams=0)
    else:
        ended = version.streams_ended and action.verb is Verb.DRAIN
        version = replace(version, state=states[action.verb], age_s=0.0, streams_ended=ended)
    return replace(snapshot, versions={**snapshot.versions, action.version: version})


def _decided(snapshot: ModelSnapshot, action: Action) -> ModelSnapshot:
    desired, number = snapshot.desired, action.version
    if action.verb is Verb.START:
        desired = transitions.start(desired, number, rollout_id=f"r{number}", now=NOW, actor="somebody")
    elif action.verb is Verb.ADVANCE:
        desired = transitions.advance(desired)
    elif action.verb is Verb.COMPLETE:
        desired = transitions.complete(desired, now=NOW)
    else:
        desired = transitions.reject(desired, number, "bake", "worse", now=NOW, actor="somebody")
    versions = {
        n: replace(v, state=R) if n in desired.rejected and v.state in (D, T) else v
        for n, v in snapshot.versions.items()
    }
    return replace(snapshot, desired=desired, versions=versions)


def _settled(snapshot: ModelSnapshot) -> ModelSnapshot:
    """Follows the policy to its end: loads end well, candidates do too, and in the end all streams go."""
    snapshot = replace(snapshot, verdict=FINE, phase_age_s=1000.0)
    for _ in range(200):
        action = next_action(snapshot)
        if action is not None:
            had_one = snapshot.serving is not None
            snapshot = _after(snapshot, action)
            assert not had_one or snapshot.serving is not None
            continue
        moved = {
            n: replace(v, state=State.AVAILABLE)
            if v.state in COMING
            else replace(v, leases=0, streams=0)
            if v.state is State.DRAINING
            else v
            for n, v in snapshot.versions.items()
        }
        if moved == snapshot.versions:
            return snapshot
        snapshot = replace(snapshot, versions=moved)
    raise AssertionError("the rollout does not come to an end")


@given(_snapshots())
@settings(max_examples=400, deadline=None)
def test_every_state_leads_to_the_version_that_is_wanted(snapshot: ModelSnapshot) -> None:
    end = _settled(snapshot)
    rollout = end.desired.rollout
    stuck = rollout is not None and not end.versions[rollout.version].in_registry  # loaded never, gone never
    assert rollout is None or stuck
    wanted = charge(end)
    target = end.versions.get(wanted) if wanted is not None else None
    if target is not None and target.state is not State.REJECTED and target.in_registry:
        assert end.serving == wanted
    kept = {end.serving, *aspired(end)}
    if (promoted := promotion(end.desired)) is not None and end.promoted_age_s < RolloutPolicy().keep_warm_s:
        kept.add(promoted.previous)
    assert all(n in kept for n, version in end.versions.items() if version.state in LOADED)


@given(st.integers(2, 12))
@settings(deadline=None)
def test_versions_in_quick_succession_are_coalesced(count: int) -> None:
    snapshot = _model({1: A}, serving=1)
    loads: list[int] = []
    for number in range(2, count + 1):
        snapshot = replace(snapshot, versions={**snapshot.versions, number: VersionSnapshot(state=D)})
        while (action := next_action(snapshot)) is not None:
            snapshot = _after(snapshot, action)
            if action.verb is Verb.LOAD:
                loads.append(action.version)
                coming = replace(snapshot.versions[action.version], state=V)
                snapshot = replace(snapshot, versions={**snapshot.versions, action.version: coming})
    assert loads == [2]  # the others wait until it is done
    assert _settled(snapshot).serving == count
