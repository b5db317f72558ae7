"""Thousands of version changes under load: nothing fails or is misrouted, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from modelport import Prediction
from modelport_registry import Golden, Registry
from tests.conftest import versioned_golden
from tests.support.launch import program
from tests.support.load import Inputs, Load, LoadOptions, load, tags_of
from tests.support.make_models import VERSIONS
from tests.support.rollouts import AT_ONCE
from tests.support.rpc import Footprint, engines, footprint, has_ended, wait_back
from tests.support.server import ServerProcess, run_server, wait_for
from tests.support.stub_engine import stub_golden, stub_variables, write_stub

MODEL = "versioned"
SETTLING_CHANGES = 5
"""So many changes until everything that is made once has been made."""
KEPT = 3
COLLECT_EVERY = 20
RSS_BYTES = 48 << 20
"""What the front may hold more in the end than in the beginning, after any number of changes."""
FEW_CALLERS = LoadOptions(unary=4, pinned=1, followers=2)


@dataclass(frozen=True, slots=True)
class Source:
    """Where versions come from."""

    model: Callable[[int], Path]
    """Returns a version's SavedModel."""
    tag: Callable[[int], int]
    """Returns which number a version answers."""
    golden: Callable[[int], Golden]

    def check(self, inputs: Inputs, answer: Prediction) -> str:
        """Returns what is wrong with an answer; nothing if it is right and the version's own."""
        if not np.array_equal(answer["y"], inputs["x"] * 2):
            return f"a wrong answer of version {answer.version}"
        if tags_of(answer) != {self.tag(answer.version)}:
            return f"version {answer.version} answered as {answer['version'].tolist()}"
        return ""


def stubs(folder: Path) -> Source:
    """Returns stubs, each version with a number of its own."""
    source = write_stub(folder, 0)

    def model(number: int) -> Path:
        (source / "variables" / "variables.data-00000-of-00001").write_bytes(stub_variables(number))
        return source

    return Source(model, lambda number: number, stub_golden)


def real_models(saved_models: Path) -> Source:
    """Returns real SavedModels; neighbours answer different numbers."""

    def tag(number: int) -> int:
        return (number - 1) % VERSIONS + 1

    return Source(
        lambda number: saved_models / f"versioned-{tag(number)}", tag, lambda number: versioned_golden(tag(number))
    )


@dataclass(frozen=True, slots=True)
class Held:
    """What a server holds while it serves one version and nobody calls."""

    front: Footprint
    children: int
    shared: int
    """How many pieces of shared memory it has mapped."""


@dataclass(slots=True)
class Changes:
    """A server, and versions that follow one another on it."""

    server: ServerProcess
    registry: Registry
    source: Source
    version: int = 0

    @property
    def front(self) -> psutil.Process:
        """The front process."""
        return psutil.Process(self.server.process.pid)

    def publish(self) -> None:
        """Publishes the next version."""
        self.version += 1
        number = self.version
        self.registry.publish(MODEL, self.source.model(number), golden=[self.source.golden(number)])
        if number % COLLECT_EVERY == 0:
            self.registry.collect_garbage(MODEL, keep=KEPT)

    def run(self, count: int, callers: Load) -> None:
        """Publishes versions, each once the one before has answered a call."""
        for _ in range(count):
            self.publish()
            callers.wait_version(self.version)
            assert callers.record.failures == []
            assert callers.record.wrong == []

    @contextmanager
    def callers(self) -> Generator[Load]:
        """Calls meanwhile; nothing fails, nobody is misrouted, and those who follow never go back."""
        options = LoadOptions(
            unary=FEW_CALLERS.unary,
            pinned=FEW_CALLERS.pinned,
            followers=FEW_CALLERS.followers,
            check=self.source.check,
        )
        with load(self.server.address, MODEL, options) as callers:
            yield callers
        assert callers.record.failures == []
        assert callers.record.wrong == []

    def held(self) -> Held:
        """Returns what the server holds once it is quiet."""
        self.wait_quiet()
        return Held(footprint(self.front), len(self.front.children(recursive=True)), shared(self.front))

    def wait_quiet(self) -> None:
        """Returns once one version's engine is left, and every process that ended has been waited for."""

        def quiet() -> bool:
            return len(engines(self.front)) == 1 and not any(map(has_ended, self.front.children(recursive=True)))

        wait_for(quiet, "old engines to end", self.server.alive)

    def check_nothing_is_left(self, before: Held) -> None:
        """Raises if the server holds more than it did."""
        self.wait_quiet()
        wait_back(self.front, before.front, rss_bytes=RSS_BYTES, fds=2, threads=2)
        wait_for(lambda: len(self.front.children(recursive=True)) <= before.children, "processes to end")
        wait_for(lambda: shared(self.front) <= before.shared, "shared memory to be given back")


def shared(process: psutil.Process) -> int:
    """Returns how many pieces of shared memory a process has mapped that are of no engine which is left.

    Of those that are, it has descriptors; how many of these are mapped depends on how many batches have run at once.
    """
    folder = Path(f"/proc/{process.pid}")
    lines = (folder / "maps").read_text().splitlines()
    mapped = {int(line.split()[4]) for line in lines if "/memfd:" in line or "/dev/shm/" in line}  # by inode
    held: set[int] = set()
    for entry in (folder / "fd").iterdir():
        with suppress(OSError):
            held.add(entry.stat().st_ino)
    return len(mapped - held)


def change(scratch: Path, source: Source, count: int, *arguments: str, stub: bool) -> None:
    """Changes versions so many times under load, and checks all there is to check."""
    registry = Registry(scratch / "registry")
    arguments = ("--poll-interval", "0.02", *arguments)
    with run_server(registry.root, scratch, *arguments, program=program(stub=stub)) as server:
        changes = Changes(server, registry, source)
        changes.publish()
        registry.set_policy(MODEL, AT_ONCE)
        server.wait_serving(MODEL)
        with changes.callers() as callers:
            changes.run(SETTLING_CHANGES, callers)
        before = changes.held()
        with changes.callers() as callers:
            changes.run(count, callers)
        changes.check_nothing_is_left(before)
        assert len(callers.record.versions()) >= count
        assert server.stop() == 0
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]


@pytest.mark.timeout(600)
def test_two_hundred_versions_of_a_stub_engine(tmp_path: Path) -> None:
    change(tmp_path, stubs(tmp_path / "stub"), 200, stub=True)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_ten_thousand_versions_of_a_stub_engine(tmp_path: Path) -> None:
    change(tmp_path, stubs(tmp_path / "stub"), 10_000, stub=True)


@pytest.mark.timeout(600)
def test_ten_versions_of_real_models(tmp_path: Path, saved_models: Path) -> None:
    change(tmp_path, real_models(saved_models), 10, "--threads", "1", stub=False)


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_three_hundred_versions_of_real_models(tmp_path: Path, saved_models: Path) -> None:
    change(tmp_path, real_models(saved_models), 300, "--threads", "1", stub=False)
