"""Engine processes by themselves: how each gate ends a bad version, and what an engine may do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio

from modelport_registry import Registry
from modelport_server.engines import spawner as spawners
from modelport_server.engines.process import EngineProcess, Loaded, LoadOrder, RejectedError
from modelport_server.engines.spawner import Spawner
from modelport_server.gates.result import GATES, Outcome
from modelport_server.options import MIB, BatchLimits, EngineLimits
from modelport_server.servable import Servable
from tests.support.bad_versions import bad_golden, doubler_golden
from tests.support.server import wait_for

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD = "good"
LARGEST = 128
LOADED_GATES = GATES[:-1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, bad_versions: Path) -> Path:
    """A registry with a good version."""
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(GOOD, bad_versions / GOOD, golden=[doubler_golden(1)])
    return root


@asynccontextmanager
async def _started() -> AsyncGenerator[Spawner]:
    spawner = Spawner()
    spawner.start()
    try:
        yield spawner
    finally:
        await spawner.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def spawner() -> AsyncGenerator[Spawner]:
    """A spawner with a zygote, shared by all tests that leave it as it is."""
    async with _started() as spawner:
        yield spawner


@pytest.fixture(params=["forked", "by itself"])
def either(request: pytest.FixtureRequest, spawner: Spawner) -> Spawner:
    """A spawner with a zygote, and one without."""
    return spawner if request.param == "forked" else Spawner()


def _order(root: Path, model: str = GOOD, version: int = 1) -> LoadOrder:
    return LoadOrder(root, model, version, LARGEST)


def _no_state(_: str) -> None:
    """Hears of states and does nothing."""


@asynccontextmanager
async def _loaded(
    root: Path, spawner: Spawner | None, limits: EngineLimits | None = None
) -> AsyncGenerator[tuple[EngineProcess, Loaded]]:
    """Loads the good version and ends its engine process."""
    engine = EngineProcess(limits or EngineLimits(threads=1), _no_state, spawner)
    try:
        yield engine, await engine.load(_order(root))
    finally:
        await engine.stop()


async def _rejection(
    root: Path,
    order: LoadOrder,
    limits: EngineLimits,
    spawner: Spawner | None,
    on_state: Callable[[str, int], None] | None = None,
) -> RejectedError:
    def tell(state: str) -> None:
        if on_state is not None:
            on_state(state, engine.pid)

    engine = EngineProcess(limits, tell, spawner)
    try:
        with pytest.raises(RejectedError) as caught:
            await engine.load(order)
    finally:
        await engine.stop()
    return caught.value


def _is_forked(pid: int) -> bool:
    """Returns whether an engine process came from a zygote: the name that it overwrites has the zygote's arguments."""
    return len(psutil.Process(pid).cmdline()) == 6


async def test_every_gate_tells_what_it_found(root: Path, either: Spawner) -> None:
    async with _loaded(root, either) as (engine, loaded):
        assert _is_forked(engine.pid) == bool(either.pid)
        assert [result.gate for result in loaded.gates] == list(LOADED_GATES)
        outcomes = {result.gate: result.outcome for result in loaded.gates}
        assert outcomes.pop("signature") is Outcome.SKIPPED
        assert set(outcomes.values()) == {Outcome.PASSED}
        figures = {result.gate: result.figures for result in loaded.gates}
        assert figures["integrity"]["files"] == 5
        assert figures["golden"]["examples"] == 8
        assert figures["golden"]["batch_sizes"] == [1, 8, 128]
        assert figures["golden"]["largest_difference"] == {"serving_default/version": 0, "serving_default/y": 0}
        assert figures["warm-up"]["batch_sizes"] == [1, 2, 4, 8, 16, 32, 64, 128]
        assert {"resident_mib"} <= figures["load"].keys()
        assert {"first_row_ms", "last_row_ms", "runs"} <= figures["warm-up"].keys()
        assert all(result.seconds >= 0 for result in loaded.gates)


BAD = [
    ("segfault-at-load", "load", "the engine process ended: SIGSEGV"),
    ("hang-at-load", "load", "took more than 4 s"),
    ("segfault", "golden", "the engine process ended: SIGSEGV"),
    ("hang", "golden", "took more than 4 s"),
    ("eater", "golden", "it took more than 1500 MiB of memory"),
    ("retrained", "golden", "serving_default: output 'y' differs"),
    ("nan", "golden", "serving_default: output 'y' differs"),
    ("hang-at-warm-up", "warm-up", "took more than 4 s"),
    ("read-file", "safety", "ReadFile"),
]


