"""The batcher: takes calls, runs them in batches, and ends each exactly once."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from modelport_server.batching.calls import Answer, Batch, BatchOutput, BatchRunner, Call, Key, Part
from modelport_server.batching.counts import Counts
from modelport_server.batching.policy import close_batch
from modelport_server.errors import (
    ExpiredError,
    ModelFailureError,
    NotAvailableError,
    OverloadedError,
    ServeError,
)
from modelport_server.options import BatchLimits
from modelport_server.tensors import RawTensor, join_rows, owned, row_cutter

_log = logging.getLogger(__name__)

_FIRST_RATE = 1000.0
"""Rows per second that callers are told to wait by until any have run."""
_RATE_GAIN = 0.1
_SOON_OVER_S = 0.02
"""A batch that takes no longer, in seconds, may be waited for."""
_WORTH_SHARING_S = 0.002
"""How long a batch has to run, in seconds, for it to be worth while to run it in parts: each costs something by itself.
"""
_WORTH_RUNNING_S = 0.001
"""How long a batch has to run, in seconds, to be worth what it costs besides while another one is soon over."""
_FRONT_S = 0.0004
"""What a batch costs the front, in seconds, which is one for all instances."""
_LONG_CALL_S = 0.002
"""Calls that take so long in an engine on average, in seconds, take the front a small part of it."""
_UNDER_WAY_GAIN = 0.2
_EXPIRY_SLACK_S = 0.02
_EXPIRY_SLACK = 0.02
_MOST_EXPIRY_SLACK_S = 1.0
"""A caller whose time is over hangs up by itself, and mostly first: its clock began before the server's, and what it
says of its deadline is rounded up. Who hangs up no earlier than so many seconds, and this part of its time, before the
server's deadline has not given up, but expired; in no case is it more than the last."""
_BATCHES_PER_INSTANCE = 2
"""Into how many batches the rows of all callers are divided: while one runs, the answers of another go out, and what
comes for them becomes the next one."""


@dataclass(frozen=True, slots=True)
class _Running:
    batch: Batch
    soon_over_until: float
    """Until when others may wait for its end, on the batcher's clock; 0 for one that takes long."""


