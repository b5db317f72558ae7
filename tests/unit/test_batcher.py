"""The batcher, one fault at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from modelport_server.batching.batcher import Batcher
from modelport_server.batching.calls import BatchOutput, Call
from modelport_server.batching.counts import Counts, Failure
from modelport_server.errors import EngineDiedError, ExpiredError, ModelFailureError, NotAvailableError, OverloadedError
from modelport_server.options import BatchLimits
from modelport_server.tensors import RawTensor
from tests.support.engines import FakeEngine, Run, ids_of, new_call, numbers, settle, text, texts_of


def _batcher(engine: FakeEngine, **limits: Any) -> Batcher:
    return Batcher(engine, BatchLimits(**limits), 3)


async def _waiting_behind_one(batcher: Batcher, engine: FakeEngine, calls: list[Call]) -> Run:
    """Submits ``calls`` while a batch is under way, so that they will run together; returns that batch."""
    batcher.submit(new_call([999]))
    await settle()
    for call in calls:
        batcher.submit(call)
    await settle()
    assert len(engine.runs) == 1
    return engine.runs[0]


@pytest.mark.parametrize("gone", range(4))
async def test_cancelling_one_of_four_that_run_together_hangs_nobody(gone: int) -> None:
    engine = FakeEngine()
    batcher = _batcher(engine)
    calls = [new_call([number]) for number in range(4)]
    first = await _waiting_behind_one(batcher, engine, calls)
    first.end.set_result(first.output())
    await settle()
    batch = engine.runs[0]
    assert batch.ids == [0, 1, 2, 3]
    calls[gone].future.cancel()
    await settle()
    batch.end.set_result(batch.output())
    await settle()
    for number, call in enumerate(calls):
        if number != gone:
            assert ids_of(call.future.result().outputs[0]) == [number]
    assert batch.released
    assert batcher.idle


async def test_rows_of_a_call_that_was_cancelled_while_it_waited_are_not_run() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine)
    calls = [new_call([number]) for number in range(4)]
    first = await _waiting_behind_one(batcher, engine, calls)
    calls[2].future.cancel()
    await settle()
    assert batcher.waiting_rows == 3
    first.end.set_result(first.output())
    await settle()
    assert engine.runs[0].ids == [0, 1, 3]


async def test_an_expired_call_ends_though_nothing_takes_it_from_the_queue() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine)
    batcher.submit(new_call([1]))
    await settle()
    batcher.pause()
    loop = asyncio.get_running_loop()
    call = new_call([2], deadline=loop.time() + 0.02)
    batcher.submit(call)
    with pytest.raises(ExpiredError):
        await asyncio.wait_for(call.future, 5)
    assert batcher.waiting_rows == 0


async def test_a_bad_row_fails_its_own_call_among_31_others() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine)
    calls = [new_call([number]) for number in range(32)]
    run = await _waiting_behind_one(batcher, engine, calls)
    sizes: list[int] = []
    while engine.runs:
        run = engine.runs[0]
        sizes.append(len(run.ids))
        if 17 in run.ids:
            run.end.set_exception(ModelFailureError("negative", caller_fault=True))
        else:
            run.end.set_result(run.output())
        await settle()
    for number, call in enumerate(calls):
        if number == 17:
            assert isinstance(call.future.exception(), ModelFailureError)
        else:
            assert ids_of(call.future.result().outputs[0]) == [number]
    assert sizes[:2] == [1, 32]
    assert len(sizes) <= 2 + 2 * 5  # halves, and halves of halves


async def test_more_rows_than_the_largest_batch_become_one_answer() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine, max_batch_size=4)
    ids = list(range(100, 111))
    call = new_call(ids, signature="texts")
    batcher.submit(call)
    await settle()
    order = [run.ids for run in engine.runs]
    while engine.runs:
        run = engine.runs[-1]  # the last one first: answers may come in any order
        run.end.set_result(run.output())
        await settle()
    answer = call.future.result()
    assert order == [ids[:4], ids[4:8]]
    assert ids_of(answer.outputs[0]) == ids
    assert texts_of(answer.outputs[1]) == [text(number) for number in ids]


async def test_pieces_of_different_shapes_are_the_models_failure_and_no_garbage() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine, max_batch_size=2)
    call = new_call([1, 2, 3, 4])
    batcher.submit(call)
    await settle()
    wide = numbers("id", [0, 0, 0, 0])
    first, second = engine.runs
    first.end.set_result(first.output())
    second.end.set_result(second.output([RawTensor("id", wide.dtype, (2, 2), wide.data)]))
    await settle()
    with pytest.raises(ModelFailureError, match="differ from batch to batch"):
        call.future.result()


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine, max_enqueued_rows=4)
    await _waiting_behind_one(batcher, engine, [new_call([1, 2, 3])])
    with pytest.raises(OverloadedError) as caught:
        batcher.submit(new_call([4, 5]))
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 5
    batcher.submit(new_call([4]))
    assert batcher.waiting_rows == 4


async def test_one_call_of_any_size_may_wait_alone() -> None:
    engine = FakeEngine(slots=1)
    batcher = _batcher(engine, max_enqueued_rows=4, max_batch_size=2)
    batcher.submit(new_call(list(range(10))))
    await settle()
    assert batcher.waiting_rows == 8


async def test_room_wakes_when_there_is_some() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine, max_enqueued_rows=4)
    waiting = new_call([1, 2, 3])
    await _waiting_behind_one(batcher, engine, [waiting])
    call = new_call([4, 5])
    room = asyncio.create_task(batcher.room(call))
    await settle()
    assert not room.done()
    waiting.future.cancel()
    await settle()
    assert room.done()
    batcher.submit(call)


async def test_closing_ends_what_waits_and_what_waits_for_room() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine, max_enqueued_rows=4)
    waiting = new_call([1, 2, 3])
    run = await _waiting_behind_one(batcher, engine, [waiting])
    late = new_call([4, 5])
    room = asyncio.create_task(batcher.room(late))
    await settle()
    batcher.close(NotAvailableError("closed"))
    await asyncio.wait_for(room, 5)
    with pytest.raises(NotAvailableError):
        batcher.submit(late)
    run.end.set_exception(EngineDiedError("killed"))
    await settle()
    with pytest.raises(NotAvailableError, match="closed"):
        waiting.future.result()
    assert isinstance(run.batch.parts[0].call.future.exception(), EngineDiedError)
    assert batcher.waiting_rows == 0
    assert batcher.idle


async def test_a_paused_batcher_keeps_what_waits_and_goes_on() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine)
    batcher.pause()
    call = new_call([1])
    batcher.submit(call)
    await settle()
    assert not engine.runs
    batcher.resume()
    await settle()
    assert engine.runs[0].ids == [1]
    engine.runs[0].end.set_result(engine.runs[0].output())
    await call.future


async def test_a_call_that_ran_out_of_time_is_not_even_queued() -> None:
    batcher = _batcher(FakeEngine())
    with pytest.raises(ExpiredError):
        batcher.submit(new_call([1], deadline=asyncio.get_running_loop().time() - 1))
    assert batcher.waiting_rows == 0


async def test_a_busy_signature_does_not_starve_another() -> None:
    engine = FakeEngine(slots=2)
    batcher = _batcher(engine, max_batch_size=4)
    numbers_of = iter(range(10_000))
    for _ in range(4):
        batcher.submit(new_call([next(numbers_of) for _ in range(4)]))
    lone = new_call([7], signature="texts")
    batcher.submit(lone)
    for _ in range(6):  # the busy one always has full batches waiting
        batcher.submit(new_call([next(numbers_of) for _ in range(4)]))
        await settle()
        run = engine.runs[0]
        run.end.set_result(run.output())
        await settle()
    assert lone.future.done()
    assert ids_of(lone.future.result().outputs[0]) == [7]


async def test_what_waits_can_be_taken_out() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine)
    calls = [new_call([number]) for number in range(4)]
    for call in calls[:3]:
        call.movable = True
    first = await _waiting_behind_one(batcher, engine, calls)
    calls[1].future.cancel()
    await settle()
    assert batcher.take_waiting() == [calls[0], calls[2]]
    assert batcher.take_waiting() == []
    assert batcher.waiting_rows == 1
    first.end.set_result(first.output())
    await settle()
    assert engine.runs[0].ids == [3]  # its caller has named this version
    engine.runs[0].end.set_result(engine.runs[0].output())
    await settle()
    assert batcher.idle
    assert not calls[0].ended
    assert not calls[2].ended


async def test_calls_that_come_together_run_together() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine)
    for number in range(4):
        batcher.submit(new_call([number]))
    await settle()
    assert [run.ids for run in engine.runs] == [[0, 1, 2, 3]]


async def _two_instances(*, slots: int = 3, **limits: Any) -> tuple[FakeEngine, Batcher]:
    """Returns an engine that runs two batches at once, and has run a row in 0.1 ms."""
    engine = FakeEngine(slots=slots, instances=2)
    batcher = _batcher(engine, **limits)
    batcher.submit(new_call([99]))
    await settle()
    engine.runs[0].end.set_result(engine.runs[0].output())
    await settle()
    return engine, batcher


def _whole(ids: Sequence[int]) -> Call:
    """Returns a call that idle instances don't share."""
    call = new_call(ids)
    call.shareable = False
    return call


