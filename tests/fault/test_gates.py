"""Every kind of bad version is rejected at its gate, while callers of the good one notice nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from modelport_registry import Golden, JournalEntry, Published, Registry
from modelport_server.gates.result import GATES
from tests.support.bad_versions import bad_golden, doubler_golden, drop_variables, flip_bit, link_variables
from tests.support.launch import program
from tests.support.load import Load, load
from tests.support.rollouts import Watched, details
from tests.support.rpc import engines
from tests.support.server import ServerProcess, run_server, wait_for

MODEL = "doubler"
STABLE = 1
LIMIT_S = 10.0
"""Of every gate: what hangs is waited for that long."""
MEMORY_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Case:
    """A bad version."""

    name: str
    gate: str
    reason: str
    """Part of what it is rejected with."""
    damage: Callable[[Path], None] | None = None
    """What is done to the folder of a good version; else the model's name is the case's."""


CASES = (
    Case("flipped-bit", "integrity", "variables", flip_bit),
    Case("missing-variables", "integrity", "variables", drop_variables),
    Case("symlink", "integrity", "variables", link_variables),
    Case("read-file", "safety", "ReadFile"),
    Case("renamed-output", "signature", "'y'"),
    Case("changed-dtype", "signature", "'x'"),
    Case("segfault-at-load", "load", "SIGSEGV"),
    Case("hang-at-load", "load", f"more than {LIMIT_S:g} s"),
    Case("segfault", "golden", "SIGSEGV"),
    Case("hang", "golden", f"more than {LIMIT_S:g} s"),
    Case("eater", "golden", "memory"),
    Case("retrained", "golden", "'y' differs"),
    Case("nan", "golden", "NaN"),
    Case("hang-at-warm-up", "warm-up", "s"),
    Case("slow", "speed", "times"),
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A server of a good version, and callers that are never to notice anything."""

    root: Path
    scratch: Path
    models: Path
    server: ServerProcess
    load: Load

    @property
    def registry(self) -> Registry:
        """Where versions are published."""
        return Registry(self.root)

    @property
    def watched(self) -> Watched:
        """What is asked of the registry."""
        return Watched(self.registry, MODEL, self.server.alive)

    def publish(self, case: Case) -> int:
        """Publishes a bad version; damage is done before anybody sees it."""
        if case.damage is None:
            return self._publish(self.registry, case.name, bad_golden(case.name, 2)).version
        number = max(self.registry.versions(MODEL)) + 1
        aside = Registry(self.scratch / case.name)
        folder = self._publish(aside, "good", doubler_golden(1), version=number).path
        case.damage(folder)
        folder.rename(self.root / MODEL / str(number))
        return number

    def _publish(self, registry: Registry, name: str, golden: Golden, version: int | None = None) -> Published:
        return registry.publish(MODEL, self.models / name, golden=[golden], version=version)

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
    Registry(root).publish(MODEL, bad_versions / "good", golden=[doubler_golden(STABLE)])
    limits = program(golden_timeout_s=LIMIT_S, warm_up_timeout_s=LIMIT_S, max_memory_bytes=MEMORY_BYTES)
    arguments = ("--load-timeout", f"{LIMIT_S}", "--threads", "1")
    with run_server(root, scratch, *arguments, program=limits) as server:
        server.wait_serving(MODEL, STABLE)
        with load(server.address, MODEL) as callers:
            yield Stage(root, scratch, bad_versions, server, callers)
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_version_is_rejected_at_its_gate(stage: Stage, case: Case) -> None:
    version = stage.publish(case)
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
