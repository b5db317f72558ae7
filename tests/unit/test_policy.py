"""The two policies, each a pure function: which rows run together, and what to do next about a model."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport_server.batching.calls import Call
from modelport_server.batching.policy import close_batch
from modelport_server.options import BatchLimits
from modelport_server.rollout.policy import (
    COMING,
    LOADED,
    STABLE,
    STREAM_END_S,
    Action,
    ModelSnapshot,
    State,
    Verb,
    VersionSnapshot,
    charge,
    next_action,
)
from tests.support.engines import new_call

LIMITS = BatchLimits(max_batch_size=4, max_batch_bytes=64)


@pytest.fixture
def loop() -> Generator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def _calls(loop: asyncio.AbstractEventLoop, *sizes: int, splittable: bool = True) -> list[Call]:
    return [new_call(list(range(size)), loop, splittable=splittable) for size in sizes]


def _closed(calls: list[Call], limits: BatchLimits = LIMITS, in_flight: int = 0) -> list[tuple[int, int, int]] | None:
    """Returns the batch as (index of the call, first row, row after the last)."""
    selection = close_batch(calls, limits, in_flight=in_flight)
    return None if selection is None else [(calls.index(call), start, stop) for call, start, stop in selection.parts]


def test_an_idle_engine_takes_whatever_waits(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1)) == [(0, 0, 1)]
    assert _closed(_calls(loop, 1, 2)) == [(0, 0, 1), (1, 0, 2)]
    assert _closed([]) is None


def test_a_busy_engine_gets_full_batches_alone(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1, 2), in_flight=1) is None
    assert _closed(_calls(loop, 1, 3), in_flight=1) == [(0, 0, 1), (1, 0, 3)]


def test_the_last_call_is_split_where_the_batch_is_full(loop: asyncio.AbstractEventLoop) -> None:
    calls = _calls(loop, 3, 5)
    assert _closed(calls) == [(0, 0, 3), (1, 0, 1)]
    calls[1].taken_rows = 1
    assert _closed(calls[1:]) == [(0, 1, 5)]


def test_bytes_bound_a_batch_too(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 4), replace(LIMITS, max_batch_bytes=16), in_flight=1) == [(0, 0, 2)]


def test_a_row_larger_than_a_batch_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1, 1), replace(LIMITS, max_batch_bytes=7)) == [(0, 0, 1)]
    assert _closed(_calls(loop, 2), replace(LIMITS, max_batch_bytes=7)) == [(0, 0, 1)]


def test_a_call_that_cant_be_split_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 9, 1, splittable=False)) == [(0, 0, 1)]
    assert _closed(_calls(loop, 1, splittable=False), in_flight=1) == [(0, 0, 1)]
    mixed = [*_calls(loop, 1), *_calls(loop, 1, splittable=False)]
    assert _closed(mixed, in_flight=1) == [(0, 0, 1)]


# ---- the rollout


def _model(
    versions: dict[int, State | VersionSnapshot],
    serving: int | None = None,
    beside: int = 2,
    **aliases: int,
) -> ModelSnapshot:
    return ModelSnapshot(
        versions={n: VersionSnapshot(state=v) if isinstance(v, State) else v for n, v in versions.items()},
        aliases=aliases,
        serving=serving,
        max_beside_stable=beside,
        pinned_stream_limit_s=60.0,
    )


D, V, L, W, A, G, T, R = (
    State.DISCOVERED, State.VERIFYING, State.LOADING, State.WARMING,
    State.AVAILABLE, State.DRAINING, State.RETIRED, State.REJECTED,
)  # fmt: skip
HELD = VersionSnapshot(state=G, streams=1)
BUSY = VersionSnapshot(state=G, leases=1)


@pytest.mark.parametrize(
    ("snapshot", "action"),
    [
        (_model({}), None),
        (_model({1: D}), Action(Verb.LOAD, 1)),
        (_model({1: D, 2: D}), Action(Verb.LOAD, 2)),
        (_model({1: D, 2: D}, stable=1), Action(Verb.LOAD, 1)),
        (_model({1: D, 2: V}), None),
        (_model({1: A}), Action(Verb.SERVE, 1)),
        (_model({1: A}, serving=1), None),
        (_model({1: A, 2: D}, serving=1), Action(Verb.LOAD, 2)),
        (_model({1: A, 2: L}, serving=1), None),
        (_model({1: A, 2: A}, serving=1), Action(Verb.SERVE, 2)),
        (_model({1: A, 2: A, 3: L}, serving=1), Action(Verb.SERVE, 2)),
        (_model({1: A, 2: A}, serving=2), Action(Verb.DRAIN, 1)),
        (_model({1: HELD, 2: A}, serving=2), None),
        (_model({1: G, 2: A}, serving=2), Action(Verb.RETIRE, 1)),
        (_model({1: T, 2: A}, serving=2), None),
        (_model({1: replace(HELD, age_s=61), 2: A}, serving=2), Action(Verb.END_STREAMS, 1)),
        (_model({1: replace(HELD, age_s=61, streams_ended=True), 2: A}, serving=2), None),
        (_model({1: replace(HELD, streams_ended=True, streams_ended_s=6), 2: A}, serving=2), Action(Verb.RETIRE, 1)),
        (_model({1: VersionSnapshot(state=G, leases=1), 2: A}, serving=2), None),
        (_model({1: VersionSnapshot(state=D, put_off=True)}), None),
        (_model({1: replace(HELD, streams_ended=True, streams_ended_s=9), 2: A}, serving=2), Action(Verb.RETIRE, 1)),
        (_model({1: replace(BUSY, streams_ended=True, streams_ended_s=9), 2: A}, serving=2), None),
        (_model({1: BUSY, 2: A}, serving=2), None),
        # a version that could not be read waits
        (_model({1: A, 2: VersionSnapshot(state=D, put_off=True)}, serving=1), None),
        # an alias decides who serves and keeps what it names
        (_model({1: A, 2: A}, serving=2, stable=1), Action(Verb.SERVE, 1)),
        (_model({1: A, 2: A}, serving=2, canary=1), None),
        (_model({1: D, 2: A}, serving=2, canary=1), Action(Verb.LOAD, 1)),
        (_model({1: D, 2: D}, canary=1), Action(Verb.LOAD, 2)),
        (_model({1: A, 2: D}, serving=1, stable=1), None),
        (_model({1: A}, serving=1, stable=9), None),
        (_model({1: D}, stable=9), None),
        (_model({1: HELD, 2: A}, serving=2, stable=1), Action(Verb.REVIVE, 1)),
        (_model({1: T, 2: A}, serving=2, stable=1), Action(Verb.LOAD, 1)),
        # rejected versions are remembered
        (_model({1: A, 2: R}, serving=1), None),
        (_model({1: T, 2: R}), Action(Verb.LOAD, 1)),
        (_model({1: R}), None),
        (_model({1: A, 2: R}, serving=1, stable=2), None),
        # a folder that is gone
        (_model({1: VersionSnapshot(state=A, in_registry=False)}, serving=1), None),
        (_model({1: VersionSnapshot(state=T, in_registry=False)}), None),
        # room beside the one in charge
        (_model({1: HELD, 2: HELD, 3: A, 4: D}, serving=3), Action(Verb.END_STREAMS, 1)),
        (_model({1: HELD, 3: A, 4: D}, serving=3), Action(Verb.LOAD, 4)),
        (_model({1: HELD, 3: A, 4: D}, serving=3, beside=1), Action(Verb.END_STREAMS, 1)),
    ],
)
def test_the_next_step(snapshot: ModelSnapshot, action: Action | None) -> None:
    assert next_action(snapshot) == action


def test_the_oldest_streams_are_ended_first() -> None:
    young, old = replace(HELD, age_s=5), replace(HELD, age_s=9)
    snapshot = _model({1: young, 2: old, 3: A, 4: D}, serving=3)
    assert next_action(snapshot) == Action(Verb.END_STREAMS, 2)


@pytest.mark.parametrize(
    ("snapshot", "version"),
    [
        (_model({}), None),
        (_model({1: A, 2: D}), 2),
        (_model({1: A, 2: R}), 1),
        (_model({1: A, 2: D}, stable=1), 1),
        (_model({1: A, 2: D}, stable=7), 7),
        (_model({1: A, 2: D}, canary=1), 2),
        (_model({1: A, 2: VersionSnapshot(state=T, in_registry=False)}, serving=1), 1),
        (_model({1: A, 2: VersionSnapshot(state=A, in_registry=False)}, serving=2), 2),
    ],
)
def test_who_should_be_in_charge(snapshot: ModelSnapshot, version: int | None) -> None:
    assert charge(snapshot) == version


_version = st.builds(
    VersionSnapshot,
    state=st.sampled_from(State),
    leases=st.integers(0, 2),
    streams=st.integers(0, 2),
    age_s=st.sampled_from([0.0, 100.0]),
    in_registry=st.booleans(),
    streams_ended=st.booleans(),
    streams_ended_s=st.sampled_from([0.0, 100.0]),
)


@st.composite
def _snapshots(draw: st.DrawFn) -> ModelSnapshot:
    versions = draw(st.dictionaries(st.integers(1, 6), _version, max_size=6))
    available = [n for n, version in versions.items() if version.state is State.AVAILABLE]
    return ModelSnapshot(
        versions=versions,
        aliases=draw(st.dictionaries(st.sampled_from([STABLE, "canary", "old"]), st.integers(1, 7), max_size=2)),
        serving=draw(st.sampled_from([None, *available])),
        max_beside_stable=draw(st.integers(1, 3)),
        pinned_stream_limit_s=60.0,
    )


def _beside(snapshot: ModelSnapshot) -> int:
    kept = {charge(snapshot), snapshot.serving, *snapshot.aliases.values()}
    return sum(version.state in LOADED and n not in kept for n, version in snapshot.versions.items())


@given(_snapshots())
@settings(max_examples=400, deadline=None)
def test_a_step_never_hurts(snapshot: ModelSnapshot) -> None:
    action = next_action(snapshot)
    assert next_action(snapshot) == action
    if action is None:
        return
    version = snapshot.versions[action.version]
    serving = snapshot.serving
    if action.verb is Verb.SERVE:
        assert version.state is State.AVAILABLE
    if action.verb in (Verb.DRAIN, Verb.RETIRE, Verb.END_STREAMS):
        assert action.version != serving
        assert action.verb is Verb.DRAIN or version.state is State.DRAINING
    if action.verb is Verb.RETIRE:
        assert version.leases == 0
        assert version.streams == 0 or version.streams_ended_s > STREAM_END_S
    if action.verb is Verb.LOAD:
        assert not version.put_off
        assert version.state in (State.DISCOVERED, State.RETIRED)
        assert version.in_registry
        assert not any(other.state in COMING for other in snapshot.versions.values())
        assert _beside(snapshot) < snapshot.max_beside_stable


def _after(snapshot: ModelSnapshot, action: Action) -> ModelSnapshot:
    """Returns the snapshot once an action has succeeded and every stream has ended that was asked to."""
    version = snapshot.versions[action.version]
    states = {
        Verb.LOAD: State.AVAILABLE,
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


def _settled(snapshot: ModelSnapshot) -> ModelSnapshot:
    """Follows the policy to its end: loads end well, and in the end all streams go."""
    for _ in range(100):
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
    wanted = charge(end)
    rejected = {n for n, version in snapshot.versions.items() if version.state is State.REJECTED}
    assert {n for n, version in end.versions.items() if version.state is State.REJECTED} == rejected
    target = end.versions.get(wanted) if wanted is not None else None
    if target is not None and target.state is not State.REJECTED and target.in_registry:
        assert end.serving == wanted
    kept = {end.serving, *end.aliases.values(), wanted}
    assert all(n in kept for n, version in end.versions.items() if version.state in LOADED)


@given(st.integers(2, 12))
@settings(deadline=None)
def test_versions_in_quick_succession_are_coalesced(count: int) -> None:
    snapshot = _model({1: A}, serving=1)
    loads: list[int] = []
    for number in range(2, count + 1):
        snapshot = replace(snapshot, versions={**snapshot.versions, number: VersionSnapshot(state=D)})
        action = next_action(snapshot)
        if action is not None:
            assert action.verb is Verb.LOAD
            loads.append(action.version)
            coming = replace(snapshot.versions[action.version], state=V)
            snapshot = replace(snapshot, versions={**snapshot.versions, action.version: coming})
    assert loads == [2]  # the others wait until it is done
    assert _settled(snapshot).serving == count
