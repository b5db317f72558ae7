"""Many processes at one registry: publishers, readers that hold versions, collectors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelport_registry import Registry, RolloutPolicy, Strategy
from tests.support.saved_models import write_fake_saved_model

ROOT = Path(__file__).parents[2]
MODEL = "digits"
PUBLISHERS = 8

# Each says that it is ready, waits for a line, acts, and says what came of it.
_HEAD = """
import json, sys
from modelport_registry import Registry, NotFoundError, RegistryError
import modelport_registry._publish
registry, model, source, version = Registry(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
def say(what):
    print(json.dumps(what), flush=True)
say("ready")
sys.stdin.readline()
"""
PUBLISH = """
try:
    say(registry.publish(model, source, version=version).version)
except RegistryError as exc:
    say(type(exc).__name__)
"""
PUBLISH_TEN = """
for _ in range(10):
    say(registry.publish(model, source, aliases=["newest"]).version)
"""
HOLD = """
with registry.lease(model, version):
    say("held")
    sys.stdin.readline()
"""
FORK = """
import os
with registry.lease(model, 1):
    child = os.fork()
    if child == 0:
        sys.stdin.readline()
        os._exit(0)
say("left")
os.waitpid(child, 0)
"""
READ = """
checked = 0
while registry.versions(model)[-1] < version:
    oldest = registry.versions(model)[0]
    try:
        with registry.lease(model, oldest):
            for _ in range(3):
                registry.verify(model, oldest)
            checked += 1
    except NotFoundError:
        pass
say(checked)
"""
COLLECT = """
removed = 0
while registry.versions(model)[-1] < version:
    removed += len(registry.collect_garbage(model, keep=2, staging_age_s=0).removed.get(model, ()))
say(removed)
"""
# What a publisher does with its staging folder, and nothing else, so that collectors meet it as often as can be.
STAGE = """
from pathlib import Path
from modelport_registry._folder import ModelFolder
folder = ModelFolder(Path(sys.argv[1]), model)
for _ in range(version):
    with folder.staged() as staging:
        (staging / "version").mkdir()
        (staging / "version" / "manifest.json").touch()
say("done")
"""
COLLECT_LEFTOVERS = """
import threading
ended = threading.Thread(target=sys.stdin.readline, daemon=True)
ended.start()
rounds = 0
while ended.is_alive():
    registry.collect_garbage(model, staging_age_s=0)
    rounds += 1
say(rounds)
"""
# Has the state changed by whoever comes first, generation after generation.
RACE = """
from dataclasses import replace
from modelport_registry import ConflictError
won = []
for generation in range(version):
    while registry.state(model).generation < generation:
        pass
    try:
        registry.change(
            model,
            lambda state: replace(state, considered=state.considered + 1),
            action="raced",
            reason=str(generation),
            expected_generation=generation,
        )
        won.append(generation)
    except ConflictError:
        pass
say(won)
"""
# What a server does: it looks, comes to a decision that all of them come to, and writes it if it is the first.
DECIDE = """
import uuid
from datetime import UTC, datetime
from modelport_registry import ConflictError, Phase, transitions
decided = 0
while registry.state(model).last is None:
    state, now = registry.state(model), datetime.now(UTC)
    found, rollout = transitions.candidate(state, registry.versions(model)), state.rollout
    if found is not None:
        action, begin = "started", dict(rollout_id=uuid.uuid4().hex, now=now, actor="a server")
        act = lambda state: transitions.start(state, found, **begin)
    elif rollout is None:
        continue
    elif rollout.phase is Phase.WATCH:
        action, act = "completed", lambda state: transitions.complete(state, now)
    else:
        action, act = f"advanced from {rollout.phase} {rollout.step}", transitions.advance
    try:
        registry.change(model, act, action=action, version=2, expected_generation=state.generation)
        decided += 1
    except ConflictError:
        pass
say(decided)
"""


class Worker:
    """A process that does one of the above."""

    def __init__(self, script: str, root: Path, source: Path, version: int | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HEAD + script, root, MODEL, source, json.dumps(version)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def go(self) -> None:
        """Lets it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """Returns what it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker died"
        return json.loads(line)


@contextmanager
def working(*workers: Worker) -> Generator[None]:
    """Waits until all are ready, and ends them at the end."""
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker.process)
            stack.callback(worker.process.kill)
        for worker in workers:
            assert worker.hear() == "ready"
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_fake_saved_model(tmp_path / "model", variables=bytes(200_000))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def test_eight_publishers_make_eight_whole_versions(root: Path, source: Path) -> None:
    workers = [Worker(PUBLISH, root, source) for _ in range(PUBLISHERS)]
    with working(*workers):
        for worker in workers:
            worker.go()
        numbers = [worker.hear() for worker in workers]
    assert sorted(numbers) == list(range(1, PUBLISHERS + 1))
    registry = Registry(root)
    assert registry.versions(MODEL) == sorted(numbers)
    for number in numbers:
        registry.verify(MODEL, number)
    assert [entry.version for entry in registry.journal(MODEL)] == sorted(numbers)
    assert list((root / MODEL / ".staging").iterdir()) == []


def test_of_eight_publishers_of_one_number_one_wins(root: Path, source: Path) -> None:
    workers = [Worker(PUBLISH, root, source, 5) for _ in range(PUBLISHERS)]
    with working(*workers):
        for worker in workers:
            worker.go()
        answers = Counter(worker.hear() for worker in workers)
    assert answers == {5: 1, "AlreadyExistsError": PUBLISHERS - 1}
    registry = Registry(root)
    assert registry.versions(MODEL) == [5]
    registry.verify(MODEL, 5)
    assert list((root / MODEL / ".staging").iterdir()) == []


def test_each_generation_is_made_by_exactly_one_of_eight(root: Path, source: Path) -> None:
    registry, generations = Registry(root), 40
    registry.publish(MODEL, source)
    workers = [Worker(RACE, root, source, generations) for _ in range(PUBLISHERS)]
    with working(*workers):
        for worker in workers:
            worker.go()
        won = [generation for worker in workers for generation in worker.hear()]
    assert sorted(won) == list(range(generations))
    state = registry.state(MODEL)
    assert (state.generation, state.considered) == (generations, generations)
    raced = [int(entry.reason) for entry in registry.journal(MODEL) if entry.action == "raced"]
    assert raced == list(range(generations))


def test_eight_servers_decide_a_rollout_once(root: Path, source: Path) -> None:
    registry = Registry(root)
    for _ in range(2):
        registry.publish(MODEL, source)
    registry.pin(MODEL, 1)
    registry.unpin(MODEL)
    registry.set_policy(MODEL, RolloutPolicy(strategy=(Strategy.CANARY,)))
    workers = [Worker(DECIDE, root, source) for _ in range(PUBLISHERS)]
    with working(*workers):
        for worker in workers:
            worker.go()
        decided = sum(worker.hear() for worker in workers)
    actions = [entry.action for entry in registry.journal(MODEL)][-decided:]
    assert actions == [
        "started",
        "advanced from gates 0",
        *(f"advanced from step {step}" for step in range(3)),
        "completed",
    ]
    assert registry.state(MODEL).aliases == {"stable": 2}


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_a_version_that_another_process_holds_is_not_collected(root: Path, source: Path, end: str) -> None:
    registry = Registry(root)
    for _ in range(3):
        registry.publish(MODEL, source)
    holder = Worker(HOLD, root, source, 1)
    with working(holder):
        holder.go()
        assert holder.hear() == "held"
        report = registry.collect_garbage(keep=1)
        assert (report.removed, report.leased) == ({MODEL: (2,)}, {MODEL: (1,)})
        registry.verify(MODEL, 1)
        if end == "leaves":
            holder.go()
        else:
            holder.process.send_signal(signal.SIGKILL)
        holder.process.wait()
        assert registry.collect_garbage(keep=1).removed == {MODEL: (1,)}


def test_a_lease_is_not_kept_by_a_child_that_was_forked_under_it(root: Path, source: Path) -> None:
    registry = Registry(root)
    for _ in range(2):
        registry.publish(MODEL, source)
    parent = Worker(FORK, root, source)
    with working(parent):
        parent.go()
        assert parent.hear() == "left"
        assert registry.collect_garbage(keep=1).removed == {MODEL: (1,)}
        parent.go()
        assert parent.process.wait() == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become someone who may not write")
def test_who_may_only_read_holds_versions_too(source: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = Path(folder, "registry")
        registry = Registry(root)
        for _ in range(2):
            registry.publish(MODEL, source)
        holder = Worker(f"import os\nos.setuid(65534)\n{HOLD}", root, source, 1)
        with working(holder):
            holder.go()
            assert holder.hear() == "held"
            assert registry.collect_garbage(keep=1).leased == {MODEL: (1,)}
            (root / MODEL / ".leases" / "1").unlink()
        again = Worker(f"import os\nos.setuid(65534)\n{HOLD}", root, source, 1)
        with working(again):
            again.go()
            assert again.hear() == "held"  # unprotected, but served


def test_publishers_readers_and_collectors_at_once(root: Path, source: Path) -> None:
    registry = Registry(root)
    registry.publish(MODEL, source)
    last = 1 + 3 * 10
    publishers = [Worker(PUBLISH_TEN, root, source) for _ in range(3)]
    readers = [Worker(READ, root, source, last) for _ in range(2)]
    collector = Worker(COLLECT, root, source, last)
    with working(*publishers, *readers, collector):
        for worker in (*publishers, *readers, collector):
            worker.go()
        numbers = sorted(worker.hear() for worker in publishers for _ in range(10))
        assert numbers == list(range(2, last + 1))
        assert all(reader.hear() > 0 for reader in readers)
        assert collector.hear() > 0
    assert registry.resolve(MODEL, alias="newest") in registry.versions(MODEL)
    registry.collect_garbage(keep=2, staging_age_s=0)
    assert registry.versions(MODEL)[-2:] == [last - 1, last]
    assert len(registry.versions(MODEL)) <= 3
    for version in registry.versions(MODEL):
        registry.verify(MODEL, version)
    published = [entry.version for entry in registry.journal(MODEL) if entry.action == "publish"]
    assert published == list(range(1, last + 1))
    assert list((root / MODEL / ".staging").iterdir()) == []


def test_collectors_look_while_staging_folders_come_and_go(root: Path, source: Path) -> None:
    Registry(root).publish(MODEL, source)
    publishers = [Worker(STAGE, root, source, 500) for _ in range(2)]
    collectors = [Worker(COLLECT_LEFTOVERS, root, source) for _ in range(2)]
    with working(*publishers, *collectors):
        for worker in (*publishers, *collectors):
            worker.go()
        assert [publisher.hear() for publisher in publishers] == ["done", "done"]
        for collector in collectors:
            collector.go()
        assert all(collector.hear() > 0 for collector in collectors)
    assert list((root / MODEL / ".staging").iterdir()) == []