async def test_an_idle_instance_takes_no_fewer_rows_than_a_busy_one_has() -> None:
    engine, batcher = await _two_instances()
    batcher.submit(_whole(range(30)))
    await settle()
    batcher.submit(_whole(range(30, 59)))
    await settle()
    assert len(engine.runs) == 1
    batcher.submit(_whole([59]))
    await settle()
    assert [run.ids for run in engine.runs] == [list(range(30)), list(range(30, 60))]
    batcher.submit(_whole([60, 61]))
    await settle()
    assert len(engine.runs) == 2, "both are busy, and it is not full"
    for run in list(engine.runs):
        run.end.set_result(run.output())
    await settle()
    assert [run.ids for run in engine.runs] == [[60, 61]], "nothing runs beside it"


async def test_an_idle_instance_takes_no_fewer_rows_than_are_worth_while_to_run() -> None:
    engine, batcher = await _two_instances()
    batcher.submit(new_call([0]))
    await settle()
    batcher.submit(new_call(range(1, 10)))
    await settle()
    assert [run.ids for run in engine.runs] == [[0]], "nine rows take less than 1 ms"
    batcher.submit(new_call([10]))
    await settle()
    assert [run.ids for run in engine.runs] == [[0], list(range(1, 11))]


def _end(run: Run) -> None:
    """Ends a batch whose rows took 0.1 ms each."""
    run.end.set_result(BatchOutput(run.inputs, 100 * len(run.ids), lambda: None))


