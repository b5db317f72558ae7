"""Shadow traffic: callers see the stable version's answers only, and the candidate is judged by its own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelport import Client, RolloutInfo
from modelport_registry import Phase, Registry, RolloutPolicy, Strategy
from tests.support.bad_versions import DISAGREEING, GOOD_CLASSES, class_golden
from tests.support.launch import program
from tests.support.load import ClassCalls, Load, LoadOptions, load
from tests.support.rollouts import Watched, details
from tests.support.server import ServerProcess, run_server, wait_for

MODEL = "classes"
STABLE, CANDIDATE = 1, 2
TAG = 1
"""What all versions say that they are, but one."""
OUTPUTS = {"scores", "version"}


def policy(bake_s: float) -> RolloutPolicy:
    """Returns a policy of a shadow step alone; callers never get an answer of it."""
    return RolloutPolicy(strategy=(Strategy.SHADOW,), shadow_bake_s=bake_s, watch_s=0.5, keep_warm_s=0.0, min_calls=50)


@dataclass(frozen=True, slots=True)
class Stage:
    """A server under light load."""

    server: ServerProcess
    watched: Watched
    models: Path
    callers: ClassCalls
    load: Load

    def publish(self, name: str, tag: int = TAG) -> None:
        """Publishes a candidate whose golden examples are right."""
        self.watched.registry.publish(MODEL, self.models / name, golden=[class_golden(tag)])

    def status(self) -> RolloutInfo:
        """Returns what the server says of the rollout."""
        with Client(self.server.address) as client:
            return client.rollouts.get(MODEL)


@contextmanager
def serving(tmp_path: Path, models: Path, bake_s: float) -> Generator[Stage]:
    """Serves the good classifier."""
    watched = Watched(Registry(tmp_path / "registry"), MODEL)
    watched.registry.publish(MODEL, models / f"{GOOD_CLASSES}-1", golden=[class_golden(TAG)])
    watched.registry.set_policy(MODEL, policy(bake_s))
    callers = ClassCalls(lambda version: TAG, candidate=CANDIDATE)
    options = LoadOptions(unary=2, pinned=1, followers=1, pause_s=0.05, inputs=callers.inputs, check=callers.check)
    idle = program(spare=True)  # else nothing is copied while other tests use the machine
    with run_server(watched.registry.root, tmp_path, "--threads", "1", program=idle) as server:
        assert watched.wait_over(STABLE) == "promoted"
        with load(server.address, MODEL, options) as background:
            yield Stage(server, watched, models, callers, background)
            assert background.record.versions().keys() <= {STABLE, CANDIDATE}
    assert background.record.wrong == []
    assert background.record.failures == []
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]


def test_a_candidate_that_agrees_is_promoted(tmp_path: Path, bad_versions: Path) -> None:
    with serving(tmp_path, bad_versions, bake_s=1.0) as stage:
        seen: list[int] = []
        stage.publish(f"{GOOD_CLASSES}-{TAG}")
        stage.watched.wait_phase(Phase.STEP, 0, CANDIDATE)
        first = stage.load.record.begun

        def compared() -> bool:
            seen.append(len(stage.load.record.answers))
            return bool(stage.status().figures.get("copied"))

        wait_for(compared, "calls to be copied", stage.server.alive)
        assert {answer.version for answer in stage.load.record.answers[: seen[-1]]} == {STABLE}
        assert stage.watched.wait_over(CANDIDATE) == "promoted"
        assert stage.load.record.begun > first
        (entry,) = stage.watched.journal(CANDIDATE, "promoted")
        figures = details(entry)
        assert figures["agreement"] == dict.fromkeys(OUTPUTS, 1.0)
        assert figures["rows"] >= stage.watched.state.policy.min_calls
        stage.load.wait_version(CANDIDATE)


def test_a_candidate_that_disagrees_is_rejected_unseen(tmp_path: Path, bad_versions: Path) -> None:
    with serving(tmp_path, bad_versions, bake_s=600.0) as stage:
        stage.publish(DISAGREEING)
        stage.watched.wait_phase(Phase.STEP, 0, CANDIDATE)
        wait_for(lambda: agreement(stage).keys() == OUTPUTS, "outputs to be compared", stage.server.alive)
        assert agreement(stage) == dict.fromkeys(OUTPUTS, 1.0)
        stage.callers.turn(1.0)
        rejection = stage.watched.wait_rejected(CANDIDATE)
        assert "'scores' agrees in" in rejection.reason
        check_unseen(stage)
        (entry,) = stage.watched.journal(CANDIDATE, "rolled back")
        assert details(entry)["agreement"]["version"] == 1.0
        assert details(entry)["agreement"]["scores"] < 0.99


def test_agreement_is_told_for_each_output(tmp_path: Path, bad_versions: Path) -> None:
    with serving(tmp_path, bad_versions, bake_s=600.0) as stage:
        stage.publish(f"{GOOD_CLASSES}-2", tag=2)  # it says that it is another version, which is another answer
        rejection = stage.watched.wait_rejected(CANDIDATE)
        assert "'version' agrees in 0.00%" in rejection.reason
        check_unseen(stage)
        (entry,) = stage.watched.journal(CANDIDATE, "rolled back")
        assert details(entry)["agreement"] == {"scores": 1.0, "version": 0.0}


def agreement(stage: Stage) -> dict[str, float]:
    """Returns the share of rows that agree, by output, as the server tells it."""
    found: dict[str, float] = dict(stage.status().figures.get("agreement") or {})
    return found


def check_unseen(stage: Stage) -> None:
    """Raises if a caller got any answer but the stable version's."""
    stage.load.wait(20)
    assert stage.load.record.versions().keys() == {STABLE}
    assert stage.watched.state.aliases["stable"] == STABLE
