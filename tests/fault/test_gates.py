"""Every kind of bad version is rejected at its gate, while callers of the good one notice nothing."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from modelport_registry import JournalEntry, Registry
from modelport_server.gates.result import GATES
from tests.support.gate_cases import ARGUMENTS, CASES, MODEL, PROGRAM, STABLE, Case, Publisher
from tests.support.load import Load, load
from tests.support.rollouts import Watched, details
from tests.support.rpc import engines
from tests.support.server import ServerProcess, run_server, wait_for


@dataclass(frozen=True, slots=True)
class Stage:
    """A server of a good version, and callers that are never to notice anything."""

    publisher: Publisher
    server: ServerProcess
    load: Load

    @property
    def watched(self) -> Watched:
        """What is asked of the registry."""
        return Watched(self.publisher.registry, MODEL, self.server.alive)

    def entry(self, version: int) -> JournalEntry:
        """Returns the journal's line on the rejection, of which there must be one."""
        found = self.watched.journal(version, "rejected")
        assert len(found) == 1
        return found[0]

    def check_unharmed(self) -> None:
        """Raises if a caller noticed anything, or if the registry asks for anything else than before."""
        self.load.wait(50)
        assert self.load.record.failures == []
        assert self.load.record.wrong == []
        assert self.load.record.versions().keys() == {STABLE}
        state = self.watched.state
        assert (state.aliases, state.rollout) == ({"stable": STABLE}, None)
        front = psutil.Process(self.server.process.pid)
        wait_for(lambda: len(engines(front)) == 1, "the rejected version's engine to end", self.server.alive)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, bad_versions: Path) -> Generator[Stage]:
    """A server that serves the good doubler to callers, all through these tests."""
    scratch = tmp_path_factory.mktemp("gates")
    root = scratch / "registry"
    publisher = Publisher(Registry(root), scratch, bad_versions)
    publisher.good()
    with run_server(root, scratch, *ARGUMENTS, program=PROGRAM) as server:
        server.wait_serving(MODEL, STABLE)
        with load(server.address, MODEL) as callers:
            yield Stage(publisher, server, callers)
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_version_is_rejected_at_its_gate(stage: Stage, case: Case) -> None:
    version = stage.publisher.bad(case)
    rejection = stage.watched.wait_rejected(version)
    assert rejection.gate == case.gate, rejection
    assert case.reason in rejection.reason
    stage.check_unharmed()
    entry = stage.entry(version)
    assert entry.reason == f"{case.gate}: {rejection.reason}"
    gates = details(entry)["gates"]
    assert [gate["gate"] for gate in gates] == list(GATES[: GATES.index(case.gate) + 1])
    assert gates[-1]["outcome"] == "failed"
    assert gates[-1]["reason"] == rejection.reason
    for gate in gates[:-1]:
        assert gate["outcome"] == "passed", gate
        assert gate["figures"], gate