async def test_small_calls_become_two_batches_for_each_instance() -> None:
    engine, batcher = await _two_instances(slots=4, efficient_batch_size=2)
    for number in range(80):
        batcher.submit(new_call([number]))
    await settle()
    quarters = [list(range(first, first + 20)) for first in range(0, 80, 20)]
    assert [run.ids for run in engine.runs] == quarters
    _end(engine.runs[0])
    await settle()
    for number in range(20):
        batcher.submit(new_call([number]))
    await settle()
    assert [run.ids for run in engine.runs] == [*quarters[1:], quarters[0]], "it waits in the engine behind the others"


async def test_what_callers_have_under_way_is_remembered_while_they_read_their_answers() -> None:
    engine, batcher = await _two_instances(slots=4, efficient_batch_size=2)
    for _ in range(20):
        for number in range(80):
            batcher.submit(new_call([number]))
        await settle()
        while engine.runs:
            _end(engine.runs[0])
            await settle()
    for number in range(36):
        batcher.submit(new_call([number]))
    await settle()
    assert len(engine.runs[0].ids) == 12, "and not the ten that are the fewest: it was some fifty, on average"


async def test_an_idle_instance_needs_no_more_than_its_part_of_the_rows() -> None:
    engine, batcher = await _two_instances(efficient_batch_size=2)
    batcher.submit(_whole(range(60)))
    await settle()
    for number in range(60, 79):
        batcher.submit(new_call([number]))
    await settle()
    assert [len(run.ids) for run in engine.runs] == [60], "there would be four batches of twenty"
    batcher.submit(new_call([79]))
    await settle()
    assert [run.ids for run in engine.runs] == [list(range(60)), list(range(60, 80))]


