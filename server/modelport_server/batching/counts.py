"""What a batcher counts, for metrics."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from modelport_server.errors import ModelFailureError

BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the classes of times, in seconds; the last class has none."""


class Failure(NamedTuple):
    """Why a call has no answer."""

    kind: type[BaseException]
    """``asyncio.CancelledError`` if its caller gave it up."""
    caller_fault: bool = False
    """Whether a model failed on what its caller had sent."""


@dataclass(slots=True)
class Counts:
    """What has become of a servable's calls since it was loaded."""

    answered: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    """How many calls were answered, by class of the time from when they were queued."""
    answered_s: float = 0.0
    """How long all of those took, in seconds."""
    failed: dict[Failure, int] = field(default_factory=dict[Failure, int])
    """How many others there were, those included that could not be queued."""
    batches: int = 0
    rows: int = 0
    """Of all batches."""
    engine_time_us: int = 0
    """How long the engine took for them; more than time has passed where it runs several at once."""

    def end(self, future: asyncio.Future[Any], duration_s: float) -> None:
        """Counts a call that has ended."""
        if future.cancelled():
            self.fail(asyncio.CancelledError())
        elif (error := future.exception()) is not None:
            self.fail(error)
        else:
            self.answered[bisect_left(BOUNDS_S, duration_s)] += 1
            self.answered_s += duration_s

    def fail(self, error: BaseException) -> None:
        """Counts a call that has an error instead of an answer."""
        failure = Failure(type(error), isinstance(error, ModelFailureError) and error.caller_fault)
        self.failed[failure] = self.failed.get(failure, 0) + 1

    def run(self, rows: int, engine_time_us: int) -> None:
        """Counts a batch that has run."""
        self.batches += 1
        self.rows += rows
        self.engine_time_us += engine_time_us
