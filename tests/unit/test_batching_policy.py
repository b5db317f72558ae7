"""The batching policy: which rows run together."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Generator
from dataclasses import replace

import pytest

from modelport_server.batching.calls import Call
from modelport_server.batching.policy import close_batch
from modelport_server.options import BatchLimits
from tests.support.engines import new_call

LIMITS = BatchLimits(max_batch_size=4, max_batch_bytes=64)


@pytest.fixture
def loop() -> Generator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def _calls(loop: asyncio.AbstractEventLoop, *sizes: int, splittable: bool = True) -> list[Call]:
    return [new_call(list(range(size)), loop, splittable=splittable) for size in sizes]


def _closed(
    calls: list[Call],
    limits: BatchLimits = LIMITS,
    *,
    gather: float = 1,
    most: int | None = None,
    enough: float = math.inf,
) -> list[tuple[int, int, int]] | None:
    """Returns the batch as (index of the call, first row, row after the last)."""
    selection = close_batch(calls, limits, gather=gather, most=most, enough=enough)
    return None if selection is None else [(calls.index(call), start, stop) for call, start, stop in selection.parts]


def test_an_idle_engine_takes_whatever_waits(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1)) == [(0, 0, 1)]
    assert _closed(_calls(loop, 1, 2)) == [(0, 0, 1), (1, 0, 2)]
    assert _closed([]) is None


def test_a_busy_engine_gets_full_batches_alone(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1, 2), gather=math.inf) is None
    assert _closed(_calls(loop, 1, 3), gather=math.inf) == [(0, 0, 1), (1, 0, 3)]


def test_the_last_call_is_split_where_the_batch_is_full(loop: asyncio.AbstractEventLoop) -> None:
    calls = _calls(loop, 3, 5)
    assert _closed(calls) == [(0, 0, 3), (1, 0, 1)]
    calls[1].taken_rows = 1
    assert _closed(calls[1:]) == [(0, 1, 5)]


def test_bytes_bound_a_batch_too(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 4), replace(LIMITS, max_batch_bytes=16), gather=math.inf) == [(0, 0, 2)]


def test_a_row_larger_than_a_batch_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1, 1), replace(LIMITS, max_batch_bytes=7)) == [(0, 0, 1)]
    assert _closed(_calls(loop, 2), replace(LIMITS, max_batch_bytes=7)) == [(0, 0, 1)]


def test_a_call_that_cant_be_split_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 9, 1, splittable=False)) == [(0, 0, 1)]
    assert _closed(_calls(loop, 1, splittable=False), gather=math.inf) == [(0, 0, 1)]
    mixed = [*_calls(loop, 1), *_calls(loop, 1, splittable=False)]
    assert _closed(mixed, gather=math.inf) == [(0, 0, 1)]


def test_a_batch_is_closed_with_the_rows_that_are_asked_for(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1, 1), gather=3) is None
    assert _closed(_calls(loop, 1, 1, 1), gather=3) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert _closed(_calls(loop, 3, 3), gather=99) == [(0, 0, 3), (1, 0, 1)], "it is full"


def test_a_batch_may_have_fewer_rows_than_the_limits_say(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1, 3), most=3) == [(0, 0, 1), (1, 0, 2)]
    assert _closed(_calls(loop, 9), most=9) == [(0, 0, 4)]


def test_a_batch_with_enough_rows_is_full_and_no_call_is_split_for_it(loop: asyncio.AbstractEventLoop) -> None:
    assert _closed(_calls(loop, 1, 1, 1), enough=2) == [(0, 0, 1), (1, 0, 1)]
    assert _closed(_calls(loop, 1, 1, 1), enough=2, gather=math.inf) == [(0, 0, 1), (1, 0, 1)]
    assert _closed(_calls(loop, 1, 2, 1), enough=2) == [(0, 0, 1), (1, 0, 2)]
    assert _closed(_calls(loop, 3, 1), enough=1) == [(0, 0, 3)]
    assert _closed(_calls(loop, 1), enough=2, gather=math.inf) is None


def test_calls_of_a_message_are_not_divided_unless_the_batch_is_full(loop: asyncio.AbstractEventLoop) -> None:
    calls = _calls(loop, 1, 1, 1, 1, 1)
    calls[1].message = calls[2].message = "a message"
    calls[3].message = "another"
    assert _closed(calls, enough=2) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert _closed(calls, enough=3) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert _closed(calls[1:], enough=2) == [(0, 0, 1), (1, 0, 1)]
    calls[3].message = "a message"
    assert _closed(calls, enough=1) == [(0, 0, 1)]
    assert _closed(calls, replace(LIMITS, max_batch_size=3), enough=2) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert _closed(calls[1:4], enough=1, gather=math.inf) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