@pytest.mark.parametrize(
    ("efficient", "calls", "rows", "sizes"),
    [
        (0, 80, 1, [40, 40]),
        (32, 80, 1, [32, 48]),
        (2, 16, 1, [16]),
        (2, 8, 15, [30, 30, 30, 30]),
        (2, 8, 21, [84, 84]),
    ],
    ids=["unknown", "costly batches", "too few", "whole calls", "long calls"],
)
async def test_calls_become_fewer_batches_where_that_is_better(
    efficient: int, calls: int, rows: int, sizes: list[int]
) -> None:
    engine, batcher = await _two_instances(slots=4, efficient_batch_size=efficient)
    for first in range(0, calls * rows, rows):
        batcher.submit(new_call(range(first, first + rows)))
    await settle()
    assert [len(run.ids) for run in engine.runs] == sizes, "what is left waits for the end of one"


async def test_each_signature_has_its_own_rate() -> None:
    """Though a row of another one that waits takes long."""
    engine, batcher = await _two_instances(slots=4, efficient_batch_size=2)
    batcher.submit(new_call([99], signature="texts"))
    await settle()
    slow = engine.runs[0]
    slow.end.set_result(BatchOutput(slow.inputs, 100_000, lambda: None))
    await settle()
    for number in range(80):
        batcher.submit(new_call([number]))
    batcher.submit(new_call([80], signature="texts"))
    await settle()
    assert [len(run.ids) for run in engine.runs] == [21, 21, 21], "of all 81"


async def test_what_runs_by_itself_says_nothing_of_rows_that_run_together() -> None:
    engine, batcher = await _two_instances(slots=4, efficient_batch_size=2)
    batcher.submit(new_call(range(32), splittable=False))
    await settle()
    probe = engine.runs[0]
    probe.end.set_result(BatchOutput(probe.inputs, 100_000, lambda: None))
    await settle()
    for number in range(80):
        batcher.submit(new_call([number]))
    await settle()
    assert [len(run.ids) for run in engine.runs] == [20, 20, 20, 20]


async def test_nobody_waits_for_a_batch_that_should_have_been_over_soon() -> None:
    engine, batcher = await _two_instances()
    batcher.submit(new_call([0]))
    await settle()
    begun = asyncio.Event()
    engine.on_run = lambda _: begun.set()
    batcher.submit(new_call([1]))
    await asyncio.wait_for(begun.wait(), 10)
    assert [run.ids for run in engine.runs] == [[0], [1]]


async def test_nobody_waits_for_a_slow_signature() -> None:
    """Though another signature of the version is fast."""
    engine, batcher = await _two_instances()
    batcher.submit(new_call([0], signature="texts"))
    await settle()
    slow = engine.runs[0]
    slow.end.set_result(BatchOutput(slow.inputs, 100_000, lambda: None))
    await settle()
    batcher.submit(new_call([1], signature="texts"))
    await settle()
    batcher.submit(new_call([2]))
    await settle()
    assert [run.ids for run in engine.runs] == [[1], [2]]


async def test_nobody_waits_for_a_batch_that_takes_long() -> None:
    engine, batcher = await _two_instances(max_batch_size=1000)
    long = new_call(range(250))
    long.shareable = False
    batcher.submit(long)
    await settle()
    batcher.submit(new_call([300]))
    await settle()
    assert [run.ids for run in engine.runs] == [list(range(250)), [300]]


async def test_what_waits_behind_a_larger_batch_runs_when_that_has_ended() -> None:
    engine, batcher = await _two_instances()
    batcher.submit(new_call([0, 1]))
    await settle()
    batcher.submit(new_call([3]))
    await settle()
    engine.runs[0].end.set_result(engine.runs[0].output())
    await settle()
    assert [run.ids for run in engine.runs] == [[3]]


async def test_idle_instances_share_a_call_that_is_long_to_run() -> None:
    engine, batcher = await _two_instances()
    call = new_call(range(60))
    batcher.submit(call)
    await settle()
    assert [run.ids for run in engine.runs] == [list(range(30)), list(range(30, 60))]
    for run in list(engine.runs):
        run.end.set_result(run.output())
    assert ids_of((await call.future).outputs[0]) == list(range(60))


@pytest.mark.parametrize(("rows", "shareable"), [(19, True), (60, False)])
async def test_a_call_runs_in_one_batch(rows: int, shareable: bool) -> None:
    """Where it is over in no time, or its outputs could come out differently in parts."""
    engine, batcher = await _two_instances()
    call = new_call(range(rows))
    call.shareable = shareable
    batcher.submit(call)
    await settle()
    assert [run.ids for run in engine.runs] == [list(range(rows))]


