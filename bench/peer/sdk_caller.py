"""Calls a server through one SDK from this process alone, and prints as JSON how that went.

Run in the SDK's own environment. Arguments: modelport or tritonclient, address, case, seconds, window of streams.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import numpy as np

MODEL, INPUT, OUTPUT = "classic", "images", "probabilities"
CALLERS = 64
BATCH = 32
_WARM_UP_S = 0.5
_RANDOM = np.random.default_rng(0)
ONE = _RANDOM.integers(0, 256, (1, 28, 28)).astype(np.uint8)
ROWS = _RANDOM.integers(0, 256, (BATCH, 28, 28)).astype(np.uint8)


class Modelport:
    """Its SDK as its documentation has it."""

    def __init__(self, address: str) -> None:
        self._address = address

    @contextmanager
    def caller(self) -> Iterator[Callable[[Any], Any]]:
        """Gives what makes a call."""
        from modelport import Client

        with Client(self._address) as client:
            yield lambda images: client.predict(MODEL, {INPUT: images})[OUTPUT]

    @asynccontextmanager
    async def async_caller(self) -> AsyncIterator[Callable[[Any], Any]]:
        """Gives what makes a call."""
        from modelport import AsyncClient

        async with AsyncClient(self._address) as client:

            async def call(images: Any) -> Any:
                return (await client.predict(MODEL, {INPUT: images}))[OUTPUT]

            yield call

    def stream(self, batches: Iterator[Any], window: int) -> Iterator[Any]:
        """Yields the answers."""
        from modelport import Client

        with Client(self._address) as client:
            inputs = ({INPUT: images} for images in batches)
            for result in client.predict_stream(MODEL, inputs, window=window):
                yield result.prediction[OUTPUT]

    async def async_stream(self, batches: Iterator[Any], window: int) -> AsyncIterator[Any]:
        """Yields the answers."""
        from modelport import AsyncClient

        async with AsyncClient(self._address) as client:
            inputs = ({INPUT: images} for images in batches)
            async for result in client.predict_stream(MODEL, inputs, window=window):
                yield result.prediction[OUTPUT]


class Tritonclient:
    """The SDK of Triton, as its examples have it."""

    def __init__(self, address: str) -> None:
        self._address = address

    @contextmanager
    def caller(self) -> Iterator[Callable[[Any], Any]]:
        """Gives what makes a call."""
        from tritonclient import grpc

        with grpc.InferenceServerClient(self._address) as client:
            yield lambda images: client.infer(MODEL, [_input(grpc, images)]).as_numpy(OUTPUT)

    @asynccontextmanager
    async def async_caller(self) -> AsyncIterator[Callable[[Any], Any]]:
        """Gives what makes a call."""
        from tritonclient.grpc import aio

        async with aio.InferenceServerClient(self._address) as client:

            async def call(images: Any) -> Any:
                return (await client.infer(MODEL, [_input(aio, images)])).as_numpy(OUTPUT)

            yield call

    def stream(self, batches: Iterator[Any], window: int) -> Iterator[Any]:
        """Yields the answers, which a thread of the client hands to a callback."""
        from tritonclient import grpc

        answers: queue.Queue[Any] = queue.Queue()
        with grpc.InferenceServerClient(self._address) as client:
            client.start_stream(callback=partial(_answered, answers))
            under_way = 0
            for images in batches:
                client.async_stream_infer(MODEL, [_input(grpc, images)])
                under_way += 1
                if under_way == window:
                    yield _taken(answers)
                    under_way -= 1
            for _ in range(under_way):
                yield _taken(answers)
            client.stop_stream()

    async def async_stream(self, batches: Iterator[Any], window: int) -> AsyncIterator[Any]:
        """Yields the answers."""
        from tritonclient.grpc import aio

        room = asyncio.Semaphore(window)

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for images in batches:
                await room.acquire()
                yield {"model_name": MODEL, "inputs": [_input(aio, images)]}

        async with aio.InferenceServerClient(self._address) as client:
            async for result, error in client.stream_infer(requests()):
                if error is not None:
                    raise error
                room.release()
                yield result.as_numpy(OUTPUT)


def _input(api: Any, images: Any) -> Any:
    entry = api.InferInput(INPUT, images.shape, "UINT8")
    entry.set_data_from_numpy(images)
    return entry


def _answered(answers: queue.Queue[Any], result: Any, error: Any) -> None:
    answers.put(result if error is None else error)


def _taken(answers: queue.Queue[Any]) -> Any:
    answer = answers.get()
    if isinstance(answer, Exception):
        raise answer
    return answer.as_numpy(OUTPUT)


class Count:
    """Counts the rows that are answered after a while to warm up, and the time from then on."""

    def __init__(self, duration_s: float) -> None:
        self._begin_s = time.perf_counter() + _WARM_UP_S
        self._end_s = self._begin_s + duration_s
        self._cpu_s: float | None = None
        self.rows = 0
        self.times_s: list[float] = []

    @property
    def going_on(self) -> bool:
        """Whether to make another call."""
        return time.perf_counter() < self._end_s

    def batches(self) -> Iterator[Any]:
        """Yields what a stream sends."""
        while self.going_on:
            yield ROWS

    def add(self, answer: Any, began_s: float | None = None) -> None:
        """Counts an answer."""
        now = time.perf_counter()
        if not self._begin_s <= now < self._end_s:
            return
        if self._cpu_s is None:
            self._cpu_s, self._begin_s = time.process_time(), now
            return
        self.rows += len(answer)
        self.last_s = now
        if began_s is not None:
            self.times_s.append(now - began_s)

    def found(self) -> dict[str, Any]:
        """Returns the figures."""
        elapsed_s = self.last_s - self._begin_s
        p50_ms = float(np.median(self.times_s)) * 1000 if self.times_s else None
        cores = (time.process_time() - (self._cpu_s or 0.0)) / (time.perf_counter() - self._begin_s)
        return {"rows_per_s": self.rows / elapsed_s, "p50_ms": p50_ms, "sdk_cores": cores}


def one_at_a_time(sdk: Any, count: Count, window: int) -> None:
    """A single row, one call after another."""
    with sdk.caller() as call:
        while count.going_on:
            began_s = time.perf_counter()
            count.add(call(ONE), began_s)


def threads(sdk: Any, count: Count, window: int) -> None:
    """Single rows, from many threads with one client."""
    with sdk.caller() as call:

        def work() -> None:
            while count.going_on:
                began_s = time.perf_counter()
                answer = call(ONE)
                with lock:
                    count.add(answer, began_s)

        lock = threading.Lock()
        workers = [threading.Thread(target=work) for _ in range(CALLERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


def tasks(sdk: Any, count: Count, window: int) -> None:
    """Single rows, from many tasks with one client."""

    async def main() -> None:
        async with sdk.async_caller() as call:

            async def work() -> None:
                while count.going_on:
                    began_s = time.perf_counter()
                    count.add(await call(ONE), began_s)

            await asyncio.gather(*[work() for _ in range(CALLERS)])

    asyncio.run(main())


def stream(sdk: Any, count: Count, window: int) -> None:
    """A stream of batches, from ordinary code."""
    for answer in sdk.stream(count.batches(), window):
        count.add(answer)


def async_stream(sdk: Any, count: Count, window: int) -> None:
    """A stream of batches, from asyncio."""

    async def main() -> None:
        async for answer in sdk.async_stream(count.batches(), window):
            count.add(answer)

    asyncio.run(main())


def main() -> None:
    """Makes the calls of one case."""
    name, address, case, seconds, window = sys.argv[1:]
    sdk = {"modelport": Modelport, "tritonclient": Tritonclient}[name](address)
    cases = {one.__name__: one for one in (one_at_a_time, threads, tasks, stream, async_stream)}
    count = Count(float(seconds))
    cases[case](sdk, count, int(window))
    print(json.dumps(count.found()))


if __name__ == "__main__":
    main()
