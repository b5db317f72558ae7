"""The only server killed at every step of a rollout: started again, it serves at once and brings it to its end."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelport_registry import Phase, Registry
from modelport_server.gates.result import GATES, GOLDEN
from tests.support.launch import program
from tests.support.load import Inputs, Load, LoadOptions, doubler_inputs, load
from tests.support.rollouts import Watched, canary_policy
from tests.support.server import ServerProcess, wait_for
from tests.support.stub_engine import hold_file, reached_file, stub_golden, write_stub

MODEL = "versioned"
POLICY = canary_policy((0.2, 1.0), (0.5, 1.0), watch_s=2.0, min_calls=20)
STEPS = len(POLICY.canary_steps)
ENDS = ("promoted", "rolled back")


@dataclass(slots=True)
class Stage:
    """A registry with a server that is killed and started again."""

    scratch: Path
    hold: Path
    port: int = 0
    server: ServerProcess | None = None
    moody: bool = False
    """Whether a third of the calls is such as a moody stub fails on."""

    def inputs(self, number: int) -> Inputs:
        """Returns a call's rows, which are above zero unless they are to spoil a moody stub's mood."""
        inputs = doubler_inputs(number)
        return {"x": -1 - inputs["x"]} if self.moody and number % 3 == 0 else inputs

    @property
    def watched(self) -> Watched:
        """What is asked of the registry."""
        return Watched(Registry(self.scratch / "registry"), MODEL, self.alive)

    @property
    def address(self) -> str:
        """Where the server is, each time."""
        return f"127.0.0.1:{self.port}"

    def alive(self) -> None:
        """Raises if the server has ended by itself."""
        assert self.server is not None
        self.server.alive()

    def start(self) -> None:
        """Starts the server, on the port that the first one got."""
        limits = program(stub=True, hold=self.hold)
        arguments = ("--poll-interval", "0.05")
        self.server = ServerProcess(self.scratch / "registry", self.scratch, arguments, self.port, limits)
        self.server.wait_listening()
        self.port = self.server.port

    def kill(self) -> None:
        """Ends the server at once."""
        assert self.server is not None
        assert self.server.stop(signal.SIGKILL) == -signal.SIGKILL

    def restart(self, *serving: int) -> None:
        """Starts the server again; what it first puts in charge must be one of ``serving``."""
        self.start()
        assert self.server is not None
        assert self.server.wait_serving(MODEL) in serving

    def publish(self, tag: int, *, moody: bool = False, golden: int | None = None) -> int:
        """Publishes a stub; one whose golden examples are those of another tag fails its golden gate."""
        source = write_stub(self.scratch / f"stub-{tag}", tag, moody=moody)
        examples = [stub_golden(tag if golden is None else golden)]
        return self.watched.registry.publish(MODEL, source, golden=examples).version

    def check_decided_once(self, version: int) -> None:
        """Raises if a decision about a version was written twice."""
        decisions = self.watched.decisions(version)
        for action in set(decisions) - {"step"}:
            assert decisions.count(action) == 1, decisions
        assert decisions.count("step") <= STEPS, decisions


@pytest.fixture
def stage(tmp_path: Path) -> Generator[Stage]:
    """A server of version 1, whose rollouts are canaries."""
    hold = tmp_path / "hold"
    hold.mkdir()
    stage = Stage(tmp_path, hold)
    stage.publish(1)
    stage.watched.registry.set_policy(MODEL, POLICY)
    stage.start()
    assert stage.watched.wait_over(1) == "promoted"
    yield stage
    assert stage.server is not None
    assert stage.server.stop() == 0
    log = stage.server.log.read_text()
    assert "Traceback" not in log, log[-4000:]


@contextmanager
def calling(stage: Stage) -> Generator[Load]:
    """Calls meanwhile; calls fail while there is no server, but no answer may be wrong."""
    options = LoadOptions(unary=16, pinned=0, followers=0, pause_s=0.01, attempts=5, inputs=stage.inputs)
    with load(stage.address, MODEL, options) as callers:
        yield callers
    assert callers.record.wrong == []
    assert callers.record.versions().keys() <= {1, 2}


@pytest.mark.parametrize("gate", GATES)
def test_killed_at_a_gate_that_it_passes(stage: Stage, gate: str) -> None:
    _kill_at(stage, gate, golden=2)
    assert stage.watched.wait_over(2) == "promoted"
    assert stage.watched.state.aliases["stable"] == 2
    stage.check_decided_once(2)


@pytest.mark.parametrize("gate", GATES[: GATES.index(GOLDEN) + 1])
def test_killed_before_the_gate_that_it_fails(stage: Stage, gate: str) -> None:
    _kill_at(stage, gate, golden=3)
    assert stage.watched.wait_rejected(2).gate == GOLDEN
    assert stage.watched.wait_over(2) == "rejected"
    assert stage.watched.state.aliases["stable"] == 1
    stage.check_decided_once(2)


def _kill_at(stage: Stage, gate: str, *, golden: int) -> None:
    """Kills the server while version 2 is at a gate, and starts it again; leaves callers enough to tell."""
    hold = hold_file(stage.hold, 2, gate)
    hold.touch()
    with calling(stage):
        stage.publish(2, golden=golden)
        wait_for(reached_file(stage.hold, 2, gate).exists, f"version 2 at {gate}", stage.alive)
        stage.kill()
        hold.unlink()
        stage.restart(1)
        stage.watched.wait(lambda state: state.rollout is None or state.rollout.phase is Phase.WATCH, "an end")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("step", range(STEPS))
def test_killed_in_a_step(stage: Stage, step: int, end: str) -> None:
    with calling(stage):
        stage.publish(2, moody=True)
        stage.watched.wait_phase(Phase.STEP, step)
        stage.kill()
        stage.moody = end == "rolled back"
        stage.restart(1)
        outcome = stage.watched.wait_over(2)
    assert outcome == end
    assert stage.watched.state.aliases["stable"] == (2 if end == "promoted" else 1)
    stage.check_decided_once(2)


@pytest.mark.parametrize("end", ENDS)
def test_killed_in_the_watch(stage: Stage, end: str) -> None:
    with calling(stage):
        stage.publish(2, moody=True)
        stage.watched.wait_phase(Phase.WATCH)
        stage.kill()
        stage.moody = end == "rolled back"
        stage.restart(2)
        assert stage.watched.wait_over(2) == end
    stage.check_decided_once(2)
    assert stage.watched.decisions(2).count("step") == STEPS


def test_killed_again_and_again(stage: Stage) -> None:
    with calling(stage):
        stage.publish(2)
        for phase, step in ((Phase.GATES, 0), *((Phase.STEP, step) for step in range(STEPS)), (Phase.WATCH, 0)):
            stage.watched.wait_phase(phase, step)
            stage.kill()
            stage.restart(1, 2)
        assert stage.watched.wait_over(2) == "promoted"
    stage.check_decided_once(2)