async def test_nothing_is_shared_until_something_has_run() -> None:
    engine = FakeEngine(slots=3, instances=2)
    batcher = _batcher(engine)
    batcher.submit(new_call(range(60)))
    await settle()
    assert len(engine.runs) == 1


async def test_an_engine_that_is_dead_already_fails_its_calls_and_no_later_ones() -> None:
    engine = FakeEngine()
    engine.dead = True
    batcher = _batcher(engine)
    call = new_call([1])
    batcher.submit(call)
    with pytest.raises(EngineDiedError):
        await call.future
    engine.dead = False
    later = new_call([2])
    batcher.submit(later)
    await settle()
    engine.runs[0].end.set_result(engine.runs[0].output())
    assert ids_of((await later.future).outputs[0]) == [2]


async def test_a_full_batch_waits_in_the_engine_behind_those_that_run() -> None:
    engine = FakeEngine(slots=3, instances=2)
    batcher = _batcher(engine, max_batch_size=2)
    for number in range(0, 10, 2):
        batcher.submit(new_call([number, number + 1]))
    await settle()
    assert [run.ids for run in engine.runs] == [[0, 1], [2, 3], [4, 5]]


async def test_calls_are_counted_by_how_they_ended() -> None:
    engine = FakeEngine()
    batcher = _batcher(engine, max_enqueued_rows=4)
    calls = [new_call([number]) for number in range(4)]
    first = await _waiting_behind_one(batcher, engine, calls)
    with pytest.raises(OverloadedError):
        batcher.submit(new_call([4, 5]))
    with pytest.raises(ExpiredError):
        batcher.submit(new_call([6], deadline=0.0))
    calls[0].future.cancel()
    calls[1].movable = True
    assert batcher.take_waiting() == [calls[1]]  # from now on it is another version's
    first.end.set_result(first.output())
    await settle()
    while engine.runs:  # both that are left, and then each by itself
        run = engine.runs[0]
        if 3 in run.ids:
            run.end.set_exception(ModelFailureError("negative", caller_fault=True))
        else:
            run.end.set_result(run.output())
        await settle()
    calls[1].future.cancel()
    await settle()
    counts = batcher.counts
    assert sum(counts.answered) == 2
    assert counts.failed == {
        Failure(OverloadedError): 1,
        Failure(ExpiredError): 1,
        Failure(asyncio.CancelledError): 1,
        Failure(ModelFailureError, caller_fault=True): 1,
    }
    assert (counts.batches, counts.rows) == (2, 2)
    assert counts.answered_s > 0


@pytest.mark.parametrize(("seconds", "place"), [(0.0, 0), (0.0005, 0), (0.00051, 1), (10.0, 13), (99.0, 14)])
async def test_the_class_of_a_time_is_that_of_the_least_bound_that_it_is_not_over(seconds: float, place: int) -> None:
    counts = Counts()
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    counts.end(future, seconds)
    assert counts.answered.index(1) == place


@pytest.mark.parametrize(
    ("left_s", "time_s", "kind"),
    [
        (0.0, 10.0, ExpiredError),
        (0.21, 10.0, ExpiredError),
        (0.4, 10.0, asyncio.CancelledError),
        (0.9, 3600.0, ExpiredError),
        (1.5, 3600.0, asyncio.CancelledError),
        (float("inf"), float("inf"), asyncio.CancelledError),
    ],
)
async def test_who_hangs_up_almost_at_the_deadline_has_not_given_up(
    left_s: float, time_s: float, kind: type[BaseException]
) -> None:
    now = 1000.0
    batcher = Batcher(FakeEngine(), BatchLimits(), 3, clock=lambda: now)
    call = new_call([1], deadline=now + time_s)
    batcher.submit(call)
    now += time_s - left_s if left_s < float("inf") else 5.0
    call.future.cancel()
    await settle()
    assert batcher.counts.failed == {Failure(kind): 1}


@pytest.mark.parametrize(("left_s", "kind"), [(0.01, ExpiredError), (1.0, asyncio.CancelledError)])
async def test_calls_that_were_given_up_while_they_waited_for_room_are_counted_alike(
    left_s: float, kind: type[BaseException]
) -> None:
    batcher = Batcher(FakeEngine(), BatchLimits(), 3, clock=lambda: 1000.0)
    call = new_call([1], deadline=1000.0 + left_s)
    call.future.cancel()
    batcher.count_end(call)
    assert batcher.counts.failed == {Failure(kind): 1}
