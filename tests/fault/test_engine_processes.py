"""Engine processes by themselves: how each gate ends a bad version, and what an engine may do."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
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
from modelport_server.engines import _messages as messages
from modelport_server.engines import ahead
from modelport_server.engines import spawner as spawners
from modelport_server.engines import zygote as zygotes
from modelport_server.engines._system import threads
from modelport_server.engines.ahead import Ahead, Begun
from modelport_server.engines.kinds import OPENVINO
from modelport_server.engines.parallel import MOST_INSTANCES, Parallelism
from modelport_server.engines.probing import probe
from modelport_server.engines.process import EngineProcess, Loaded, LoadOrder, RejectedError, UnreadableError
from modelport_server.engines.spawner import Child, Spawner
from modelport_server.errors import EngineDiedError
from modelport_server.gates.result import GATES, SAFETY, Outcome
from modelport_server.gates.warmup_requests import WARMUP_REQUESTS
from modelport_server.options import MIB, BatchLimits, EngineLimits
from modelport_server.servable import Servable
from modelport_server.tensors import RawTensor
from tests.support.bad_versions import bad_golden, doubler_golden
from tests.support.server import wait_for

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD = "good"
LARGEST = 128
LOADED_GATES = GATES[:-1]
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture(scope="module", autouse=True)
def adopting() -> Generator[None]:
    """Takes back what spawners do to the process of the tests: it adopts nobody's children after these."""
    there = _children()
    yield
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    left = _children() - there
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not left


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
    engine = EngineProcess(limits or EngineLimits(), _no_state, spawner)
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


async def test_an_engine_may_have_many_instances(root: Path, either: Spawner) -> None:
    many = Parallelism(MOST_INSTANCES, 1)
    engine = EngineProcess(EngineLimits(), _no_state, either)
    try:
        loaded = await engine.load(replace(_order(root), parallelism=many))
        assert loaded.parallelism == many
        assert _is_forked(engine.pid) == bool(either.pid)
    finally:
        await engine.stop()


