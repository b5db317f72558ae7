"""The threads of an engine process that run batches, each one batch at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Self

from modelport_server.engines.protocol import Array, Engine

_Work = Callable[[], object]


class Instances:
    """This thread, and as many others as it takes to run several batches at once; a context manager.

    The others have the priority and the cores of the thread that enters, and end when it leaves.

    Args:
        count: how many batches run at once.
    """

    def __init__(self, count: int) -> None:
        self._work: list[SimpleQueue[_Work | None]] = [SimpleQueue() for _ in range(count - 1)]
        self._threads = [
            threading.Thread(target=_serve, args=(queue,), name=f"instance {number}", daemon=True)
            for number, queue in enumerate(self._work, 1)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for queue in self._work:
            queue.put(None)
        for thread in self._threads:
            thread.join()

    def run(self, work: _Work) -> None:
        """Runs ``work`` on each thread at the same time, and returns when all have ended.

        Raises:
            Exception: what it raises on this thread, or else on another one.
        """
        ends: SimpleQueue[BaseException | None] = SimpleQueue()

        def other() -> None:
            try:
                work()
            except BaseException as error:  # it is raised again below
                ends.put(error)
            else:
                ends.put(None)

        for queue in self._work:
            queue.put(other)
        try:
            work()
        finally:
            found = [ends.get() for _ in self._work]
        for error in found:
            if error is not None:
                raise error


def _serve(queue: SimpleQueue[_Work | None]) -> None:
    while (work := queue.get()) is not None:
        work()


class OnAllInstances:
    """An engine whose every run is run on all instances at once, so that none of them is cold later.

    Args:
        engine: what runs the model.
        instances: the threads that it is run on.
    """

    def __init__(self, engine: Engine, instances: Instances) -> None:
        self._engine = engine
        self._instances = instances

    def run(self, signature: str, inputs: Mapping[str, Array]) -> None:
        """Runs one batch on each instance.

        Raises:
            EngineError: if the model fails on these inputs.
        """
        self._instances.run(lambda: self._engine.run(signature, inputs))


@dataclass(eq=False, slots=True)
class Share:
    """What a batch has had of the process's time, in seconds."""

    cpu_s: float = 0.0
    """Of its processor time."""
    busy_s: float = 0.0
    """Of the time in which it ran any batch: less than the batch took if others ran at the same time."""


class TimeShares:
    """Divides the time of a process among the batches that run at the time, in equal parts.

    Threads of an engine work for whichever batch has something to do, so that nobody could tell it apart.

    Args:
        cpu_clock: returns the processor time of all threads, in seconds.
        clock: returns the time, in seconds.
    """

    def __init__(
        self, cpu_clock: Callable[[], float] = time.process_time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cpu_clock = cpu_clock
        self._clock = clock
        self._lock = threading.Lock()
        self._running: list[Share] = []
        self._seen = (0.0, 0.0)

    @contextmanager
    def share(self) -> Generator[Share]:
        """Counts what is done within as a batch; its share is known at the end."""
        share = Share()
        with self._lock:
            self._settle()
            self._running.append(share)
        try:
            yield share
        finally:
            with self._lock:
                self._settle()
                self._running.remove(share)

    def _settle(self) -> None:
        before, self._seen = self._seen, (self._cpu_clock(), self._clock())
        cpu_s, passed_s = (now - then for now, then in zip(self._seen, before, strict=True))
        for share in self._running:
            share.cpu_s += cpu_s / len(self._running)
            share.busy_s += passed_s / len(self._running)
