"""The batcher under any arrivals, sizes, cancellations, deadlines and engine failures."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelport_server.batching.batcher import Batcher
from modelport_server.batching.calls import Call
from modelport_server.errors import (
    EngineDiedError,
    ExpiredError,
    ModelFailureError,
    NotAvailableError,
    OverloadedError,
    ServeError,
)
from modelport_server.options import BatchLimits
from modelport_server.tensors import RawTensor
from tests.support.engines import FakeEngine, Run, ids_of, new_call, numbers, text, texts_of

VERSION = 7
STEPS_TO_SETTLE = 12


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until the test moves it."""

    now = 1000.0

    def time(self) -> float:
        return self.now


class BatcherMachine(RuleBasedStateMachine):
    """Drives a batcher and keeps, beside it, the books of what must come out."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.calls: dict[Call, list[int]] = {}
        self.bad: set[int] = set()
        self.next_id = 0
        self.ran: set[int] = set()
        self.last_ran: dict[tuple[object, ...], int] = {}
        self.paused = False
        self.expected: dict[Call, type[BaseException]] = {}
        """How a call must have ended, where it did not get an answer."""
        self.problems: list[Exception] = []
        self.failed_together: set[Call] = set()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))

    @initialize(
        instances=st.integers(1, 3),
        waiting=st.integers(0, 2),
        batch_size=st.sampled_from([6, 8, 3, 1]),
        batch_bytes=st.sampled_from([10_000, 10_000, 100, 24, 8]),
        queue_rows=st.integers(4, 64),
        queue_bytes=st.sampled_from([100_000, 100_000, 300, 40]),
    )
    def start(
        self, instances: int, waiting: int, batch_size: int, batch_bytes: int, queue_rows: int, queue_bytes: int
    ) -> None:
        self.limits = BatchLimits(
            max_batch_size=batch_size,
            max_batch_bytes=batch_bytes,
            max_enqueued_rows=queue_rows,
            max_enqueued_bytes=queue_bytes,
        )
        self.engine = FakeEngine(instances + waiting, instances, self.look_at)
        self.batcher = Batcher(self.engine, self.limits, VERSION, clock=self.loop.time)

    def settle(self) -> None:
        for _ in range(STEPS_TO_SETTLE):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        for call in self.calls:  # whatever has expired by now must have been told so, unless it runs
            if call.deadline <= self.loop.now and call not in self.expected and self.waiting_rows(call):
                self.expected[call] = ExpiredError
        for call in self.failed_together:  # it may expire before it is run again, by itself
            if call.deadline <= self.loop.now and call not in self.expected and call.ended:
                self.expected[call] = ExpiredError

    def in_loop(self, act: Any) -> Any:
        async def run() -> Any:
            return act()

        return self.loop.run_until_complete(run())

    def waiting_rows(self, call: Call) -> int:
        """How many rows of a call must still wait."""
        if call.splittable:
            return sum(number not in self.ran for number in self.calls[call])
        return int(not self.ran.issuperset(self.calls[call]))

    def look_at(self, run: Run) -> None:
        """Keeps what is wrong with a batch for later, because the batcher takes it for the engine's failure."""
        try:
            self.on_run(run)
        except Exception as error:
            self.problems.append(error)

    def on_run(self, run: Run) -> None:
        """Checks a batch as the engine gets it."""
        parts = run.batch.parts
        assert len(self.engine.runs) <= self.engine.slots
        self.check_batch(run)
        for part in parts:
            call = part.call
            ids = self.calls[call]
            assert not call.ended
            first_time = not self.ran.intersection(run.ids)
            if first_time:
                assert call.deadline > self.loop.now, "a row was run for a call that has expired"
                assert ids[part.start] > self.last_ran.get(call.key, -1), "rows were not run in their order"
                self.last_ran[call.key] = ids[part.stop - 1] if call.splittable else ids[-1]
        self.ran.update(run.ids)

    def check_batch(self, run: Run) -> None:
        parts = run.batch.parts
        assert len({part.call.key for part in parts}) == 1
        assert len({part.call for part in parts}) == len(parts)
        assert run.batch.signature == parts[0].call.signature
        if not all(part.call.splittable for part in parts):
            assert len(parts) == 1
            assert parts[0].rows == parts[0].call.rows
            return
        assert run.ids == [number for part in parts for number in self.calls[part.call][part.start : part.stop]]
        assert 1 <= run.batch.rows <= self.limits.max_batch_size
        size = sum(part.call.bytes * part.rows / part.call.rows for part in parts)
        assert size <= self.limits.max_batch_bytes + 0.5 or run.batch.rows == 1

    @rule(
        rows=st.integers(1, 9),
        signature=st.sampled_from(["numbers", "texts"]),
        splittable=st.sampled_from([True, True, True, False]),
        patience_s=st.sampled_from([-1.0, 0.5, 2.0, float("inf"), float("inf"), float("inf")]),
        bad=st.sampled_from([frozenset[int](), frozenset[int](), frozenset({0}), frozenset({2, 5})]),
    )
    def submit(self, rows: int, signature: str, splittable: bool, patience_s: float, bad: frozenset[int]) -> None:
        ids = list(range(self.next_id, self.next_id + rows))
        self.next_id += rows
        deadline = self.loop.now + patience_s
        call = new_call(ids, self.loop, signature=signature, splittable=splittable, deadline=deadline)
        fits = self.fits(call)
        self.calls[call] = ids
        self.bad.update(ids[row] for row in bad if row < rows)
        try:
            self.in_loop(lambda: self.batcher.submit(call))
        except OverloadedError:
            assert not fits
            del self.calls[call]
        except ExpiredError:
            assert patience_s <= 0
            del self.calls[call]
        else:
            assert fits
        self.settle()

    def fits(self, call: Call) -> bool:
        rows = sum(self.waiting_rows(other) for other in self.calls if not other.ended)
        size = sum(other.bytes for other in self.calls if not other.ended and self.waiting_rows(other))
        return (not rows) or (
            rows + call.rows <= self.limits.max_enqueued_rows and size + call.bytes <= self.limits.max_enqueued_bytes
        )

    @precondition(lambda self: any(not call.ended for call in self.calls))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from([call for call in self.calls if not call.ended]))
        call.future.cancel()
        self.expected[call] = asyncio.CancelledError
        self.settle()

    @rule(step_s=st.sampled_from([0.1, 0.6, 3.0]))
    def time_passes(self, step_s: float) -> None:
        self.loop.now += step_s
        self.settle()

    @rule()
    def pause(self) -> None:
        self.batcher.pause()
        self.paused = True

    @rule()
    def resume(self) -> None:
        self.in_loop(self.batcher.resume)
        self.paused = False
        self.settle()

    def draw_run(self, data: st.DataObject) -> Run:
        return data.draw(st.sampled_from(self.engine.runs))

    @precondition(lambda self: bool(self.engine.runs))
    @rule(data=st.data())
    def batch_ends(self, data: st.DataObject) -> None:
        self.end(self.draw_run(data))
        self.settle()

    @precondition(lambda self: bool(self.engine.runs))
    @rule(data=st.data(), shape=st.sampled_from(["short", "long", "scalar"]))
    def wrong_shape(self, data: st.DataObject, shape: str) -> None:
        run = self.draw_run(data)
        if not run.batch.parts[0].call.splittable:
            self.end(run)
        else:
            rows = {"short": run.ids[1:], "long": [*run.ids, 0], "scalar": [0]}[shape]
            odd = numbers("id", rows)
            if shape == "scalar":
                odd = RawTensor("id", odd.dtype, (), odd.data)
            self.blame(run, ModelFailureError)
            run.end.set_result(run.output([odd, *run.inputs[1:]]))
        self.settle()

    @precondition(lambda self: bool(self.engine.runs))
    @rule(data=st.data(), error=st.sampled_from([EngineDiedError("died"), RuntimeError("a bug"), OSError(5, "io")]))
    def engine_dies(self, data: st.DataObject, error: Exception) -> None:
        run = self.draw_run(data)
        for part in run.batch.parts:
            if not part.call.ended:
                self.expected[part.call] = NotAvailableError
        run.end.set_exception(error)
        self.settle()

    def end(self, run: Run) -> None:
        """Ends a batch as the model would: it fails if any row is bad."""
        if self.bad.intersection(run.ids):
            self.blame(run, ModelFailureError)
            run.end.set_exception(ModelFailureError("a row is bad"))
        else:
            run.end.set_result(run.output())

    def blame(self, run: Run, error: type[ServeError]) -> None:
        """Notes that a batch of one call alone has failed."""
        parts = run.batch.parts
        if len(parts) > 1:
            self.failed_together.update(part.call for part in parts if not part.call.ended)
        if len(parts) == 1 and not parts[0].call.ended:
            self.expected[parts[0].call] = error

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "batcher"):
            return
        assert not self.problems
        waiting = sum(self.waiting_rows(call) for call in self.calls if not call.ended)
        size = sum(call.bytes for call in self.calls if not call.ended and self.waiting_rows(call))
        assert self.batcher.waiting_rows == waiting
        assert self.batcher.waiting_bytes == size
        if not self.paused and waiting:
            assert self.engine.runs, "the engine is idle while something waits"
        for call in self.calls:
            self.check_call(call)

    def check_call(self, call: Call) -> None:
        expected = self.expected.get(call)
        assert expected is None or call.ended
        if not call.ended:
            return
        if call.future.cancelled():
            assert expected is asyncio.CancelledError
        elif (error := call.future.exception()) is not None:
            assert expected is not None
            assert isinstance(error, expected)
        else:
            assert expected is None
            self.check_answer(call)

    def check_answer(self, call: Call) -> None:
        ids, answer = self.calls[call], call.future.result()
        assert not self.bad.intersection(ids)
        assert answer.version == VERSION
        assert [tensor.name for tensor in answer.outputs] == [tensor.name for tensor in call.inputs]
        assert ids_of(answer.outputs[0]) == ids
        if call.signature == "texts":
            assert texts_of(answer.outputs[1]) == [text(number) for number in ids]

    def teardown(self) -> None:
        if hasattr(self, "batcher"):
            self.resume()
            for _ in range(10_000):
                if not self.engine.runs:
                    break
                self.end(self.engine.runs[0])
                self.settle()
            assert self.batcher.idle
            assert all(call.ended for call in self.calls)
            assert (self.batcher.waiting_rows, self.batcher.waiting_bytes) == (0, 0)
            self.books_agree()
        self.loop.close()
        assert not self.complaints


BatcherMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestBatcher = BatcherMachine.TestCase


def test_ids_are_what_they_seem() -> None:
    assert ids_of(numbers("id", [3, 1])) == [3, 1]
    assert np.frombuffer(numbers("id", [3]).data, "<i8")[0] == 3
