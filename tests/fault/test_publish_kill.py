"""A publish that is killed, or gets an error, at every one of its file system calls.

``strace`` attaches to a publisher that waits, and tampers with the Nth call of one kind. Whatever happens,
the registry has the old state or the new, publishing again works, and the leftovers are collected.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelport_registry import Registry
from tests.support.publisher import MODEL, PUBLISHED, REFUSED, publish
from tests.support.saved_models import write_fake_saved_model

ROOT = Path(__file__).parents[2]

CHANGING = (
    "openat", "write", "pwrite64", "fsync", "fdatasync", "ftruncate", "mkdir", "mkdirat", "rename", "renameat",
    "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir", "flock",
)  # fmt: skip
READING = (
    "read", "pread64", "lseek", "close", "stat", "lstat", "fstat", "newfstatat", "statx", "getdents64", "readlink",
    "access", "fcntl", "ioctl",
)  # fmt: skip
every_call = pytest.mark.parametrize(
    "names",
    # To be killed before a call that only reads is no other than to be killed before the next that changes.
    [pytest.param(CHANGING, id="changing"), pytest.param(READING, id="reading", marks=pytest.mark.slow)],
)


class Publisher:
    """The process of ``tests.support.publisher``."""

    def __init__(self, source: Path, report: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.publisher", source, report],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def ask(self, request: dict[str, Any]) -> int:
        """Sends a line and returns the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the publisher died"
        return int(json.loads(answer))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Bench:
    """Makes registries, and has the publisher tampered with while it changes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = folder / "registry"
        self._log = folder / "strace.log"
        report = folder / "report"
        report.mkdir()
        (report / "report.html").write_text("<p>fine</p>")
        self._source = write_fake_saved_model(folder / "model"), report
        self.publisher = Publisher(*self._source)

    def publish(self, root: Path) -> None:
        """Publishes in this process, untouched."""
        publish(root, *self._source)

    def root(self, versions: int) -> Path:
        """Returns a registry that has so many versions, the first of them stable."""
        template = self._folder / f"template-{versions}"
        if not template.exists():
            template.mkdir()
            for _ in range(versions):
                self.publish(template)
            if versions:
                Registry(template).set_alias(MODEL, "stable", 1)
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(template, self._root)
        return self._root

    def traced(self, root: Path, action: str, *options: str) -> tuple[int, str]:
        """Has something done under strace; returns how it ended and what strace saw."""
        pid = self.publisher.ask({"root": str(root), "action": action})
        tracer = subprocess.Popen(
            ["strace", "-f", "-o", self._log, "-p", str(pid), *options], stderr=subprocess.PIPE, text=True
        )
        assert tracer.stderr is not None
        with tracer.stderr:
            first = tracer.stderr.readline()
            code = self.publisher.ask({})
            tracer.wait()
        assert "attached" in first, first
        return code, self._log.read_text()

    def calls(self, root: Path, action: str, names: Sequence[str]) -> Counter[str]:
        """Returns how often ``action`` makes each of the calls."""
        code, log = self.traced(root, action, "-e", f"trace={','.join(f'?{name}' for name in names)}")
        assert code == PUBLISHED
        return Counter(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)\(", log, re.MULTILINE))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Generator[Bench]:
    _require_strace()
    bench = Bench(tmp_path_factory.mktemp("publish"))
    yield bench
    bench.publisher.close()


def _require_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        tracer = subprocess.Popen(["strace", "-p", str(sleeper.pid)], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        with tracer.stderr:
            line = tracer.stderr.readline()
            sleeper.kill()
            tracer.wait()
    if "attached" not in line:
        pytest.skip(f"this machine does not allow tracing: {line.strip()}")


def _check_versions(registry: Registry, versions: list[int]) -> None:
    """Checks that all of a registry can be read and is whole."""
    assert registry.versions(MODEL) == versions
    for version in versions:
        registry.verify(MODEL, version)
        assert len(registry.golden(MODEL, version)) == 1
    assert set(registry.state(MODEL).aliases.values()) <= set(versions)
    actions = {entry.action for entry in registry.journal(MODEL)}
    assert actions <= {"publish", "alias", "collect", "unpinned", "rollout started"}


def _check_works_on(bench: Bench, root: Path, highest: int) -> None:
    """Checks that publishing works and that nothing is left over."""
    registry = Registry(root)
    before = len(registry.journal(MODEL))
    bench.publish(root)
    assert registry.resolve(MODEL) == registry.versions(MODEL)[-1] == highest + 1
    assert len(registry.journal(MODEL)) == before + 2
    registry.collect_garbage(keep=9, staging_age_s=0)
    assert list((root / MODEL / ".staging").iterdir()) == []
    registry.verify(MODEL, highest + 1)


def _check_published(bench: Bench, root: Path, before: int) -> int:
    """Checks for the old state or the new; returns the number of versions."""
    registry = Registry(root)
    versions = registry.versions(MODEL)
    assert len(versions) in (before, before + 1)
    _check_versions(registry, list(range(1, len(versions) + 1)))
    assert registry.exists(MODEL) == (MODEL in registry.models()) == bool(versions)
    _check_works_on(bench, root, len(versions))
    return len(versions)


def _check_collected(bench: Bench, root: Path, before: int) -> int:
    """Checks that each version is there whole or not at all; returns the number of versions."""
    registry = Registry(root)
    versions = registry.versions(MODEL)
    assert {1, before} <= set(versions)  # aliased; highest
    _check_versions(registry, versions)
    registry.collect_garbage(MODEL, keep=1, staging_age_s=0)
    assert registry.versions(MODEL) == [1, before]
    _check_works_on(bench, root, before)
    return len(versions)


def _check_rolled_out(bench: Bench, root: Path, before: int) -> int:
    """Checks that the journal says what the state is; returns how many of the two changes were made."""
    registry = Registry(root)
    state = registry.state(MODEL)
    _check_versions(registry, list(range(1, before + 1)))
    candidate = state.rollout.version if state.rollout is not None else None
    assert (state.aliases, candidate) in [({"stable": 1}, None), ({"stable": 1}, before)]
    made = (state.pin is None) + (candidate is not None)
    actions = [entry.action for entry in registry.journal(MODEL)]
    assert actions[2 * before + 1 :] == ["unpinned", "rollout started"][:made]
    registry.pin(MODEL)
    registry.unpin(MODEL)
    assert registry.start_rollout(MODEL, before).generation == state.generation + (3 if made else 2)
    registry.collect_garbage(MODEL, keep=9, staging_age_s=0)
    _check_works_on(bench, root, before)
    return made


Check = Callable[[Bench, Path, int], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Something that is tampered with."""

    action: str
    versions: int
    check: Check
    outcomes: frozenset[int]


