"""Two servers on one registry: they share calls out alike, either can veto, and neither is needed."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from modelport import Client
from modelport_registry import Phase, Registry, RolloutPolicy
from tests.support.launch import program
from tests.support.load import Inputs, Load, LoadOptions, doubler_inputs, load
from tests.support.rollouts import Watched, canary_policy
from tests.support.server import ServerProcess, run_server, wait_for
from tests.support.stub_engine import stub_golden, write_stub

MODEL = "versioned"
STABLE, CANDIDATE = 1, 2
KEYS = [f"user-{number}" for number in range(400)]
POLL_S = 0.05
X = np.ones((1, 4), np.float32)
PHASES = [(Phase.GATES, 0), (Phase.STEP, 0), (Phase.STEP, 1), (Phase.WATCH, 0)]


@dataclass(slots=True)
class Stage:
    """Two servers of one registry."""

    scratch: Path
    watched: Watched
    servers: tuple[ServerProcess, ServerProcess]

    def publish(self, tag: int, *, moody: bool = False) -> None:
        """Publishes a stub."""
        source = write_stub(self.scratch / f"stub-{tag}", tag, moody=moody)
        self.watched.registry.publish(MODEL, source, golden=[stub_golden(tag)])

    def ways(self, server: ServerProcess) -> dict[str, int]:
        """Returns which version answers each key on a server."""
        with Client(server.address) as client:
            return {key: client.predict(MODEL, {"x": X}, routing_key=key).version for key in KEYS}


@contextmanager
def serving(tmp_path: Path, policy: RolloutPolicy) -> Generator[Stage]:
    """Serves version 1 twice."""
    registry = Registry(tmp_path / "registry")
    source = write_stub(tmp_path / "stub-1", 1)
    registry.publish(MODEL, source, golden=[stub_golden(1)])
    registry.set_policy(MODEL, policy)
    arguments = ("--poll-interval", f"{POLL_S}")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(run_server(registry.root, tmp_path / name, *arguments, program=program(stub=True)))
            for name in ("first", "second")
        ]
        watched = Watched(registry, MODEL)
        assert watched.wait_over(STABLE) == "promoted"
        for server in servers:
            server.wait_serving(MODEL, STABLE)
        yield Stage(tmp_path, watched, (servers[0], servers[1]))
    for server in servers:
        log = server.log.read_text()
        assert "Traceback" not in log, log[-4000:]


def healthy_inputs(number: int) -> Inputs:
    """Returns rows above zero."""
    return {"x": doubler_inputs(number)["x"] + 1}


def moody_inputs(number: int) -> Inputs:
    """Returns rows below zero, on which a moody version fails."""
    return {"x": -healthy_inputs(number)["x"]}


@contextmanager
def calling(server: ServerProcess, options: LoadOptions) -> Generator[Load]:
    """Calls one server meanwhile; no answer may be wrong."""
    with load(server.address, MODEL, options) as callers:
        yield callers
    assert callers.record.wrong == []


def test_the_same_key_goes_the_same_way_on_both(tmp_path: Path) -> None:
    with serving(tmp_path, canary_policy((0.5, 60.0))) as stage:
        stage.publish(CANDIDATE)
        stage.watched.wait_phase(Phase.STEP, 0, CANDIDATE)
        stage.watched.registry.pause_rollout(MODEL)
        first, second = stage.servers
        for server in stage.servers:
            wait_for(lambda server=server: CANDIDATE in stage.ways(server).values(), "the canary's share")  # type: ignore[misc]
        ways = stage.ways(first)
        assert stage.ways(second) == ways
        assert stage.ways(first) == ways
        shares = [list(ways.values()).count(version) / len(KEYS) for version in (STABLE, CANDIDATE)]
        assert shares == pytest.approx([0.5, 0.5], abs=0.13)  # five standard deviations of 400 keys


def test_keys_stay_with_the_canary_when_its_share_grows(tmp_path: Path) -> None:
    with serving(tmp_path, canary_policy((0.2, 0.5), (0.6, 600.0), min_calls=10)) as stage:
        stage.publish(CANDIDATE)
        stage.watched.wait_phase(Phase.STEP, 0, CANDIDATE)
        stage.watched.registry.pause_rollout(MODEL)
        first, second = stage.servers
        wait_for(lambda: CANDIDATE in stage.ways(first).values(), "the canary's share")
        before = {key for key, version in stage.ways(first).items() if version == CANDIDATE}
        stage.watched.registry.resume_rollout(MODEL)
        with calling(first, LoadOptions(inputs=healthy_inputs)):
            stage.watched.wait_phase(Phase.STEP, 1, CANDIDATE)
        wait_for(lambda: stage.ways(second) == stage.ways(first), "both servers to follow")
        after = {key for key, version in stage.ways(second).items() if version == CANDIDATE}
        assert before < after


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "second"])
def test_evidence_on_one_rolls_back_both(tmp_path: Path, bad: int) -> None:
    with serving(tmp_path, canary_policy((0.5, 600.0), min_calls=10)) as stage:
        stage.publish(CANDIDATE, moody=True)
        stage.watched.wait_phase(Phase.STEP, 0, CANDIDATE)
        harmed, other = stage.servers[bad], stage.servers[1 - bad]
        with calling(other, LoadOptions(inputs=healthy_inputs)) as healthy:
            healthy.wait_version(CANDIDATE)
            with calling(harmed, LoadOptions(inputs=moody_inputs)):
                stage.watched.wait_rejected(CANDIDATE)
            for server in stage.servers:
                wait_for(lambda server=server: set(stage.ways(server).values()) == {STABLE}, "both to go back")  # type: ignore[misc]
        assert healthy.record.failures == []
        assert stage.watched.decisions(CANDIDATE).count("rolled back") == 1
        assert stage.watched.state.aliases["stable"] == STABLE


@pytest.mark.parametrize("killed", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize(("phase", "step"), PHASES)
def test_either_may_be_killed_at_any_step(tmp_path: Path, phase: Phase, step: int, killed: int) -> None:
    policy = canary_policy((0.3, 1.0), (0.6, 1.0), watch_s=2.0, min_calls=20)
    with serving(tmp_path, policy) as stage:
        left, doomed = stage.servers[1 - killed], stage.servers[killed]
        failing = LoadOptions(inputs=healthy_inputs, pinned=0, followers=0)
        with calling(left, LoadOptions(inputs=healthy_inputs)) as callers, calling(doomed, failing):
            stage.publish(CANDIDATE)
            stage.watched.wait_phase(phase, step, CANDIDATE)
            doomed.stop(signal.SIGKILL)
            assert stage.watched.wait_over(CANDIDATE) == "promoted"
            callers.wait_version(CANDIDATE)
        assert callers.record.failures == []
        check_decided_once(stage.watched, CANDIDATE, steps=2)


def test_two_servers_decide_everything_once(tmp_path: Path) -> None:
    policy = canary_policy((0.3, 0.3), (0.6, 0.3), watch_s=0.3, min_calls=20)
    with serving(tmp_path, policy) as stage, ExitStack() as stack:
        records = [
            stack.enter_context(calling(server, LoadOptions(inputs=healthy_inputs))).record for server in stage.servers
        ]
        for version in range(2, 7):
            stage.publish(version)
            assert stage.watched.wait_over(version) == "promoted"
            check_decided_once(stage.watched, version, steps=2)
        assert [record.failures for record in records] == [[], []]


def check_decided_once(watched: Watched, version: int, steps: int) -> None:
    """Raises unless each decision about a version was written exactly once, in order."""
    expected = ["rollout started", *["step"] * steps, "promoted", "rollout completed"]
    assert watched.decisions(version) == expected
    reached = [(entry.details["phase"], entry.details["step"]) for entry in watched.journal(version, "step")]
    assert len(set(reached)) == len(reached)