@pytest.mark.parametrize(("name", "gate", "words"), BAD, ids=[name for name, _, _ in BAD])
async def test_a_bad_version_is_rejected_at_the_gate_where_it_shows(
    tmp_path: Path, bad_versions: Path, spawner: Spawner, name: str, gate: str, words: str
) -> None:
    Registry(tmp_path).publish(name, bad_versions / name, golden=[bad_golden(name, 2)])
    limits = EngineLimits(threads=1, max_memory_bytes=1500 * MIB)
    if name.startswith("hang"):
        short: dict[str, Any] = {f"{gate.replace('-', '_')}_timeout_s": 4.0}
        limits = replace(limits, **short)
    error = await _rejection(tmp_path, _order(tmp_path, name), limits, spawner)
    assert error.gate == gate
    assert words in str(error)
    assert [result.gate for result in error.gates] == list(GATES[: GATES.index(gate) + 1])
    assert error.gates[-1].outcome is Outcome.FAILED
    assert error.gates[-1].reason == str(error)
    assert Outcome.FAILED not in {result.outcome for result in error.gates[:-1]}


async def test_a_version_that_crashes_an_engine_of_its_own_process(tmp_path: Path, bad_versions: Path) -> None:
    Registry(tmp_path).publish("bad", bad_versions / "segfault", golden=[bad_golden("segfault", 2)])
    error = await _rejection(tmp_path, _order(tmp_path, "bad"), EngineLimits(threads=1), None)
    assert (error.gate, str(error)) == ("golden", "the engine process ended: SIGSEGV")


@pytest.mark.parametrize(
    ("state", "gate"), [("verifying", "integrity"), ("loading", "load"), ("warming", "golden")], ids=str
)
async def test_an_engine_that_is_killed_is_rejected_at_the_gate_that_it_was_in(
    root: Path, spawner: Spawner, state: str, gate: str
) -> None:
    def kill(now: str, pid: int) -> None:
        if now == state:
            os.kill(pid, signal.SIGKILL)

    error = await _rejection(root, _order(root), EngineLimits(threads=1), spawner, kill)
    assert error.gate in (gate, "safety") if gate == "integrity" else error.gate == gate
    assert str(error) == "the engine process ended: SIGKILL"


async def test_threads_are_limited(root: Path, spawner: Spawner) -> None:
    def stop(now: str, pid: int) -> None:
        if now == "warming":
            os.kill(pid, signal.SIGSTOP)  # so that it is there when its threads are counted

    error = await _rejection(root, _order(root), EngineLimits(max_threads=2), spawner, stop)
    assert str(error) == "it has more than 2 threads"


async def test_a_version_that_is_not_wanted_any_more_leaves_no_process(root: Path, either: Spawner) -> None:
    begun = asyncio.Event()
    engine = EngineProcess(EngineLimits(), lambda state: begun.set(), either)
    loading = asyncio.create_task(engine.load(_order(root)))
    await begun.wait()
    pid = engine.pid
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await engine.stop()
    assert not psutil.pid_exists(pid)


async def test_nothing_is_left_of_a_load_that_is_cancelled_while_it_is_forked(root: Path, spawner: Spawner) -> None:
    async with _loaded(root, spawner):
        pass
    zygote = psutil.Process(spawner.pid)
    zygote.suspend()
    engine = EngineProcess(EngineLimits(), _no_state, spawner)
    loading = asyncio.create_task(engine.load(_order(root)))
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await engine.stop()
    zygote.resume()
    async with _loaded(root, spawner) as (after, _):
        children = {child.pid for child in psutil.Process().children()}
        assert children == {zygote.pid, after.pid}


def _belongings() -> tuple[int, set[int], int, int]:
    me = psutil.Process()
    return me.num_fds(), {child.pid for child in me.children()}, len(list(Path("/dev/shm").iterdir())), me.num_threads()


async def test_fifty_engines_leave_everything_as_it_was(root: Path, spawner: Spawner) -> None:
    async with _loaded(root, spawner):
        pass
    zygote = psutil.Process(spawner.pid)
    before, zygote_fds = _belongings(), zygote.num_fds()
    for _ in range(50):
        async with _loaded(root, spawner) as (engine, _):
            assert _is_forked(engine.pid)
    assert _belongings() == before
    assert zygote.num_fds() == zygote_fds
    assert zygote.children() == []


