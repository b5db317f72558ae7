"""Who answers calls and who makes versions ready keep to different cores: with real processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

import pytest

from modelport_server.engines._system import fewer_cores
from modelport_server.engines.cores import BatchTimes, Calm, CoreSharing

ALL = frozenset(os.sched_getaffinity(0))
TAKEN = frozenset(sorted(ALL)[1:])
FREE = ALL - TAKEN
SLEEP = "import time; time.sleep(600)"
TIMEOUT_S = 30.0
SOON_S = 3.0
"""Longer than it takes to move anybody."""

pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="there is one core only")


@contextmanager
def _process(program: str) -> Generator[int]:
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def _shared(
    times: BatchTimes, calls: Callable[[], int] = lambda: 1
) -> AsyncGenerator[tuple[CoreSharing, int, int]]:
    """Yields cores that an engine shares with another one that loads, and both pids."""
    with _process(SLEEP) as serving, _process(SLEEP) as loading:
        os.sched_setaffinity(loading, TAKEN)
        cores = CoreSharing(calls)
        cores.serve(serving, times)
        cores.load(loading)
        try:
            yield cores, serving, loading
        finally:
            cores.forget(loading)
            await _become(lambda: _where() == ALL)


async def _become(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - nobody tells when the kernel has moved a process
            await asyncio.sleep(0.01)


def _where(pid: int = 0) -> frozenset[int]:
    return frozenset(os.sched_getaffinity(pid))


async def test_who_answers_leaves_the_cores_of_who_loads_and_comes_back() -> None:
    async with _shared(BatchTimes()) as (cores, serving, loading):
        await _become(lambda: _where() == _where(serving) == FREE)
        os.sched_setaffinity(loading, ALL)  # as it does when it has little time left
        await _become(lambda: _where() == _where(serving) == ALL)
        os.sched_setaffinity(loading, TAKEN)
        await _become(lambda: _where() == _where(serving) == FREE)
        with _process(SLEEP) as late:
            os.sched_setaffinity(late, ALL)
            cores.serve(late, BatchTimes())
            await _become(lambda: _where(late) == FREE)
            cores.forget(late)
        cores.serve(loading, BatchTimes())
        await _become(lambda: _where() == _where(serving) == ALL)


async def test_who_needs_more_cores_has_them() -> None:
    calls = [2]
    async with _shared(BatchTimes(), lambda: calls[0]) as (_, serving, _):
        await asyncio.sleep(SOON_S)
        assert _where() == _where(serving) == ALL
        calls[0] = 0
        await _become(lambda: _where() == _where(serving) == FREE)
        calls[0] = 64
        await _become(lambda: _where() == _where(serving) == ALL)


async def test_who_gets_copies_keeps_off_the_cores_of_who_answers() -> None:
    cores = CoreSharing(lambda: 1)
    with _process(SLEEP) as serving, _process(SLEEP) as candidate:
        cores.serve(serving, BatchTimes())
        times = BatchTimes()
        times.add(0.1, 0.2)
        cores.serve(candidate, times)
        cores.copy_to({candidate})
        taken = fewer_cores(ALL)
        await _become(lambda: _where() == _where(serving) == ALL - taken != _where(candidate))
        assert len(_where(candidate)) == len(ALL - taken)
        assert _where(candidate) <= taken
        cores.copy_to(frozenset())
        await _become(lambda: _where() == _where(serving) == _where(candidate) == ALL)


async def test_who_is_measured_has_as_many_cores_as_who_answers() -> None:
    cores = CoreSharing(lambda: 1)
    with _process(SLEEP) as serving, _process(SLEEP) as candidate:
        cores.serve(serving, BatchTimes())
        cores.serve(candidate, BatchTimes())
        free = ALL - fewer_cores(ALL)
        with cores.measuring(lambda: {candidate}):
            await _become(lambda: _where() == _where(serving) == free != _where(candidate))
            assert len(_where(candidate)) == len(free)
            assert not _where(candidate) & free
        await _become(lambda: _where() == _where(serving) == _where(candidate) == ALL)


async def test_who_is_measured_and_not_called_is_put_aside_whatever_its_batches_gain() -> None:
    cores, called = CoreSharing(lambda: 1), set[int]()
    with _process(SLEEP) as serving, _process(SLEEP) as stable, _process(SLEEP) as candidate:
        for pid in (stable, candidate):
            times = BatchTimes()
            times.add(0.1, 0.1 * 2 * len(ALL))
            cores.serve(pid, times)
        cores.serve(serving, BatchTimes())
        free = ALL - fewer_cores(ALL)
        with cores.measuring(lambda: {stable, candidate} - called):
            await _become(lambda: _where() == _where(serving) == free)
            assert _where(stable) == _where(candidate)
            assert len(_where(stable)) == len(free)
            assert not _where(stable) & free
            called.add(stable)
            await _become(lambda: _where() == _where(serving) == _where(stable) == _where(candidate) == ALL)
            called.clear()
            await _become(lambda: _where() == free != _where(stable))
        await _become(lambda: _where() == _where(serving) == _where(stable) == _where(candidate) == ALL)


async def test_long_batches_have_all_cores() -> None:
    times = BatchTimes()
    times.add(0.1, 0.2)
    async with _shared(times) as (_, serving, _):
        await asyncio.sleep(SOON_S)
        assert _where() == _where(serving) == ALL


def _looks(calm: Calm, count: int, calls: int, *, cores: int = 1, gain: bool = False, now_s: float = 0.0) -> list[bool]:
    return [calm.look(calls, cores, gain=gain, now_s=now_s + 0.05 * number) for number in range(count)]


def test_it_is_calm_until_something_says_otherwise() -> None:
    assert Calm(1, 0.0).look(1, 1, gain=False, now_s=0.0)
    assert not Calm(2, 0.0).look(2, 1, gain=False, now_s=0.0)
    assert Calm(2, 0.0).look(2, 2, gain=False, now_s=0.0)
    assert not Calm(0, 0.0).look(0, 1, gain=True, now_s=0.0)
    assert not Calm(0, 0.0).look(0, 0, gain=False, now_s=0.0)


def test_a_burst_counts_at_once_and_more_calls_than_cores_soon() -> None:
    calm = Calm(1, 0.0)
    assert all(_looks(calm, 100, 1))
    assert not calm.look(64, 1, gain=False, now_s=5.0)
    few = Calm(1, 0.0)
    seen = _looks(few, 100, 2)
    assert seen[0]
    assert not any(seen[10:])


def test_it_has_to_be_calm_for_a_while_again() -> None:
    calm = Calm(1, 0.0)
    assert not calm.look(1, 1, gain=True, now_s=0.0)
    seen = _looks(calm, 40, 1, now_s=0.05)
    assert seen.index(True) == 20
    assert all(seen[20:])


async def test_nobody_is_moved_once_it_is_over() -> None:
    cores = CoreSharing(lambda: 1)
    with _process(SLEEP) as serving, _process(SLEEP) as candidate:
        cores.serve(serving, BatchTimes())
        cores.serve(candidate, BatchTimes())
        cores.copy_to({candidate})
        await _become(lambda: _where(serving) != ALL != _where(candidate))
        await cores.stop()
        assert _where() == _where(serving) == _where(candidate) == ALL
        cores.load(candidate)
        await asyncio.sleep(0.2)
        assert _where(serving) == ALL


async def test_long_batches_that_use_one_core_are_left_with_it() -> None:
    times = BatchTimes()
    times.add(0.1, 0.1)
    async with _shared(times) as (_, serving, _):
        await _become(lambda: _where() == _where(serving) == FREE)
        assert times.confined
        times.add(0.1, 0.9)  # nothing shows how many it would use: this says nothing
        await asyncio.sleep(SOON_S)
        assert _where(serving) == FREE
    assert not times.confined


def test_batches_gain_from_cores_that_they_keep_busy() -> None:
    times = BatchTimes()
    assert not times.gain(1)
    times.add(0.02, 0.02)
    assert times.gain(1), "too little was seen to know"
    for _ in range(5):
        times.add(0.02, 0.02)
    assert not times.gain(1)
    for _ in range(200):
        times.add(0.02, 0.06)
    assert times.gain(1)
    assert times.gain(2)
    assert not times.gain(3)
    for _ in range(50_000):
        times.add(0.001, 0.004)
    assert not times.gain(1), "short ones lose more by a tick"


def test_batches_that_run_at_once_keep_a_core_busy_each() -> None:
    times = BatchTimes()
    for _ in range(20):
        times.add(0.02, 0.02, 0.01)  # two at a time, on a thread each
    assert times.gain(1)
    assert not times.gain(2)


async def test_one_that_ended_meanwhile_is_no_trouble() -> None:
    async with _shared(BatchTimes()) as (cores, serving, _):
        with _process(SLEEP) as other, _process(SLEEP) as another:
            cores.serve(other, BatchTimes())
            cores.load(another)
        await _become(lambda: _where() == _where(serving) == FREE)
        cores.forget(another)


def test_batches_are_weighted_by_what_they_took_and_forgotten_after_a_while() -> None:
    now = [100.0]
    times = BatchTimes(lambda: now[0])
    assert times.typical() == 0.0
    for _ in range(99):
        times.add(0.001, 0.001)
    assert times.typical() == pytest.approx(0.001)
    times.add(0.1, 0.2)
    assert 0.04 < times.typical() < 0.06
    now[0] += 5.5
    for _ in range(5000):
        times.add(0.001, 0.001)
    assert 0.002 < times.typical() < 0.004
    now[0] += 5.5
    assert times.typical() == pytest.approx(0.001)
    now[0] += 60.0
    assert times.typical() == 0.0