SCENARIOS = {
    "first": Scenario(action="publish", versions=0, check=_check_published, outcomes=frozenset({0, 1})),
    "next": Scenario(action="publish", versions=1, check=_check_published, outcomes=frozenset({1, 2})),
    "collect": Scenario(action="collect", versions=4, check=_check_collected, outcomes=frozenset({2, 3, 4})),
    "roll out": Scenario(action="roll out", versions=2, check=_check_rolled_out, outcomes=frozenset({0, 1, 2})),
}


@pytest.fixture(params=SCENARIOS)
def scenario(request: pytest.FixtureRequest) -> Scenario:
    return SCENARIOS[str(request.param)]


def _sweep(bench: Bench, scenario: Scenario, names: Sequence[str], tamper: str) -> Generator[tuple[str, int, str, int]]:
    """Tampers with every call in turn; yields the call, how the publisher ended, the log, and the versions."""
    calls = bench.calls(bench.root(scenario.versions), scenario.action, names)
    assert len(calls) > 4, "strace saw nothing"
    for name, count in calls.items():
        for number in range(1, count + 1):
            what = f"{name} number {number}"
            root = bench.root(scenario.versions)
            code, log = bench.traced(root, scenario.action, "-e", f"inject={name}:{tamper}:when={number}")
            try:
                versions = scenario.check(bench, root, scenario.versions)
            except Exception as exc:
                raise AssertionError(f"{tamper} at {what}: ended with {code}") from exc
            yield what, code, log, versions


@every_call
def test_killed_at_any_call(bench: Bench, scenario: Scenario, names: Sequence[str]) -> None:
    outcomes: set[int] = set()
    for what, code, _, versions in _sweep(bench, scenario, names, "signal=SIGKILL"):
        assert code == -signal.SIGKILL, what
        outcomes.add(versions)
    assert outcomes == scenario.outcomes


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", pytest.param("EINTR", marks=pytest.mark.slow)])
@every_call
def test_an_error_at_any_call(bench: Bench, scenario: Scenario, names: Sequence[str], error: str) -> None:
    codes: set[int] = set()
    for what, code, log, _ in _sweep(bench, scenario, names, f"error={error}"):
        assert "(INJECTED)" in log, what
        assert code in (PUBLISHED, REFUSED), what
        codes.add(code)
    assert codes == {PUBLISHED, REFUSED}


def test_everything_is_on_the_disk_before_it_is_visible(bench: Bench) -> None:
    root = bench.root(1)
    code, log = bench.traced(root, "publish", "-y", "-s", "4096", "-e", "trace=fsync,rename,renameat,renameat2")
    assert code == PUBLISHED
    lines = log.splitlines()
    renames = [number for number, line in enumerate(lines) if line.endswith(" = 0") and f'{MODEL}/2"' in line]
    assert len(renames) == 1
    before = {m[1] for line in lines[: renames[0]] if (m := re.search(r"fsync\(\d+<(.+)>\)", line))}
    after = "".join(lines[renames[0] + 1 :])
    version = root / MODEL / "2"
    things = {path.relative_to(version) for path in [version, *version.rglob("*")]}
    assert len(things) == 9
    for thing in things:
        assert any(re.fullmatch(rf".+/\.staging/\w+/version/?{re.escape(_tail(thing))}", p) for p in before), thing
    assert f"<{root / MODEL}>)" in after


def _tail(path: Path) -> str:
    return "" if path == Path() else path.as_posix()


@pytest.mark.parametrize("max_file_bytes", [0, 1, 19, 136, 500, 1000])
def test_a_disk_that_takes_part_of_a_write(bench: Bench, max_file_bytes: int) -> None:
    root = bench.root(1)
    bench.publisher.ask({"root": str(root), "action": "publish", "max_file_bytes": max_file_bytes})
    assert bench.publisher.ask({}) == REFUSED
    assert not list((root / MODEL / ".staging").iterdir())
    assert _check_published(bench, root, 1) == 1


def test_a_damaged_state_is_a_mistake_and_no_crash(bench: Bench) -> None:
    root = bench.root(1)
    (root / MODEL / "state.json").write_text("{")
    bench.publisher.ask({"root": str(root), "action": "publish"})
    assert bench.publisher.ask({}) == REFUSED
