"""``client.rollouts`` against a server that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from modelport import (
    AsyncClient,
    Client,
    InputError,
    NotFoundError,
    RolloutError,
    RolloutPolicy,
    RolloutStep,
    RolloutTimeoutError,
    VersionRejectedError,
    VersionState,
)
from modelport._rollout_types import rollout_info
from modelport._rollouts import figures_text, phase_text
from modelport.progress import Teller
from modelport.v1 import model_pb2
from modelport.v1 import rollout_pb2 as pb
from tests.support.fake_server import FakeServer


def canary(**fields: Any) -> pb.RolloutStatus:
    """Version 2 gets a tenth of what version 1 had."""
    steps = [pb.RolloutStep(kind=pb.STEP_KIND_CANARY, share=share, bake_s=60) for share in (0.1, 0.5)]
    rollout = pb.Rollout(
        id="a", version=2, previous_version=1, steps=steps, phase=pb.PHASE_STEP, phase_age_s=3, bake_s=60
    )
    gate = pb.GateResult(gate="golden", outcome=pb.GATE_OUTCOME_PASSED, duration_s=0.5)
    gate.figures.update({"rows": 64, "worst": 0.25, "per_output": {"y": [1, None]}})
    available = model_pb2.ModelVersion.STATE_AVAILABLE
    traffic = pb.Traffic(calls=10, errors=1, calls_per_s=2.5, p50_ms=1, p99_ms=2)
    versions = [
        pb.RolloutVersion(version=1, place=pb.ROLLOUT_PLACE_STABLE, state=available, share=0.9, traffic=traffic),
        pb.RolloutVersion(version=2, place=pb.ROLLOUT_PLACE_CANDIDATE, state=available, share=0.1, gates=[gate]),
    ]
    return pb.RolloutStatus(
        model="m", generation=7, stable_version=1, rollout=rollout, versions=versions, verdict="fine", **fields
    )


async def test_a_status_as_values() -> None:
    last = pb.EndedRollout(version=1, outcome=pb.ROLLOUT_OUTCOME_ROLLED_BACK, reason="why")
    rejected = [pb.RejectedVersion(version=3, gate="load", reason="too slow")]
    async with (
        FakeServer(rollout=canary(last=last, rejected=rejected)) as server,
        AsyncClient(server.address) as client,
    ):
        info = await client.rollouts.get("m")
    assert (info.model, info.generation, info.stable, info.pinned, info.verdict) == ("m", 7, 1, None, "fine")
    assert info.rollout is not None
    assert (info.rollout.version, info.rollout.previous, info.rollout.phase) == (2, 1, "step")
    assert info.rollout.current == RolloutStep("canary", 0.1, 60)
    stable, candidate = info.versions
    assert (stable.place, stable.state, stable.share) == ("stable", VersionState.AVAILABLE, 0.9)
    assert stable.traffic is not None
    assert (stable.traffic.calls, stable.traffic.errors, stable.traffic.calls_per_s) == (10, 1, 2.5)
    assert info.candidate == candidate
    assert candidate.traffic is None
    (gate,) = candidate.gates
    assert (gate.gate, gate.outcome, gate.duration_s) == ("golden", "passed", 0.5)
    assert dict(gate.figures) == {"rows": 64, "worst": 0.25, "per_output": {"y": [1, None]}}
    assert isinstance(gate.figures["rows"], int)
    assert info.last is not None
    assert (info.last.version, info.last.outcome, info.last.reason) == (1, "rolled back", "why")
    assert (info.rejected[3].gate, info.rejected[3].reason) == ("load", "too slow")


async def test_values_of_a_newer_server_are_unknown() -> None:
    status = canary()
    status.rollout.phase = 99  # type: ignore[assignment]
    async with FakeServer(rollout=status) as server, AsyncClient(server.address) as client:
        info = await client.rollouts.get("m")
    assert info.rollout is not None
    assert info.rollout.phase == "unknown"


async def test_every_change_arrives_as_it_was_meant() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        rollouts = client.rollouts
        state = await rollouts.start("m", 2, strategy="shadow+canary", reason="new data", expected_generation=0)
        assert (state.generation, state.stable, state.candidate) == (1, 1, 2)
        await rollouts.pause("m", reason="lunch")
        await rollouts.resume("m")
        await rollouts.promote("m")
        await rollouts.rollback("m", expected_generation=4)
        await rollouts.approve("m", 2)
        await rollouts.pin("m")
        await rollouts.pin("m", 1)
        await rollouts.unpin("m")
        steps = (RolloutStep("canary", 0.05, 30),)
        await rollouts.set_policy("m", RolloutPolicy(strategy=("canary",), canary_steps=steps, min_calls=20))
        journal = await rollouts.journal("m")
    names = [name for name, _ in server.changes]
    assert names == [
        "StartRollout", "PauseRollout", "ResumeRollout", "PromoteRollout", "RollbackRollout",
        "ApproveVersion", "PinVersion", "PinVersion", "UnpinVersion", "SetPolicy",
    ]  # fmt: skip
    requests = [request for _, request in server.changes]
    assert list(requests[0].strategy) == [pb.STRATEGY_SHADOW, pb.STRATEGY_CANARY]
    assert (requests[0].version, requests[0].reason) == (2, "new data")
    assert requests[0].HasField("expected_generation")
    assert not requests[1].HasField("expected_generation")
    assert requests[4].expected_generation == 4
    assert [request.version for request in requests[6:8]] == [0, 1]
    policy = requests[-1].policy
    assert policy.min_calls == 20
    assert not policy.HasField("watch_s")
    assert policy.canary_steps[0].kind == pb.STEP_KIND_CANARY
    assert [entry.action for entry in journal[-2:]] == ["PauseRollout", "StartRollout"]
    assert journal[-2].reason == "lunch"


async def test_what_can_not_be_sent() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(InputError, match="no strategy 'fast'"):
            await client.rollouts.start("m", 2, strategy="canary+fast")
        with pytest.raises(InputError, match="the policy can't be sent"):
            await client.rollouts.set_policy("m", RolloutPolicy(canary_steps=(RolloutStep("jump", 1, 1),)))


async def test_a_policy_as_values() -> None:
    policy = pb.RolloutPolicy(strategy=[pb.STRATEGY_MANUAL, pb.STRATEGY_CANARY], watch_s=0, min_calls=3)
    async with FakeServer(policy=policy) as server, AsyncClient(server.address) as client:
        found = await client.rollouts.policy("m")
    assert found == RolloutPolicy(strategy=("manual", "canary"), watch_s=0, min_calls=3)


async def test_a_watch_outlives_its_connection() -> None:
    async with (
        FakeServer(rollout=canary()) as server,
        AsyncClient(server.address) as client,
        contextlib.aclosing(client.rollouts.watch("m")) as statuses,
    ):
        assert (await anext(statuses)).generation == 7
        await server.kill()
        server.rollout = canary(pinned_version=1)
        await server.start()
        assert (await anext(statuses)).pinned == 1


def test_the_blocking_client_has_the_same() -> None:
    public = {name for name in dir(AsyncClient("a:1").rollouts) if not name.startswith("_")}
    with Client("a:1") as client:
        assert public == {name for name in dir(client.rollouts) if not name.startswith("_")}


async def test_the_blocking_client_works() -> None:
    async with FakeServer(rollout=canary()) as server:

        def use() -> None:
            with Client(server.address) as client:
                rollouts = client.rollouts
                assert rollouts.get("m").generation == 7
                with contextlib.closing(rollouts.watch("m")) as statuses:
                    assert next(statuses).stable == 1
                assert rollouts.start("m", 2, reason="so").candidate == 2
                for change in (rollouts.pause, rollouts.resume, rollouts.promote, rollouts.rollback, rollouts.unpin):
                    change("m")
                rollouts.approve("m", 2)
                rollouts.pin("m", 1)
                rollouts.set_policy("m", rollouts.policy("m"))
                assert len(rollouts.journal("m")) == 9
                assert rollouts.wait_for_version("m", 1).stable == 1
                with pytest.raises(NotFoundError):
                    rollouts.get("n")

        await asyncio.to_thread(use)


async def test_waiting_ends_when_the_version_is_in_charge() -> None:
    told: list[str] = []
    server = FakeServer(rollout=canary())

    def on_progress(phase: str) -> None:
        told.append(phase)
        server.rollout = None
        server.serving = 2
        changes.append(asyncio.ensure_future(server.model_changed()))

    changes: list[asyncio.Future[None]] = []
    async with server, AsyncClient(server.address) as client:
        info = await client.rollouts.wait_for_version("m", 2, timeout_s=30, on_progress=on_progress)
    assert info.stable == 2
    assert told == ["step 1 of 2 (canary 10%): 3 s of 60 s", "it is in charge"]


@pytest.mark.parametrize(
    ("status", "policy", "text"),
    [
        (
            pb.RolloutStatus(rejected=[pb.RejectedVersion(version=2, gate="golden", reason="row 3")]), "IMMEDIATE",
            "m version 2 was rejected at the gate golden: row 3",
        ),
        (
            pb.RolloutStatus(rejected=[pb.RejectedVersion(version=2, gate="rollback", reason="slower")]), "IMMEDIATE",
            "m version 2 was rolled back: slower",
        ),
        (pb.RolloutStatus(pinned_version=1), "IMMEDIATE", "is pinned; take the pin off: modelport pin m --remove"),
        (pb.RolloutStatus(), "MANUAL", "the model's policy is manual; start it"),
        (pb.RolloutStatus(rollout=pb.Rollout(version=3)), "IMMEDIATE", "was passed over: version 3 goes before it"),
        (pb.RolloutStatus(stable_version=4), "IMMEDIATE", "was passed over: version 4 was tried before it"),
        (
            pb.RolloutStatus(
                stable_version=1, considered_version=3, rejected=[pb.RejectedVersion(version=3, gate="golden")]
            ), "IMMEDIATE",
            "was passed over: version 3 was tried before it; start it: modelport rollout start m 2",
        ),
        (
            pb.RolloutStatus(last=pb.EndedRollout(version=2, outcome=pb.ROLLOUT_OUTCOME_REPLACED)), "IMMEDIATE",
            "its rollout has ended, replaced",
        ),
    ],
)  # fmt: skip
async def test_waiting_in_vain_ends_with_why(status: pb.RolloutStatus, policy: str, text: str) -> None:
    status.model = "m"
    policies = pb.RolloutPolicy(strategy=[pb.Strategy.Value(f"STRATEGY_{policy}")])
    async with FakeServer(rollout=status, policy=policies) as server, AsyncClient(server.address) as client:
        with pytest.raises(RolloutError, match=text) as caught:
            await client.rollouts.wait_for_version("m", 2, timeout_s=30)
    assert isinstance(caught.value, VersionRejectedError) == (2 in {one.version for one in status.rejected})
    assert "\n" not in str(caught.value)


def step(calls: int | None, age_s: float, verdict: str = "", **fields: Any) -> pb.RolloutStatus:
    """Version 2 is in the first of two steps."""
    status = canary()
    status.verdict = verdict
    status.rollout.MergeFrom(pb.Rollout(**fields))
    status.rollout.phase_age_s = age_s
    if calls is not None:
        status.versions[1].traffic.calls = calls
    return status


def gates(state: model_pb2.ModelVersion.State.ValueType) -> pb.RolloutStatus:
    status = canary()
    status.rollout.phase = pb.PHASE_GATES
    status.versions[1].state = state
    return status


def watch() -> pb.RolloutStatus:
    status = canary()
    status.rollout.phase = pb.PHASE_WATCH
    status.stable_version = 2
    return status


@pytest.mark.parametrize(
    ("status", "version", "text"),
    [
        (step(34, 20.4), 2, "step 1 of 2 (canary 10%): 34 of 100 calls, 20 s of 60 s"),
        (step(34, 61), 2, "step 1 of 2 (canary 10%): 34 of 100 calls, 60 s are over"),
        (step(1034, 20, "fine"), 2, "step 1 of 2 (canary 10%): 1,034 calls, 20 s of 60 s"),
        (step(134, 61, "it may be worse"), 2, "step 1 of 2 (canary 10%): 134 calls, 60 s are over; it may be worse"),
        (step(None, 0), 2, "step 1 of 2 (canary 10%): 0 s of 60 s"),
        (step(34, 20, paused=True), 2, "step 1 of 2 (canary 10%), paused"),
        (gates(model_pb2.ModelVersion.STATE_LOADING), 2, "gates: loading"),
        (gates(model_pb2.ModelVersion.STATE_AVAILABLE), 2, "gates"),
        (
            step(34, 20), 3,
            "it waits for the rollout of version 2 to end: step 1 of 2 (canary 10%), 34 of 100 calls, 20 s of 60 s",
        ),
        (
            gates(model_pb2.ModelVersion.STATE_WARMING), 3,
            "it waits for the rollout of version 2 to end: gates, warming",
        ),
        (watch(), 3, "version 2 has just taken over and is watched; a server takes this one up next"),
        (watch(), 2, "it is in charge"),
    ],
)  # fmt: skip
def test_how_far_it_is_in_words(status: pb.RolloutStatus, version: int, text: str) -> None:
    info = rollout_info(status)
    teller = Teller(None, 5.0)
    teller.tell(phase_text(info, version), figures_text(info, version, min_calls=100))
    assert teller.text == text


def test_figures_are_told_now_and_then_and_phases_at_once() -> None:
    often: list[str] = []
    seldom: list[str] = []
    for told, every_s in ((often, 0.0), (seldom, 3600.0)):
        teller = Teller(told.append, every_s)
        for phase, figures in (("a", "1"), ("a", "2"), ("a", "2"), ("b", "1"), ("b", ""), ("c", "")):
            teller.tell(phase, figures)
        assert teller.text == "c"
    assert often == ["a: 1", "a: 2", "b: 1", "b", "c"]
    assert seldom == ["a: 1", "b: 1", "c"]


@pytest.mark.parametrize("waits", [canary(), pb.RolloutStatus(model="m", stable_version=1)])
async def test_waiting_has_its_time(waits: pb.RolloutStatus) -> None:
    async with FakeServer(rollout=waits) as server, AsyncClient(server.address) as client:
        with pytest.raises(RolloutTimeoutError, match=r"not in charge after 0.5 s: (step 1|it waits)"):
            await client.rollouts.wait_for_version("m", 2, timeout_s=0.5)


async def test_a_version_that_waits_for_its_turn() -> None:
    status = pb.RolloutStatus(model="m", stable_version=1, rollout=pb.Rollout(version=2, phase=pb.PHASE_GATES))
    async with FakeServer(rollout=status) as server, AsyncClient(server.address) as client:
        with pytest.raises(RolloutTimeoutError, match="it waits for the rollout of version 2 to end"):
            await client.rollouts.wait_for_version("m", 3, timeout_s=0.5)
