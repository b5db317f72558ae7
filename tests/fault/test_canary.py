"""Canaries that turn bad while they are watched are rolled back by themselves; healthy ones are promoted."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelport_registry import Phase, Registry, RolloutPolicy, Strategy
from tests.support.bad_versions import (
    FAILING,
    GOOD_CLASSES,
    HEAVY,
    MOODS,
    ONE_CLASS,
    REFUSING,
    SLOWING,
    STALLING,
    class_golden,
    doubler_golden,
)
from tests.support.load import ClassCalls, Load, LoadOptions, load
from tests.support.rollouts import Watched, canary_policy, details
from tests.support.server import ServerProcess, run_server, wait_for

MODEL = "classes"
STABLE, CANDIDATE = 1, 2
DEFAULTS = RolloutPolicy(strategy=(Strategy.CANARY,), watch_s=5.0, keep_warm_s=0.0)
"""The steps and limits that everybody has who sets none."""
ALL_CALLS = 120_000
"""How long a run is: minutes of what two cores manage."""
LONG_S = 1800.0
TOUCHED = 0.002
"""The most of all calls that a bad canary may get after it has turned bad."""
MOODY = {FAILING: 0.05, STALLING: 0.05, REFUSING: 0.05, SLOWING: 1.0, ONE_CLASS: 1.0}
"""Which share of the calls meets a candidate in its bad mood."""


def tag_of(version: int) -> int:
    """Returns which number a version answers: they take turns, so that neighbours differ."""
    return (version - 1) % 2 + 1


@dataclass(slots=True)
class Stage:
    """A server under load, whose model has a good stable version."""

    server: ServerProcess
    watched: Watched
    models: Path
    callers: ClassCalls
    load: Load

    def publish(self, name: str, tag: int = CANDIDATE) -> int:
        """Publishes a candidate."""
        registry = self.watched.registry
        return registry.publish(MODEL, self.models / name, golden=[class_golden(tag)]).version

    def serve_canary(self, least: int = 5) -> None:
        """Returns once the candidate has its first share of the calls and has answered ``least``, as the healthy do."""
        self.watched.wait_phase(Phase.STEP, 0, CANDIDATE)
        answers = self.load.record
        wait_for(lambda: answers.versions()[CANDIDATE] >= least, "the candidate's first answers", self.server.alive)


@contextmanager
def serving(
    tmp_path: Path, models: Path, policy: RolloutPolicy, *, unary: int = 24, pause_s: float = 0.005
) -> Generator[Stage]:
    """Serves the good classifier under load, with a policy."""
    watched = Watched(Registry(tmp_path / "registry"), MODEL, timeout_s=600)
    watched.registry.publish(MODEL, models / f"{GOOD_CLASSES}-1", golden=[class_golden(STABLE)])
    watched.registry.set_policy(MODEL, policy)
    callers = ClassCalls(tag_of, candidate=CANDIDATE)
    options = LoadOptions(
        unary=unary, pinned=0, followers=0, pause_s=pause_s, inputs=callers.inputs, check=callers.check
    )
    with run_server(watched.registry.root, tmp_path, "--threads", "1") as server:
        assert watched.wait_over(STABLE) == "promoted"
        with load(server.address, MODEL, options) as background:
            yield Stage(server, watched, models, callers, background)
    assert background.record.wrong == []
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bad", MOODS)
def test_a_canary_that_turns_bad_is_rolled_back(tmp_path: Path, bad_versions: Path, bad: str) -> None:
    with serving(tmp_path, bad_versions, DEFAULTS) as stage:
        stage.publish(bad)
        stage.serve_canary(40 if bad == SLOWING else 5)  # short batches: it has to be seen how long they usually take
        turned = stage.load.record.begun
        stage.callers.turn(MOODY[bad])
        rejection = stage.watched.wait_rejected(CANDIDATE)
        stage.load.wait(ALL_CALLS - stage.load.record.calls, LONG_S)
    record = stage.load.record
    touched = record.versions(turned)[CANDIDATE] + len(record.failures)
    check_rolled_back(stage)
    assert touched < TOUCHED * record.calls, rejection
    if bad in (SLOWING, ONE_CLASS):
        assert record.failures == []


def check_rolled_back(stage: Stage) -> None:
    """Raises unless the candidate was rolled back for its evidence, with the numbers in the journal."""
    state = stage.watched.state
    assert state.aliases["stable"] == STABLE
    assert state.rollout is None
    assert state.last is not None
    assert (state.last.version, state.last.outcome) == (CANDIDATE, "rolled back")
    (entry,) = stage.watched.journal(CANDIDATE, "rolled back")
    assert entry.reason
    assert details(entry)["phase"] == "step"


def check_promoted(stage: Stage, version: int, steps: int) -> None:
    """Raises unless a version went through all steps, each decided once and for a reason."""
    expected = ["rollout started", *["step"] * steps, "promoted", "rollout completed"]
    assert stage.watched.decisions(version) == expected
    taken = [details(entry)["step"] for entry in stage.watched.journal(version, "step")]
    assert taken == [0, *range(steps - 1)]
    assert stage.load.record.failures == []


def test_a_canary_that_fails_is_rolled_back(tmp_path: Path, bad_versions: Path) -> None:
    policy = canary_policy((0.1, 5.0), (0.5, 5.0), min_calls=20)
    with serving(tmp_path, bad_versions, policy, unary=8, pause_s=0.01) as stage:
        stage.publish(FAILING)
        stage.serve_canary()
        stage.callers.turn(0.3)
        assert stage.watched.wait_rejected(CANDIDATE).gate == "bake"
        stage.load.wait(100)
        check_rolled_back(stage)
        first = stage.load.record.begun
        stage.load.wait(100)
        assert stage.load.record.versions(first).keys() == {STABLE}
        assert stage.load.record.failed(first) == []


QUICK = canary_policy((0.1, 0.5), (0.5, 0.5), watch_s=0.5, min_calls=50)


def roll_out(tmp_path: Path, models: Path, count: int) -> None:
    """Rolls out healthy versions one after another."""
    with serving(tmp_path, models, QUICK) as stage:
        for number in range(STABLE + 1, STABLE + 1 + count):
            version = stage.publish(f"{GOOD_CLASSES}-{tag_of(number)}", tag_of(number))
            assert version == number
            assert stage.watched.wait_over(version) == "promoted", stage.watched.state
            check_promoted(stage, version, len(QUICK.canary_steps))


def test_three_healthy_canaries_in_a_row_are_promoted(tmp_path: Path, bad_versions: Path) -> None:
    roll_out(tmp_path, bad_versions, 3)


def test_a_healthy_canary_that_is_called_seldom_is_promoted(tmp_path: Path, bad_versions: Path) -> None:
    """Its engine is idle between calls, unlike the stable version's, and slower for that."""
    watched = Watched(Registry(tmp_path / "registry"), MODEL, timeout_s=600)
    watched.registry.publish(MODEL, bad_versions / f"{HEAVY}-{STABLE}", golden=[doubler_golden(STABLE)])
    watched.registry.set_policy(MODEL, canary_policy((0.01, 10.0), (0.1, 5.0), (0.5, 5.0), min_calls=20))
    options = LoadOptions(unary=1, pinned=0, followers=0, pause_s=0.0)
    with run_server(watched.registry.root, tmp_path, "--threads", "1") as server:
        assert watched.wait_over(STABLE) == "promoted"
        with load(server.address, MODEL, options) as background:
            watched.registry.publish(MODEL, bad_versions / f"{HEAVY}-{CANDIDATE}", golden=[doubler_golden(CANDIDATE)])
            assert watched.wait_over(CANDIDATE) == "promoted", watched.state
    assert background.record.failures == []
    assert background.record.wrong == []


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_hundred_healthy_canaries_in_a_row_are_promoted(tmp_path: Path, bad_versions: Path) -> None:
    roll_out(tmp_path, bad_versions, 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_healthy_canary_is_promoted_through_all_steps(tmp_path: Path, bad_versions: Path) -> None:
    with serving(tmp_path, bad_versions, DEFAULTS) as stage:
        stage.publish(f"{GOOD_CLASSES}-2")
        assert stage.watched.wait_over(CANDIDATE) == "promoted"
        check_promoted(stage, CANDIDATE, len(DEFAULTS.canary_steps))