class Batcher:
    """One servable's queue and the batches that it becomes.

    Used from one event loop. A call is submitted once; its future then gets an answer or a
    ``ServeError``, or is cancelled by the caller, which drops its waiting rows and touches no other call.

    Args:
        runner: runs batches, at most ``runner.slots`` at once.
        limits: bounds of the queue and of a batch.
        version: the version that answers carry.
        clock: returns seconds; deadlines are on the same clock.
    """

    def __init__(
        self,
        runner: BatchRunner,
        limits: BatchLimits,
        version: int,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._runner = runner
        self._limits = limits
        self._version = version
        self._clock = clock
        self._waiting: dict[Key, deque[Call]] = {}
        self._retries: deque[Batch] = deque()
        self._rows = 0
        self._bytes = 0
        self._unsplittable = 0
        """How many calls wait that run by themselves."""
        self._in_flight: dict[asyncio.Future[BatchOutput], _Running] = {}
        self._dispatching = False
        self._gathering: asyncio.TimerHandle | None = None
        """Until when calls wait for a batch that is soon over."""
        self._rows_per_s: dict[tuple[str, bool], float] = {}
        """How many rows an instance runs in a second, once known, by signature and whether calls are splittable."""
        self._rows_under_way = 0.0
        """How many rows wait or run when a batch ends: about as many as callers have under way."""
        self._room: deque[asyncio.Future[None]] = deque()
        self._closed: ServeError | None = None
        self._paused = False
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_at = float("inf")
        self.counts = Counts()
        """Of all calls but the server's own."""

    @property
    def waiting_rows(self) -> int:
        """How many rows wait."""
        return self._rows

    @property
    def waiting_bytes(self) -> int:
        """How many bytes of input the calls have that have rows waiting."""
        return self._bytes

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and not self._in_flight and not self._retries

    def submit(self, call: Call) -> None:
        """Queues ``call``.

        Raises:
            OverloadedError: if the queue is full.
            NotAvailableError: if the batcher is closed.
            ExpiredError: if the call's deadline has passed.
        """
        now = self._clock()
        if (refusal := self._refusal(call, now)) is not None:
            if not call.uncounted:
                self.counts.fail(refusal)
            raise refusal
        call.enqueued_at = now
        call.queued = True
        self._waiting.setdefault(call.key, deque()).append(call)
        self._rows += call.rows
        self._bytes += call.bytes
        self._unsplittable += not call.splittable
        call.future.add_done_callback(lambda _: self._on_call_ended(call))
        self._watch_deadline(call.deadline)
        self._dispatch_soon(call.future.get_loop())

    def _refusal(self, call: Call, now: float) -> ServeError | None:
        """Returns why a call can't be queued."""
        if self._closed is not None:
            return self._closed
        if call.deadline <= now:
            return ExpiredError("the deadline had passed before the call was queued")
        if not self._has_room(call):
            rate = (self._rate(call) or _FIRST_RATE) * self._runner.instances
            wait_s = min(max(self._rows / rate, 0.005), 5.0)
            return OverloadedError(f"the queue is full: {self._rows} rows wait", retry_after_s=wait_s)
        return None

    async def room(self, call: Call) -> None:
        """Returns when ``call`` fits into the queue, for callers that can wait instead of failing."""
        while self._closed is None and not call.ended and not self._has_room(call):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._room.append(waiter)
            await waiter

    def limit_batches(self, most: int, efficient: int) -> None:
        """Changes how many rows run together from now on.

        Args:
            most: the largest batch, in rows.
            efficient: ``BatchLimits.efficient_batch_size``.
        """
        self._limits = replace(self._limits, max_batch_size=most, efficient_batch_size=efficient)

    def pause(self) -> None:
        """Stops making batches until ``resume``: calls wait, within the queue's bounds."""
        self._paused = True

    def resume(self) -> None:
        """Goes on making batches."""
        self._paused = False
        self._dispatch_soon(asyncio.get_running_loop())

    def close(self, error: ServeError) -> None:
        """Fails everything that waits, and whatever comes later, with ``error``."""
        self._closed = error
        for call in [call for queue in self._waiting.values() for call in queue]:
            call.fail(error)  # its callback takes it out of the queue
        for batch in self._retries:
            self._fail(batch, error)
        self._retries.clear()
        self._wake_room()
        self._stop_gathering()
        if self._expiry is not None:
            self._expiry.cancel()

    def take_waiting(self) -> list[Call]:
        """Takes out and returns the movable calls of which nothing has run yet, oldest first."""
        calls = (call for queue in self._waiting.values() for call in queue)
        waiting = [call for call in calls if call.movable and not call.taken_rows and not call.ended]
        for call in waiting:
            self._drop(call)
            call.uncounted = True
        return sorted(waiting, key=lambda call: call.enqueued_at)

    def _has_room(self, call: Call) -> bool:
        if not self._rows and not self._bytes:
            return True
        return (
            self._rows + call.rows <= self._limits.max_enqueued_rows
            and self._bytes + call.bytes <= self._limits.max_enqueued_bytes
        )

    def _on_call_ended(self, call: Call) -> None:
        self._drop(call)
        self.count_end(call)

    def count_end(self, call: Call) -> None:
        """Counts a call that has ended, be it one that never was in the queue."""
        if call.uncounted:
            return
        now = self._clock()
        since = call.enqueued_at or now
        if call.future.cancelled() and call.deadline <= now + _expiry_slack_s(call.deadline - since):
            self.counts.fail(ExpiredError("the deadline passed"))
        else:
            self.counts.end(call.future, now - since)

    def _drop(self, call: Call) -> None:
        """Takes a call that has ended out of the queue, if it is there."""
        if not call.queued:
            return
        queue = self._waiting[call.key]
        queue.remove(call)
        if not queue:
            del self._waiting[call.key]
        self._account(call, call.rows - call.taken_rows)
        self._wake_room()

    def _account(self, call: Call, rows: int) -> None:
        """Takes rows of ``call`` out of the count of what waits; its bytes go with its last row."""
        self._rows -= rows
        call.taken_rows += rows
        if call.taken_rows == call.rows:
            call.queued = False
            self._bytes -= call.bytes
            self._unsplittable -= not call.splittable

    def _wake_room(self) -> None:
        """Lets those who wait for room look again."""
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _dispatch_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes batches once those have queued their calls whose turn it is now: they can run together."""
        if not self._dispatching:
            self._dispatching = True
            loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        while not self._paused and len(self._in_flight) < self._runner.slots:
            batch = self._next_batch()
            if batch is None:
                return
            self._run(batch)

    def _next_batch(self) -> Batch | None:
        while self._retries:
            retry = self._retries.popleft()
            self._expire(part.call for part in retry.parts)
            parts = [part for part in retry.parts if not part.call.ended]
            if parts:
                return Batch(retry.signature, parts)
        gather = self._rows_to_gather()
        suffice = self._rows_that_suffice()
        if self._is_short_of(min([gather, *suffice.values()])):
            return None
        keys = self._keys_oldest_first()
        if gather > 1 and not any(
            close_batch(self._live(key), self._limits, gather=min(gather, suffice[key])) for key in keys
        ):
            return None
        return self._close_oldest(keys, suffice)

    def _is_short_of(self, rows: float) -> bool:
        """Whether it is plain without a look at the calls that nothing of what waits makes a batch."""
        limits = self._limits
        few = self._rows < min(rows, limits.max_batch_size) and self._bytes < limits.max_batch_bytes
        return few and not self._unsplittable

    def _rows_that_suffice(self) -> dict[Key, float]:
        """Returns by key with how many rows a batch is full, though more may wait; infinity where that is not known.

        Were all rows of all callers under way in one batch for each instance, an instance would have nothing to run
        from the end of its batch until the callers have their answers and call again. Where a call takes long in the
        engine, that is no great share of the time.
        """
        if not self._limits.efficient_batch_size:
            return dict.fromkeys(self._waiting, math.inf)
        calls = sum(map(len, self._waiting.values()))
        under_way = max(self._rows_under_way, self._rows + self._running_rows)
        part = math.ceil(under_way / (_BATCHES_PER_INSTANCE * self._runner.instances))
        suffice: dict[Key, float] = {}
        for key, queue in self._waiting.items():
            is_long = self._rows >= calls * _LONG_CALL_S * self._rate(queue[0])
            suffice[key] = math.inf if is_long else max(part, self._fewest_rows(queue[0]))
        return suffice

    def _fewest_rows(self, call: Call) -> int:
        """Returns how many rows are to be left together, so that they are worth what a batch costs by itself."""
        worth_s = max(_WORTH_RUNNING_S, self._runner.instances * _FRONT_S)
        return max(self._limits.efficient_batch_size, math.ceil(worth_s * self._rate(call)))

    @property
    def _running_rows(self) -> int:
        return sum([one.batch.rows for one in self._in_flight.values()])

    def _rate(self, call: Call) -> float:
        """Returns how many rows of such calls an instance runs in a second; 0 if that is not known."""
        return self._rows_per_s.get((call.signature, call.splittable), 0.0)

    def _close_oldest(self, keys: list[Key], suffice: Mapping[Key, float]) -> Batch | None:
        """Takes from the key that has waited longest, full or not: else a busy one would starve it."""
        for key in keys:
            oldest = self._waiting[key][0]
            most = self._rows_of_a_share(oldest) if oldest.shareable else None
            enough = suffice[key]
            if self._rows - enough < self._fewest_rows(oldest):
                enough = math.inf  # what would be left is not worth a batch
            selection = close_batch(self._live(key), self._limits, most=most, enough=enough)
            if selection is not None:
                return self._take(key, selection.parts)
        return None

    def _rows_to_gather(self) -> float:
        """Returns how many rows have to wait before they run, be a batch full or not.

        While an instance is idle, that is as many as the smallest batch under way has, and enough to run for a while:
        else a busy server would run ever smaller ones, each of which costs as much again in what it does once for a
        batch. Nobody waits so for a batch that takes long, be it known beforehand or not.
        """
        if not self._in_flight:
            return 1
        if len(self._in_flight) >= self._runner.instances:
            return math.inf
        now = self._clock()
        soon = [one for one in self._in_flight.values() if now < one.soon_over_until]
        if not soon:
            return 1
        if self._rows and self._gathering is None:
            until = min(one.soon_over_until for one in soon)
            self._gathering = asyncio.get_running_loop().call_later(until - now, self._gathered_enough)
        fewest = min(one.batch.rows for one in soon)
        rates = [self._rate(queue[0]) for queue in self._waiting.values()]
        return max(fewest, math.ceil(_WORTH_RUNNING_S * min(rates, default=0.0)))

    def _gathered_enough(self) -> None:
        self._gathering = None
        self._dispatch()

    def _stop_gathering(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None

    def _rows_of_a_share(self, call: Call) -> int:
        """Returns the most rows of a batch, so that no instance is idle while another one has long to run."""
        most, idle = self._limits.max_batch_size, self._runner.instances - len(self._in_flight)
        rate = self._rate(call)
        if idle > 1 and self._rows > 1 and rate:
            most = min(most, max(math.ceil(self._rows / idle), math.ceil(_WORTH_SHARING_S * rate)))
        return most

    def _keys_oldest_first(self) -> list[Key]:
        if len(self._waiting) <= 1:
            return list(self._waiting)
        return sorted(self._waiting, key=lambda key: self._waiting[key][0].enqueued_at)

    def _live(self, key: Key) -> Iterator[Call]:
        """Yields the calls of a queue that are still wanted, and ends those that have expired."""
        now = self._clock()
        for call in self._waiting[key]:
            if call.deadline <= now:
                call.fail(ExpiredError("the deadline passed while the call was queued"))
            if not call.ended:
                yield call

    def _take(self, key: Key, chosen: tuple[tuple[Call, int, int], ...]) -> Batch:
        now = self._clock()
        parts: list[Part] = []
        for call, start, stop in chosen:
            if start == 0:
                call.first_run_at = now
            self._account(call, stop - start)
            parts.append(Part(call, start, stop))
        queue = self._waiting[key]
        last = chosen[-1][0]
        for _ in range(queue.index(last) + 1):
            call = queue.popleft()
            if call.queued and call.ended:  # it waits for its own callback, which comes too late now
                self._account(call, call.rows - call.taken_rows)
            elif call.queued:
                queue.appendleft(call)  # only the last one taken has rows left
                break
        if not queue:
            del self._waiting[key]
        self._wake_room()
        return Batch(last.signature, parts)

    def _expire(self, calls: Iterable[Call]) -> None:
        """Ends those of ``calls`` that have expired before they could be run again."""
        now = self._clock()
        for call in calls:
            if call.deadline <= now:
                call.fail(ExpiredError("the deadline passed before the call could be run again"))

    def _watch_deadline(self, deadline: float) -> None:
        """Sees to it that a call which nothing takes from the queue still ends when it expires."""
        if deadline >= self._expiry_at or deadline == float("inf"):
            return
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry_at = deadline
        delay_s = max(deadline - self._clock(), 0.0)
        self._expiry = asyncio.get_running_loop().call_later(delay_s, self._on_expiry)

    def _on_expiry(self) -> None:
        self._expiry = None
        self._expiry_at = float("inf")
        for key in self._waiting:
            deque(self._live(key), maxlen=0)
        deadlines = [call.deadline for queue in self._waiting.values() for call in queue if not call.ended]
        if deadlines:
            self._watch_deadline(min(deadlines))

    def _run(self, batch: Batch) -> None:
        running: asyncio.Future[BatchOutput]
        try:
            running = asyncio.ensure_future(self._runner.run(batch))
        except Exception as error:
            running = asyncio.get_running_loop().create_future()
            running.set_exception(error)
        seconds = batch.rows / rate if (rate := self._rate(batch.parts[0].call)) else math.inf
        soon_over_until = self._clock() + _SOON_OVER_S if seconds <= _SOON_OVER_S else 0.0
        self._in_flight[running] = _Running(batch, soon_over_until)
        running.add_done_callback(self._on_end)

    def _on_end(self, running: asyncio.Future[BatchOutput]) -> None:
        self._rows_under_way += _UNDER_WAY_GAIN * (self._rows + self._running_rows - self._rows_under_way)
        batch = self._in_flight.pop(running).batch
        self._stop_gathering()
        error = asyncio.CancelledError() if running.cancelled() else running.exception()
        if error is None:
            self._hand_out(batch, running.result())
        elif isinstance(error, ModelFailureError):
            self._isolate(batch, error)
        elif isinstance(error, ServeError):
            self._fail(batch, error)
        elif isinstance(error, asyncio.CancelledError):
            self._fail(batch, NotAvailableError("the server is stopping"))
        else:
            _log.error("running a batch failed", exc_info=error)
            self._fail(batch, NotAvailableError("the engine could not be reached"))
        self._dispatch_soon(running.get_loop())

    def _hand_out(self, batch: Batch, output: BatchOutput) -> None:
        try:
            self._deliver(batch, output)
        except ModelFailureError as error:
            self._isolate(batch, error)
        except Exception:
            _log.exception("the outputs of a batch could not be handed out")
            self._fail(batch, ModelFailureError("the model's outputs could not be handed out"))
        finally:
            output.release()

    def _fail(self, batch: Batch, error: Exception) -> None:
        for part in batch.parts:
            part.call.fail(error)

    def _isolate(self, batch: Batch, error: ModelFailureError) -> None:
        """Finds out whose rows made a batch fail, by running its halves."""
        if len(batch.parts) == 1:
            batch.parts[0].call.fail(error)
            return
        middle = len(batch.parts) // 2
        self._retries.append(Batch(batch.signature, batch.parts[:middle]))
        self._retries.append(Batch(batch.signature, batch.parts[middle:]))

    def _deliver(self, batch: Batch, output: BatchOutput) -> None:
        rows = batch.rows
        if batch.parts[0].call.splittable:
            for tensor in output.outputs:
                if not tensor.shape or tensor.shape[0] != rows:
                    raise ModelFailureError(
                        f"the model's output {tensor.name!r} has shape {list(tensor.shape)} for {rows} rows"
                    )
        if not batch.parts[0].call.uncounted:
            self.counts.run(rows, output.engine_time_us)
        if output.engine_time_us > 0:
            rate = rows / (output.engine_time_us / 1e6)
            call = batch.parts[0].call
            before = self._rate(call) or rate
            self._rows_per_s[call.signature, call.splittable] = before + _RATE_GAIN * (rate - before)
        cutters = [row_cutter(tensor) for tensor in output.outputs] if batch.parts[0].call.splittable else None
        first = 0
        for part in batch.parts:
            end = first + part.rows
            if not part.call.ended:
                if cutters is None:
                    tensors = tuple(owned(tensor) for tensor in output.outputs)
                else:
                    tensors = tuple([cut(first, end) for cut in cutters])
                self._deliver_part(part, tensors, output)
            first = end

    def _deliver_part(self, part: Part, tensors: tuple[RawTensor, ...], output: BatchOutput) -> None:
        call = part.call
        call.engine_time_us += output.engine_time_us
        call.finished_rows += part.rows
        if part.rows < call.rows:
            call.pieces.append((part.start, tensors))
            if call.finished_rows < call.rows:
                return
            call.pieces.sort(key=lambda piece: piece[0])
            try:
                tensors = _join_pieces([piece for _, piece in call.pieces])
            except ModelFailureError as error:
                call.fail(error)  # to run its rows again would be of no use
                return
        queue_time_us = int((call.first_run_at - call.enqueued_at) * 1e6)
        call.future.set_result(Answer(self._version, tensors, queue_time_us, call.engine_time_us))


def _expiry_slack_s(time_s: float) -> float:
    """Returns how long before its deadline a call of so many seconds may be ended by that."""
    return min(_EXPIRY_SLACK_S + _EXPIRY_SLACK * time_s, _MOST_EXPIRY_SLACK_S)


def _join_pieces(pieces: Sequence[tuple[RawTensor, ...]]) -> tuple[RawTensor, ...]:
    """Returns the outputs of a call that ran in several batches, whose free dimensions may have come out apart."""
    first = pieces[0]
    for piece in pieces[1:]:
        if [(t.name, t.dtype, t.inner) for t in piece] != [(t.name, t.dtype, t.inner) for t in first]:
            raise ModelFailureError(
                "the call ran in several batches, and the shapes of the model's outputs differ from batch to batch"
            )
    return tuple(join_rows(column) for column in zip(*pieces, strict=True))
