"""Who answers calls and who makes versions ready keep to different cores: with real processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

import pytest

from modelport_server.engines.cores import CoreSharing, Longest

ALL = frozenset(os.sched_getaffinity(0))
TAKEN = frozenset(sorted(ALL)[1:])
FREE = ALL - TAKEN
SLEEP = "import time; time.sleep(600)"
COMPUTE = "while True: pass"
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
async def _shared(program: str, longest: Longest) -> AsyncGenerator[tuple[CoreSharing, int, int]]:
    """Yields cores that an engine which runs a program shares with another one that loads, and both pids."""
    with _process(program) as serving, _process(SLEEP) as loading:
        os.sched_setaffinity(loading, TAKEN)
        cores = CoreSharing()
        cores.serve(serving, longest)
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
    async with _shared(SLEEP, Longest()) as (cores, serving, loading):
        await _become(lambda: _where() == _where(serving) == FREE)
        os.sched_setaffinity(loading, ALL)  # as it does when it has little time left
        await _become(lambda: _where() == _where(serving) == ALL)
        os.sched_setaffinity(loading, TAKEN)
        await _become(lambda: _where() == _where(serving) == FREE)
        with _process(SLEEP) as late:
            os.sched_setaffinity(late, ALL)
            cores.serve(late, Longest())
            await _become(lambda: _where(late) == FREE)
            cores.forget(late)
        cores.serve(loading, Longest())
        await _become(lambda: _where() == _where(serving) == ALL)


async def test_who_needs_more_cores_has_them() -> None:
    async with _shared(COMPUTE, Longest()) as (_, serving, _):
        await asyncio.sleep(SOON_S)
        assert _where(serving) == ALL


async def test_long_batches_have_all_cores() -> None:
    longest = Longest()
    longest.add(0.1)
    async with _shared(SLEEP, longest) as (_, serving, _):
        await asyncio.sleep(SOON_S)
        assert _where() == _where(serving) == ALL


async def test_one_that_ended_meanwhile_is_no_trouble() -> None:
    async with _shared(SLEEP, Longest()) as (cores, serving, _):
        with _process(SLEEP) as other, _process(SLEEP) as another:
            cores.serve(other, Longest())
            cores.load(another)
        await _become(lambda: _where() == _where(serving) == FREE)
        cores.forget(another)


def test_the_longest_batch_is_forgotten_after_a_while() -> None:
    now = [100.0]
    longest = Longest(lambda: now[0])
    assert longest.get() == 0.0
    longest.add(0.03)
    longest.add(0.02)
    now[0] += 5.5
    longest.add(0.01)
    assert longest.get() == 0.03
    now[0] += 5.5
    assert longest.get() == 0.01
    longest.add(0.002)
    now[0] += 60.0
    assert longest.get() == 0.0