async def test_a_reply_that_cant_be_read_ends_the_engine(
    root: Path, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> tuple[RawTensor, ...]:
        raise KeyError("there is no such type")

    spec = Registry(root).manifest(GOOD, 1).signatures["serving_default"]
    async with _loaded(root, spawner) as (engine, _):
        await probe(engine, spec, {"x": np.ones((2, 4), np.float32)})
        monkeypatch.setattr(messages, "read", read)
        with pytest.raises(EngineDiedError, match="could not be read"):
            await asyncio.wait_for(probe(engine, spec, {"x": np.ones((2, 4), np.float32)}), 30)
        assert engine.ended.is_set()
        assert engine.why == "its reply could not be read"


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
    limits = EngineLimits(max_memory_bytes=1500 * MIB)
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
    error = await _rejection(tmp_path, _order(tmp_path, "bad"), EngineLimits(), None)
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

    error = await _rejection(root, _order(root), EngineLimits(), spawner, kill)
    assert error.gate in (gate, "safety") if gate == "integrity" else error.gate == gate
    assert str(error) == "the engine process ended: SIGKILL"


async def test_a_version_that_is_gone_is_not_rejected(root: Path, either: Spawner) -> None:
    engine = EngineProcess(EngineLimits(), _no_state, either)
    with pytest.raises(UnreadableError, match="no version 2"):
        await engine.load(_order(root, version=2))
    await engine.stop()


async def test_a_version_whose_warm_up_requests_the_storage_fails_at_is_not_rejected(
    root: Path, spawner: Spawner, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "registry")
    requests = Registry(tmp_path / "registry").path(GOOD, 1) / WARMUP_REQUESTS

    def fail_after_integrity(gate: str) -> None:
        if gate == SAFETY:
            requests.parent.mkdir()
            requests.symlink_to(requests.name)

    engine = EngineProcess(EngineLimits(), _no_state, spawner, fail_after_integrity)
    with pytest.raises(UnreadableError, match="symbolic links"):
        await engine.load(_order(tmp_path / "registry"))
    await engine.stop()


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
    before, zygote = _children(), psutil.Process(spawner.pid)
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
        assert _children() == before | {after.pid}


def _belongings() -> tuple[int, set[int], int, int]:
    me = psutil.Process()
    shared = sum("/memfd:" in line or "/dev/shm/" in line for line in Path("/proc/self/maps").read_text().splitlines())
    return me.num_fds(), _children(), shared, me.num_threads()


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
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Makes zygotes without TensorFlow, see ``tests.support.dying_zygote``; returns the file of what is forked."""

    def make(who: str) -> Path:
        path = tmp_path / "engine"

        def run(
            module: str, arguments: list[int], fds: list[int], environment: dict[str, str]
        ) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "tests.support.dying_zygote", who, str(path), *map(str, arguments)]
            return subprocess.Popen(command, pass_fds=fds, env={**os.environ, **environment}, process_group=0)

        monkeypatch.setattr(ahead, "run_module", run)
        return path

    return make


@pytest.mark.parametrize(("status", "text"), [(3, "exit status 3"), (-9, "SIGKILL"), (-40, "signal 40")])
async def test_every_end_has_a_name(status: int, text: str) -> None:
    assert spawners.exit_text(status) == text


async def test_a_zygote_that_a_real_time_signal_ended_has_a_successor(
    light: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    light("nobody")
    async with _started() as spawner:
        first = spawner.pid
        os.kill(first, signal.SIGRTMIN + 6)
        await asyncio.to_thread(wait_for, lambda: spawner.pid not in (0, first), "another zygote")
    assert "(signal 40), it is started again" in caplog.text


async def test_whoever_keeps_the_zygote_is_kept_too(
    light: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(status: int) -> str:
        raise RuntimeError(f"no text for {status}")

    monkeypatch.setattr(spawners, "exit_text", fail)
    light("nobody")
    async with _started() as spawner:
        first = spawner.pid
        os.kill(first, signal.SIGKILL)
        await asyncio.to_thread(wait_for, lambda: spawner.pid not in (0, first), "another zygote")
    assert "no text for -9" in caplog.text


async def test_an_engine_that_a_real_time_signal_ended_frees_its_memory(root: Path, spawner: Spawner) -> None:
    before = _belongings()
    async with _loaded(root, spawner) as (engine, _):
        os.kill(engine.pid, signal.SIGRTMIN + 6)
        await engine.ended.wait()
    assert engine.why == "the engine process ended: signal 40"
    assert _belongings() == before


@pytest.fixture
def channel() -> Generator[tuple[socket.socket, socket.socket]]:
    """The front's end of an engine's socket pair, and the engine's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def _run(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)


@pytest.mark.parametrize("who", ["zygote", "between"])
async def test_an_engine_process_that_the_front_does_not_hear_of_is_ended_and_waited_for(
    light: Callable[[str], Path], channel: tuple[socket.socket, socket.socket], who: str
) -> None:
    before, file = _children(), light(who)
    async with _started() as spawner:
        assert await spawner.fork([channel[1].fileno()]) is None
    assert not psutil.pid_exists(int(file.read_text()))
    assert _children() == before


async def test_what_is_known_outlives_the_zygote_and_keeps_its_exit_status(
    light: Callable[[str], Path], channel: tuple[socket.socket, socket.socket]
) -> None:
    light("nobody")
    with _run("import sys; sys.exit(3)") as other:
        async with _started() as spawner:
            lives, dies = [await spawner.fork([channel[1].fileno()]) for _ in range(2)]
            assert lives is not None
            assert dies is not None
            os.kill(dies.pid, signal.SIGKILL)
            await asyncio.to_thread(wait_for, lambda: not _lives(dies.pid), "the engine to end")
    assert (lives.poll(), dies.wait(), other.returncode) == (None, -signal.SIGKILL, 3)
    lives.kill()
    assert lives.wait() == -signal.SIGKILL


async def test_an_engine_process_ends_when_nobody_is_at_the_other_end(
    light: Callable[[str], Path], channel: tuple[socket.socket, socket.socket]
) -> None:
    light("nobody")
    async with _started() as spawner:
        engine = await spawner.fork([channel[1].fileno()])
        assert engine is not None
        for end in channel:
            end.close()
        assert await asyncio.to_thread(engine.wait) == 0


async def test_an_engine_process_that_somebody_else_waited_for_has_ended(
    light: Callable[[str], Path], channel: tuple[socket.socket, socket.socket]
) -> None:
    light("nobody")
    async with _started() as spawner:
        engine = await spawner.fork([channel[1].fileno()])
        assert engine is not None
        os.kill(engine.pid, signal.SIGKILL)
        await asyncio.to_thread(os.waitpid, engine.pid, 0)
        engine.kill()
        assert engine.wait() == 0


async def test_what_an_engine_process_started_ends_with_it(spawner: Spawner) -> None:
    before = _children()
    with _run("import subprocess; print(subprocess.Popen(['sleep', 'infinity']).pid)") as leader:
        assert leader.stdout is not None
        grandchild = int(leader.stdout.readline())
    assert psutil.Process(grandchild).ppid() == os.getpid()
    await asyncio.to_thread(spawners.end_group, leader.pid)
    assert not psutil.pid_exists(grandchild)
    assert _children() == before
    spawners.end_group(leader.pid)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a socket pair take a few packets only before it has to be waited for."""
    make = socket.socketpair

    def small(*arguments: Any) -> tuple[socket.socket, socket.socket]:
        pair = make(*arguments)
        for end in pair:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return pair

    monkeypatch.setattr(socket, "socketpair", small)


FORKS = 16


async def _suspended(spawner: Spawner, fd: int) -> tuple[psutil.Process, asyncio.Future[list[Child | None]]]:
    """Stops a zygote and asks it to fork more often than it has room for."""
    first = await spawner.fork([fd])
    assert first is not None
    first.kill()
    first.wait()
    zygote = psutil.Process(spawner.pid)
    zygote.suspend()
    forks = asyncio.gather(*(spawner.fork([fd]) for _ in range(FORKS)))
    await asyncio.sleep(0)
    return zygote, forks


async def test_a_zygote_that_is_busy_is_waited_for(
    light: Callable[[str], Path], narrow: None, channel: tuple[socket.socket, socket.socket]
) -> None:
    light("nobody")
    async with _started() as spawner:
        zygote, forks = await _suspended(spawner, channel[1].fileno())
        zygote.resume()
        engines = [child for child in await forks if child is not None]
        assert spawner.pid == zygote.pid
        for engine in engines:
            engine.kill()
            engine.wait()
        assert len({engine.pid for engine in engines}) == FORKS
        assert zygote.num_fds() == 4


async def test_a_zygote_that_stays_busy_is_waited_for_no_longer_than_one_that_hangs(
    light: Callable[[str], Path],
    narrow: None,
    channel: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    light("nobody")
    before = _children()
    async with _started() as spawner:
        monkeypatch.setattr(spawners, "_FORK_S", 0.5)
        _, forks = await _suspended(spawner, channel[1].fileno())
        assert await forks == [None] * FORKS
    assert _children() == before


async def test_a_fork_that_is_cancelled_while_the_zygote_is_busy_leaves_nothing(
    light: Callable[[str], Path], narrow: None, channel: tuple[socket.socket, socket.socket]
) -> None:
    light("nobody")
    before = _children()
    async with _started() as spawner:
        zygote, forks = await _suspended(spawner, channel[1].fileno())
        forks.cancel()
        await asyncio.gather(forks, return_exceptions=True)
        zygote.resume()
        last = await spawner.fork([channel[1].fileno()])
        assert last is not None
        assert _children() - before == {zygote.pid, last.pid}
        last.kill()
        last.wait()


async def test_a_stop_that_comes_as_the_zygote_is_ready_is_not_lost(
    light: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    light("nobody")
    zygote: Any = getattr(spawners, "_Zygote")  # noqa: B009 - it is not ours
    settle = zygote._settle
    stopping: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

    def stop_too(self: object, usable: bool) -> None:
        settle(self, usable)
        if usable:
            stopping.set_result(asyncio.create_task(mine.stop()))

    monkeypatch.setattr(zygote, "_settle", stop_too)
    mine = Spawner()
    mine.start()
    async with asyncio.timeout(60):
        await (await stopping)
    assert mine.pid == 0


@pytest.fixture
def begun() -> Generator[Begun]:
    """An engine process that has been begun ahead."""
    begun = ahead.begin_primed()
    yield begun
    begun.end()


async def test_an_engine_that_was_begun_ahead_is_the_first_that_loads(root: Path, begun: Begun) -> None:
    spawner, order = Spawner(Ahead(primed=begun)), replace(_order(root), engine=OPENVINO)
    first, second = (EngineProcess(EngineLimits(), _no_state, spawner) for _ in range(2))
    try:
        for engine in (first, second):
            loaded = await engine.load(order)
            assert [result.gate for result in loaded.gates] == list(LOADED_GATES)
            assert _status(engine.pid)["Seccomp"] == "2"
            assert "modelport_server.engines.worker" in psutil.Process(engine.pid).cmdline()
            assert _sockets(engine.pid) == 1
        assert first.pid == begun.process.pid != second.pid
    finally:
        await first.stop()
        await second.stop()


async def test_an_engine_that_died_before_it_was_needed_is_started_anew(
    root: Path, begun: Begun, caplog: pytest.LogCaptureFixture
) -> None:
    begun.process.kill()
    begun.process.wait()
    engine = EngineProcess(EngineLimits(), _no_state, Spawner(Ahead(primed=begun)))
    try:
        await engine.load(replace(_order(root), engine=OPENVINO))
    finally:
        await engine.stop()
    assert "an engine process that was begun ahead is of no use" in caplog.text


async def test_an_engine_that_dies_of_its_import_is_not_the_version_s_fault(root: Path, begun: Begun) -> None:
    begun.process.send_signal(signal.SIGSTOP)
    engine = EngineProcess(EngineLimits(), _no_state, Spawner(Ahead(primed=begun)))
    loading = asyncio.create_task(engine.load(replace(_order(root), engine=OPENVINO)))
    try:
        await asyncio.sleep(0)  # it waits for the import by now
        begun.process.kill()
        await loading
        assert engine.pid != begun.process.pid
    finally:
        await engine.stop()


async def test_a_load_that_is_cancelled_during_the_import_leaves_nothing(root: Path, begun: Begun) -> None:
    begun.process.send_signal(signal.SIGSTOP)
    engine = EngineProcess(EngineLimits(), _no_state, Spawner(Ahead(primed=begun)))
    loading = asyncio.create_task(engine.load(replace(_order(root), engine=OPENVINO)))
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await engine.stop()
    assert begun.process.poll() == -signal.SIGKILL


async def test_an_import_ahead_that_takes_for_ever_holds_up_no_load(
    root: Path, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawners, "_IMPORT_S", 0.2)
    begun.process.send_signal(signal.SIGSTOP)
    engine = EngineProcess(EngineLimits(), _no_state, Spawner(Ahead(primed=begun)))
    try:
        await engine.load(replace(_order(root), engine=OPENVINO))
        assert engine.pid != begun.process.pid
    finally:
        await engine.stop()


async def test_an_engine_that_is_not_needed_ends(begun: Begun) -> None:
    before = _children()
    spawner = Spawner(Ahead(primed=begun))
    spawner.end_ahead()
    assert before - _children() == {begun.process.pid}
    assert await spawner.wake([]) is None


async def test_an_engine_that_was_begun_ahead_ends_when_nobody_holds_its_socket(begun: Begun) -> None:
    begun.control.close()
    assert await asyncio.to_thread(begun.process.wait, 60) == 0


async def test_what_is_begun_ahead_ends_with_the_block() -> None:
    before = _children()
    with ahead.begun(zygote=True, primed=True) as processes:
        assert processes.zygote is not None
        assert processes.primed is not None
        assert len(_children() - before) == 2
    assert _children() == before


async def test_a_zygote_that_was_begun_ahead_is_the_first_that_forks(
    light: Callable[[str], Path], channel: tuple[socket.socket, socket.socket]
) -> None:
    light("nobody")
    zygote = ahead.begin_zygote(in_haste=True)
    spawner = Spawner(Ahead(zygote=zygote))
    spawner.start()
    try:
        assert spawner.pid == zygote.process.pid
        child = await spawner.fork([channel[1].fileno()])
        assert child is not None
        child.kill()
        child.wait()
    finally:
        await spawner.stop()


@pytest.mark.parametrize("in_haste", [True, False])
async def test_a_zygote_imports_at_the_ordinary_priority_where_nobody_is_served_yet(
    monkeypatch: pytest.MonkeyPatch, channel: tuple[socket.socket, socket.socket], in_haste: bool
) -> None:
    importing: list[int] = []
    monkeypatch.setattr(
        zygotes, "preload", lambda: importing.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    )
    monkeypatch.setattr(zygotes, "_settled_threads", lambda: 2)  # it is unusable, and returns
    zygotes.Zygote(os.getpid(), channel[1], in_haste=in_haste).serve()
    assert importing == [os.getpriority(os.PRIO_PROCESS, 0) if in_haste else 19]


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
    for pid in {*pids} & _children():  # adopted by these tests, and not by whoever adopts the server's else
        await asyncio.to_thread(os.waitpid, pid, 0)


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


async def test_it_loads_at_the_ordinary_priority_where_nobody_is_served_yet(root: Path, either: Spawner) -> None:
    ordinary = os.getpriority(os.PRIO_PROCESS, 0)
    loading: list[tuple[set[int], int]] = []

    def look(state: str) -> None:
        if state == "warming":
            loading.append((_priorities(engine.pid), len(os.sched_getaffinity(engine.pid))))

    engine = EngineProcess(EngineLimits(), look, either)
    try:
        await engine.load(replace(_order(root), in_haste=True))
    finally:
        await engine.stop()
    assert loading == [({ordinary}, len(os.sched_getaffinity(0)))]


def _priorities(pid: int) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


async def test_a_probe_runs_alone_and_says_what_it_cost(root: Path, spawner: Spawner) -> None:
    manifest = Registry(root).manifest(GOOD, 1)
    servable = Servable(
        _order(root),
        manifest,
        BatchLimits(),
        EngineLimits(),
        on_state=_no_state,
        on_rejected=lambda gate, reason: None,
        spawner=spawner,
    )
    try:
        await servable.start()
        assert [result.gate for result in servable.gates] == list(LOADED_GATES)
        probes = [await servable.probe("", {"x": np.ones((rows, 4), np.float32)}) for rows in (1, 128, 300)]
        assert all(probe.engine_time_us > 0 and probe.cpu_time_us > 0 for probe in probes)
    finally:
        await servable.stop()


async def test_an_engine_has_all_cores_though_the_server_keeps_to_some(root: Path) -> None:
    every = os.sched_getaffinity(0)
    confined = {min(every)}
    for thread in threads():
        os.sched_setaffinity(thread, confined)
    try:
        async with _started() as spawner, _loaded(root, spawner) as (forked, _), _loaded(root, None) as (alone, _):
            where = [os.sched_getaffinity(engine.pid) for engine in (forked, alone)]
    finally:
        for thread in threads():
            os.sched_setaffinity(thread, every)
    assert where == [every, every]