async def test_engines_live_on_without_the_zygote_and_the_next_one_comes(root: Path) -> None:
    async with _started() as spawner, _loaded(root, spawner) as (engine, _):
        first = spawner.pid
        os.kill(first, signal.SIGKILL)
        async with _loaded(root, spawner) as (meanwhile, _):  # in whatever way it is started
            assert not engine.ended.is_set()
            assert meanwhile.pid
        await asyncio.to_thread(wait_for, lambda: spawner.pid not in (0, first), "another zygote")
        async with _loaded(root, spawner) as (after, _):
            assert psutil.Process(after.pid).ppid() == os.getpid()
        assert psutil.Process(engine.pid).status() != psutil.STATUS_ZOMBIE
    assert not psutil.pid_exists(first)


async def test_an_import_that_takes_for_ever_holds_up_no_load(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawners, "_IMPORT_S", 0.2)
    async with _started() as spawner, _loaded(root, spawner) as (engine, _):
        assert not _is_forked(engine.pid)


async def test_a_zygote_that_hangs_holds_up_no_load(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _started() as spawner:
        async with _loaded(root, spawner):
            pass
        monkeypatch.setattr(spawners, "_FORK_S", 0.2)
        first = spawner.pid
        os.kill(first, signal.SIGSTOP)
        async with _loaded(root, spawner) as (engine, _):
            assert not _is_forked(engine.pid)
        assert not psutil.pid_exists(first)


@pytest.fixture
def front(root: Path) -> Generator[subprocess.Popen[str]]:
    """A front in a process of its own; its first line says which processes it has."""
    command = [sys.executable, "-m", "tests.support.engine_front", str(root), GOOD]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


async def test_zygote_and_engines_end_with_the_front(front: subprocess.Popen[str]) -> None:
    assert front.stdout is not None
    line = await asyncio.to_thread(front.stdout.readline)
    pids = [int(word) for word in line.split()]
    assert len(pids) == 3
    front.kill()
    front.wait()
    await asyncio.to_thread(wait_for, lambda: not any(_lives(pid) for pid in pids), "all processes to end")


def _lives(pid: int) -> bool:
    """Returns whether a process runs; one that has ended may wait for a while for whoever adopts it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_an_engine_has_what_it_needs_and_no_more(root: Path, either: Spawner) -> None:
    async with _loaded(root, either) as (engine, _):
        status = _status(engine.pid)
        assert status["Seccomp"] == "2"
        assert status["NoNewPrivs"] == "1"
        ignored = int(status["SigIgn"], 16)
        assert all(ignored >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))
        process = psutil.Process(engine.pid)
        assert process.ppid() == os.getpid()
        assert process.net_connections("inet") == []
        assert "modelport_server.engines.worker" in process.cmdline()
        assert _sockets(engine.pid) == 1
        assert _oom_score(engine.pid) == 500


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _sockets(pid: int) -> int:
    return sum(str(fd.readlink()).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir())


def _oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_it_loads_at_the_lowest_priority_and_serves_at_the_ordinary_one(root: Path, either: Spawner) -> None:
    ordinary = os.getpriority(os.PRIO_PROCESS, 0)
    loading: set[int] = set()

    def look(state: str) -> None:
        if state == "warming":
            loading.update(_priorities(engine.pid))

    engine = EngineProcess(EngineLimits(), look, either)
    try:
        await engine.load(_order(root))
        assert _priorities(engine.pid) == {ordinary}
        assert 19 in loading
        if os.geteuid() == 0:
            assert loading == {19}
    finally:
        await engine.stop()


def _priorities(pid: int) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


async def test_a_probe_runs_alone_and_says_what_it_cost(root: Path, spawner: Spawner) -> None:
    manifest = Registry(root).manifest(GOOD, 1)
    servable = Servable(
        _order(root),
        manifest,
        BatchLimits(),
        EngineLimits(threads=1),
        on_state=_no_state,
        on_rejected=lambda gate, reason: None,
        spawner=spawner,
    )
    try:
        await servable.start()
        assert [result.gate for result in servable.gates] == list(LOADED_GATES)
        probes = [await servable.probe("", {"x": np.ones((rows, 4), np.float32)}) for rows in (1, 128, 300)]
        assert [probe.rows for probe in probes] == [1, 128, 300]
        assert all(probe.engine_time_us > 0 and probe.cpu_time_us > 0 for probe in probes)
    finally:
        await servable.stop()
