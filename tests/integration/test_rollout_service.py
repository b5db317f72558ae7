"""``modelport.v1.RolloutService`` over a real gRPC server: a board that the test fills, and a real registry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from modelport import (
    AbortedError,
    AsyncClient,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RolloutInfo,
    RolloutPolicy,
    RolloutStep,
    VersionRejectedError,
    VersionState,
)
from modelport.v1 import rollout_pb2, rollout_pb2_grpc
from modelport_registry import Registry, transitions
from modelport_server.gates.result import GateResult, Outcome
from modelport_server.http2.server import GrpcServer, Limits
from modelport_server.options import ServerOptions
from modelport_server.rollout.lifecycle import State
from modelport_server.rollout.status import RolloutStatus, RolloutVersion, StatusBoard, StepStatus, Traffic
from modelport_server.rpc.rollouts import RolloutService
from tests.support.saved_models import write_fake_saved_model
from tests.support.server import wait_for

GATES = (
    GateResult("integrity", Outcome.PASSED, 0.01, {"files": 3}),
    GateResult("speed", Outcome.SKIPPED, 0.0, {"ratio": float("nan"), "big": 2**60}, "there is nothing to compare"),
)
BUSY = RolloutStatus(
    model="m",
    generation=4,
    stable=1,
    id="x",
    phase="step",
    version=2,
    previous=1,
    steps=(StepStatus(kind="shadow", share=1.0, bake_s=5), StepStatus(kind="canary", share=0.1, bake_s=60)),
    step=1,
    phase_age_s=2.5,
    bake_s=60,
    verdict="fine so far",
    figures={"errors": {"stable": 0, "candidate": 1}},
    versions=(
        RolloutVersion(version=1, place="stable", state=State.AVAILABLE, share=0.9),
        RolloutVersion(
            version=2, place="candidate", state=State.AVAILABLE, share=0.1, gates=GATES,
            traffic=Traffic(calls=100, errors=1, calls_per_s=9.5, p50_ms=1.0, p99_ms=2.0),
        ),
    ),
    considered=2,
    last_version=1,
    last_outcome="rolled back",
    last_reason="bake: more errors",
    rejected={1: "bake: more errors: 5% against 0%"},
)  # fmt: skip
IDLE = RolloutStatus(model="m", generation=5, stable=2)


@dataclass
class Service:
    """A server of nothing but rollouts, of the model ``m`` with the versions 1 to 3."""

    folder: Path
    allow_changes: bool = True
    statuses: dict[str, RolloutStatus] = field(default_factory=dict[str, RolloutStatus])

    def __post_init__(self) -> None:
        self.registry = Registry(self.folder / "registry")
        self.board = StatusBoard()
        self.service = RolloutService(self.board, self.registry, allow_changes=self.allow_changes)
        self.address = f"unix:{self.folder}/socket"

    def publish(self) -> None:
        model = write_fake_saved_model(self.folder / "model")
        for _ in range(3):
            self.registry.publish("m", model)
        self.registry.change("m", lambda state: replace(state, aliases={"stable": 1}), action="test")

    def say(self, status: RolloutStatus) -> None:
        self.statuses[status.model] = status
        self.board.rollouts[status.model] = lambda: self.statuses[status.model]


@contextlib.asynccontextmanager
async def serving(folder: Path, **options: Any) -> AsyncGenerator[tuple[Service, AsyncClient]]:
    service = Service(folder, **options)
    await asyncio.to_thread(service.publish)
    server = GrpcServer(Limits(max_concurrent_calls=100))
    server.add_generic_rpc_handlers((service.service.handlers(),))
    await server.start(service.address)
    try:
        async with AsyncClient(service.address) as client:
            yield service, client
    finally:
        await server.stop()


async def test_a_status_arrives_whole(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, client):
        service.say(BUSY)
        info = await client.rollouts.get("m")
    assert (info.generation, info.stable, info.considered, info.verdict) == (4, 1, 2, "fine so far")
    assert dict(info.figures) == {"errors": {"stable": 0, "candidate": 1}}
    rollout = info.rollout
    assert rollout is not None
    assert (rollout.id, rollout.version, rollout.previous, rollout.phase, rollout.step) == ("x", 2, 1, "step", 1)
    assert (rollout.phase_age_s, rollout.bake_s, rollout.paused) == (2.5, 60, False)
    assert rollout.steps == (RolloutStep("shadow", 1.0, 5), RolloutStep("canary", 0.1, 60))
    candidate = info.candidate
    assert candidate is not None
    assert (candidate.state, candidate.share) == (VersionState.AVAILABLE, 0.1)
    integrity, speed = candidate.gates
    assert (integrity.outcome, dict(integrity.figures)) == ("passed", {"files": 3})
    assert (speed.outcome, speed.reason) == ("skipped", "there is nothing to compare")
    assert dict(speed.figures) == {"ratio": "nan", "big": str(2**60)}
    assert candidate.traffic is not None
    assert candidate.traffic.calls == 100
    assert info.last is not None
    assert (info.last.outcome, info.last.reason) == ("rolled back", "bake: more errors")
    assert (info.rejected[1].gate, info.rejected[1].reason) == ("bake", "more errors: 5% against 0%")


async def test_an_idle_model(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, client):
        service.say(IDLE)
        info = await client.rollouts.get("m")
    assert (info.rollout, info.last, info.versions, info.stable) == (None, None, (), 2)


async def test_models_that_are_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        with pytest.raises(NotFoundError, match="no model 'm' is served here; there is none yet"):
            await client.rollouts.get("m")
        with pytest.raises(NotFoundError, match="no model 'm' is served here; there is none yet"):
            await anext(client.rollouts.watch("m"))
        with pytest.raises(NotFoundError, match="there is no model 'n'"):
            await client.rollouts.pause("n")
        for wrong in ("", "../m", "M", "x" * 65):
            with pytest.raises(InvalidArgumentError, match="not a legal model name"):
                await client.rollouts.start(wrong, 1)
            with pytest.raises(InvalidArgumentError, match="not a legal model name"):
                await client.rollouts.get(wrong)
        with pytest.raises(NotFoundError, match="version 9"):
            await client.rollouts.start("m", 9)


async def test_the_whole_way_of_a_version(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, client):
        rollouts, registry = client.rollouts, service.registry
        state = await rollouts.start("m", 2, strategy="canary", reason="new data")
        assert (state.candidate, state.phase, state.stable) == (2, "gates", 1)
        assert state.generation == registry.state("m").generation
        assert (await rollouts.pause("m")).paused
        assert not (await rollouts.resume("m")).paused
        registry.change("m", transitions.advance, action="test")
        state = await rollouts.promote("m", reason="seen enough")
        assert (state.stable, state.candidate, state.phase) == (2, 2, "watch")
        state = await rollouts.rollback("m", reason="complaints")
        assert (state.stable, state.candidate) == (1, None)
        assert registry.state("m").rejected[2].gate == "rollback"
        state = await rollouts.approve("m", 2)
        assert state.candidate == 2
        await rollouts.rollback("m")
        state = await rollouts.pin("m")
        assert (state.pinned, state.stable) == (1, 1)
        assert (await rollouts.pin("m", 3)).pinned == 3
        assert (await rollouts.unpin("m")).pinned is None
        journal = await rollouts.journal("m", limit=9)
    assert len(journal) == 9
    assert journal[0].action == "unpinned"
    assert {entry.actor for entry in journal if entry.action != "test"} == {"grpc:unix:"}
    assert [entry.reason for entry in journal if entry.action == "rolled back"] == ["", "complaints"]


async def test_the_newest_lines_of_the_journal(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, client):
        for number in range(120):
            service.registry.record("m", "counted", version=1, reason=str(number), details={"n": number})
        newest = await client.rollouts.journal("m", limit=2)
        usual = await client.rollouts.journal("m")
    assert [(entry.reason, dict(entry.details)["n"]) for entry in newest] == [("119", 119), ("118", 118)]
    assert len(usual) == 100
    assert abs((newest[0].time - datetime.now(UTC)).total_seconds()) < 300


async def test_policies(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, client):
        default = await client.rollouts.policy("m")
        assert default.strategy == ("immediate",)
        assert default.canary_steps[0] == RolloutStep("canary", 0.01, 60)
        assert (default.allow_signature_changes, default.min_calls, default.watch_s) == (False, 100, 60)
        mine = replace(default, strategy=("shadow", "canary"), watch_s=0, allow_ops=("ReadFile",))
        await client.rollouts.set_policy("m", mine)
        assert await client.rollouts.policy("m") == mine
        assert service.registry.state("m").policy.watch_s == 0
        await client.rollouts.set_policy("m", RolloutPolicy(min_calls=5))
        assert await client.rollouts.policy("m") == replace(default, min_calls=5)
        with pytest.raises(FailedPreconditionError, match="min_agreement must be in 0"):
            await client.rollouts.set_policy("m", RolloutPolicy(min_agreement=2))


async def test_a_change_that_came_between_is_noticed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, client):
        generation = service.registry.state("m").generation
        await client.rollouts.start("m", 2, expected_generation=generation)
        with pytest.raises(AbortedError, match="someone changed it"):
            await client.rollouts.pause("m", expected_generation=generation)


async def test_what_makes_no_sense_now(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        with pytest.raises(FailedPreconditionError, match="no rollout is under way"):
            await client.rollouts.pause("m")
        with pytest.raises(FailedPreconditionError, match="in charge already"):
            await client.rollouts.start("m", 1)


async def test_paths_of_the_server_stay_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as (service, client):
        lock = service.registry.root / "m" / ".lock"
        lock.unlink()
        lock.mkdir()
        with pytest.raises(InternalError, match="can't use its registry: Is a directory") as caught:
            await client.rollouts.pause("m")
    assert str(tmp_path) not in str(caught.value)
    assert ".lock" in caplog.text


async def test_who_may_not_change_anything(tmp_path: Path) -> None:
    async with serving(tmp_path, allow_changes=False) as (service, client):
        service.say(IDLE)
        assert (await client.rollouts.get("m")).stable == 2
        assert (await client.rollouts.policy("m")).min_calls == 100
        before = service.registry.state("m")
        with pytest.raises(PermissionDeniedError, match="start it with --allow-control"):
            await client.rollouts.start("m", 2)
        assert service.registry.state("m") == before


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("127.0.0.1:0", True),
        ("127.8.8.8:1", True),
        ("[::1]:8500", True),
        ("localhost:8500", True),
        ("unix:/run/modelport.sock", True),
        ("0.0.0.0:8500", False),
        ("[::]:8500", False),
        ("10.0.0.7:8500", False),
        ("example.com:8500", False),
    ],
)
def test_changes_are_for_this_machine_unless_asked_for(address: str, allowed: bool) -> None:
    assert ServerOptions(registry=Path(), address=address).changes_allowed is allowed
    assert ServerOptions(registry=Path(), address=address, allow_control=True).changes_allowed


class TestWatch:
    async def test_tells_at_once_at_changes_and_every_second(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as (service, client):
            service.say(BUSY)
            async with contextlib.aclosing(client.rollouts.watch("m")) as statuses:
                assert (await anext(statuses)).generation == 4
                assert (await anext(statuses)).generation == 4  # nothing has changed; time has
                service.say(replace(BUSY, paused=True))
                assert await self._until(statuses, is_paused)
                service.say(IDLE)
                assert await self._until(statuses, is_idle)

    async def test_ends_with_the_model(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as (service, client):
            service.say(BUSY)
            async with contextlib.aclosing(client.rollouts.watch("m")) as statuses:
                await anext(statuses)
                del service.board.rollouts["m"]
                with pytest.raises(NotFoundError):
                    await self._until(statuses, is_idle)

    async def test_an_error_that_nobody_foresaw_stays_in_the_log(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving(tmp_path) as (service, client):
            service.say(replace(IDLE, last_version=1, last_outcome="lost"))
            with pytest.raises(InternalError, match=r"internal error [0-9a-f]{12}") as caught:
                await anext(client.rollouts.watch("m"))
        assert "LOST" not in str(caught.value)
        assert "LOST" in caplog.text

    async def test_ends_when_the_server_drains(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as (service, client):
            service.say(BUSY)
            async with grpc.aio.insecure_channel(service.address) as channel:
                stub: Any = rollout_pb2_grpc.RolloutServiceStub(channel)
                call = aiter(stub.WatchRollout(rollout_pb2.WatchRolloutRequest(model="m")))
                await anext(call)
                service.service.drain()
                async for _ in call:  # ends
                    pass
            assert (await client.rollouts.get("m")).generation == 4

    async def test_a_caller_that_leaves_takes_its_watch_along(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as (service, client):
            service.say(BUSY)
            for _ in range(20):
                async with contextlib.aclosing(client.rollouts.watch("m")) as statuses:
                    await anext(statuses)
            await asyncio.to_thread(wait_for, lambda: watches(service) == 0, "the watches to end")

    @staticmethod
    async def _until(statuses: AsyncGenerator[RolloutInfo, None], condition: Callable[[RolloutInfo], bool]) -> bool:
        async for info in statuses:
            if condition(info):
                return True
        return False


def is_paused(info: RolloutInfo) -> bool:
    return info.rollout is not None and info.rollout.paused


def is_idle(info: RolloutInfo) -> bool:
    return info.rollout is None


def watches(service: Service) -> int:
    internals: Any = service.service
    return len(internals._drain._listeners)


async def test_waiting_through_a_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, client):
        waiting = asyncio.create_task(client.rollouts.wait_for_version("m", 2, timeout_s=60))
        service.say(BUSY)
        service.say(IDLE)
        assert (await waiting).stable == 2
        service.say(replace(IDLE, rejected={3: "golden: row 7"}))
        with pytest.raises(VersionRejectedError) as caught:
            await client.rollouts.wait_for_version("m", 3, timeout_s=60)
        assert (caught.value.gate, caught.value.reason) == ("golden", "row 7")
