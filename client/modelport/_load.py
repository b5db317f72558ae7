"""Drives a server as callers would, and measures how long it takes to answer: one process's part of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelport import AsyncClient, ModelportError
from modelport.exceptions import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

INPUT = "input."
"""Put before the names of inputs in a file: one may be called as a parameter of ``numpy.savez`` is."""
Mode = Literal["unary", "stream"]
MAX_OUTSTANDING = 10_000
"""An open loop does not fall further behind than by so many calls: the rest is not sent."""
_KINDS_SHOWN = 8
_PAUSE_S = 0.05
"""Before a stream that broke is opened again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one process does to the server."""

    model: str
    mode: Mode = "unary"
    rows: int = 1
    """Rows a call, or a message of a stream."""
    callers: int = 1
    """Closed loop: how many call, each again once it is answered; with ``stream``, how many streams."""
    rate: float = 0.0
    """Open loop: calls per second, evenly spaced, whether answered or not; 0 for a closed loop."""
    window: int = 8
    """Messages of a stream that are on their way at once."""
    signature: str = ""
    outputs: tuple[str, ...] = ()
    warm_up_s: float = 1.0
    """What ends within the first so many seconds is not counted."""
    seconds: float = 5.0
    """How long is measured after that."""
    offset_s: float = 0.0
    """Open loop: when the first call is due."""

    def __post_init__(self) -> None:
        for name in ("rows", "callers", "window"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.rate < float("inf"):
            raise InputError(f"rate must be a number of calls per second, not {self.rate}")
        if not (0 < self.seconds < float("inf") and 0 <= self.warm_up_s < float("inf")):
            raise InputError("seconds must be above 0, and warm_up_s not below")


@dataclass(slots=True)
class Measured:
    """What came of it."""

    seconds: float = 0.0
    """What was measured for."""
    answered: int = 0
    """How many calls were answered meanwhile, whenever they began."""
    latencies_s: list[float] = field(default_factory=list[float])
    """Closed loop: of each call that was answered meanwhile, from its start. Open loop: of each that was due
    meanwhile, from when it was due."""
    errors: dict[str, int] = field(default_factory=dict[str, int])
    """How many calls and streams failed, the warm-up's too, by what they said."""
    not_sent: int = 0
    """How many calls an open loop did not even begin, because too many before them had no answer."""
    cpu_s: float = 0.0
    """Processor time that this process took meanwhile."""


class Driver:
    """Runs one load.

    Args:
        client: calls the server.
        load: what to do.
        inputs: rows to send, over and over; at least ``load.rows`` of them, first dimension first.
    """

    def __init__(self, client: AsyncClient, load: Load, inputs: Arrays) -> None:
        self._client = client
        self._load = load
        self._batches = _batches(inputs, load.rows)
        self._measured = Measured()
        self._begin_s = self._end_s = 0.0
        self._outstanding = 0

    async def call_once(self) -> None:
        """Makes one call that is not counted.

        Raises:
            ModelportError: if it fails.
        """
        load = self._load
        await self._client.predict(load.model, self._next(), signature=load.signature, outputs=load.outputs or None)

    async def run(self) -> Measured:
        """Returns what was measured."""
        load = self._load
        started_s = time.monotonic()
        self._begin_s = started_s + load.warm_up_s
        self._end_s = self._begin_s + load.seconds
        if load.rate:
            work = [self._scheduled_stream(started_s) if load.mode == "stream" else self._scheduled(started_s)]
        else:
            caller = self._stream if load.mode == "stream" else self._call_again
            work = [caller() for _ in range(load.callers)]
        cpu = asyncio.create_task(self._measure_cpu())
        await asyncio.gather(*work)
        self._measured.cpu_s = await cpu
        self._measured.seconds = load.seconds
        return self._measured

    async def _measure_cpu(self) -> float:
        await asyncio.sleep(self._begin_s - time.monotonic())
        before = _cpu_s()
        await asyncio.sleep(self._end_s - time.monotonic())
        return _cpu_s() - before

    def _next(self) -> Arrays:
        return next(self._batches)

    def _answered(self, since_s: float) -> None:
        now_s = time.monotonic()
        meanwhile = self._begin_s <= now_s < self._end_s
        self._measured.answered += meanwhile
        if (self._begin_s <= since_s < self._end_s) if self._load.rate else meanwhile:
            self._measured.latencies_s.append(now_s - since_s)

    def _failed(self, error: ModelportError) -> None:
        kind = f"{type(error).__name__}: {error}"
        errors = self._measured.errors
        if kind not in errors and len(errors) >= _KINDS_SHOWN:
            kind = "others"
        errors[kind] = errors.get(kind, 0) + 1

    async def _call(self, since_s: float) -> None:
        try:
            await self.call_once()
        except ModelportError as error:
            self._failed(error)
        else:
            self._answered(since_s)

    async def _call_again(self) -> None:
        while (now_s := time.monotonic()) < self._end_s:
            await self._call(now_s)

    async def _scheduled(self, started_s: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            async for due_s in self._moments(started_s):
                if self._outstanding >= MAX_OUTSTANDING:
                    self._measured.not_sent += due_s >= self._begin_s
                    continue
                self._outstanding += 1
                tasks.create_task(self._call(due_s)).add_done_callback(self._on_done)

    def _on_done(self, _: object) -> None:
        self._outstanding -= 1

    async def _moments(self, started_s: float) -> AsyncGenerator[float]:
        """Yields when each call of an open loop is due, once it is."""
        number = 0
        while (due_s := started_s + self._load.offset_s + number / self._load.rate) < self._end_s:
            if (wait_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            yield due_s
            number += 1

    async def _stream(self) -> None:
        while time.monotonic() < self._end_s:
            if not await self._one_stream():
                await asyncio.sleep(_PAUSE_S)

    async def _one_stream(self) -> bool:
        began: deque[float] = deque()

        async def batches() -> AsyncGenerator[Arrays]:
            while (now_s := time.monotonic()) < self._end_s:
                began.append(now_s)
                yield self._next()

        return await self._answers(batches(), began)

    async def _scheduled_stream(self, started_s: float) -> None:
        due: deque[float] = deque()

        async def batches() -> AsyncGenerator[Arrays]:
            async for moment_s in self._moments(started_s):
                if time.monotonic() - moment_s > MAX_OUTSTANDING / self._load.rate:
                    self._measured.not_sent += moment_s >= self._begin_s
                    continue
                due.append(moment_s)
                yield self._next()

        await self._answers(batches(), due)

    async def _answers(self, batches: AsyncGenerator[Arrays], began: deque[float]) -> bool:
        """Takes a stream's answers; returns whether it came to its end."""
        load = self._load
        results = self._client.predict_stream(
            load.model,
            batches,
            signature=load.signature,
            outputs=load.outputs or None,
            window=load.window,
            on_error="return",
        )
        try:
            async with contextlib.aclosing(results):
                async for result in results:
                    since_s = began.popleft()
                    if result.error is not None:
                        self._failed(result.error)
                    else:
                        self._answered(since_s)
        except ModelportError as error:
            self._failed(error)
            return False
        return True


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def _batches(inputs: Arrays, rows: int) -> Iterator[Arrays]:
    """Yields batches of so many rows without end."""
    count = min(map(len, inputs.values()))
    starts = range(0, max(count - rows, 0) + 1, rows)
    cut = [
        {
            name: np.ascontiguousarray(np.resize(array[start:], (rows, *array.shape[1:])))
            for name, array in inputs.items()
        }
        for start in starts
    ]
    while True:
        yield from cut
