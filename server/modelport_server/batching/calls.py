"""Calls that wait for an engine, and the batches that are made of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from modelport_server.tensors import RawTensor

Key = tuple[object, ...]


class Answer(NamedTuple):
    """What a call gets back."""

    version: int
    outputs: tuple[RawTensor, ...]
    queue_time_us: int
    engine_time_us: int


@dataclass(eq=False, slots=True)
class Call:
    """One Predict call, checked against its signature, until it has ended."""

    signature: str
    key: Key
    """Calls with equal keys can run together, if they are splittable."""
    inputs: tuple[RawTensor, ...]
    """In the signature's order."""
    rows: int
    """The size of the first dimension; 1 for a call that runs as it is. Never 0."""
    splittable: bool
    """Whether its rows can run apart from each other and together with other calls' rows."""
    future: asyncio.Future[Answer]
    deadline: float = math.inf
    """When it expires, on the clock that the batcher uses."""
    shareable: bool = True
    """Whether idle instances may share its rows though they fit into a batch: what the outputs' sizes follow from could
    come out differently in parts."""
    message: object = None
    """Equal for calls that came in one message, whose answers had better go together, too; None if it came alone."""
    movable: bool = False
    """Whether another version may answer it: its caller has named none."""
    uncounted: bool = False
    """Whether metrics leave it out: it is the server's own, or counts as another one's."""
    enqueued_at: float = 0.0
    first_run_at: float = 0.0
    queued: bool = False
    """Whether it has rows in the queue."""
    taken_rows: int = 0
    """How many rows have been put into batches."""
    finished_rows: int = 0
    engine_time_us: int = 0
    pieces: list[tuple[int, tuple[RawTensor, ...]]] = field(default_factory=list[tuple[int, tuple[RawTensor, ...]]])
    """Outputs of the parts that have run, each with its first row."""
    bytes: int = field(init=False)
    """The size of all inputs."""

    def __post_init__(self) -> None:
        self.bytes = sum([len(tensor.data) for tensor in self.inputs])

    @property
    def ended(self) -> bool:
        """Whether it has an answer or an error, or its caller is gone."""
        return self.future.done()

    def fail(self, error: Exception) -> None:
        """Ends the call with ``error`` unless it has ended."""
        if not self.future.done():
            self.future.set_exception(error)


class Part(NamedTuple):
    """Some rows of one call."""

    call: Call
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """Parts that run together."""

    signature: str
    parts: Sequence[Part]

    @property
    def rows(self) -> int:
        """How many rows all parts have together."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """What an engine made of a batch; its tensors are valid until ``release`` is called."""

    outputs: tuple[RawTensor, ...]
    engine_time_us: int
    release: Callable[[], None]
    cpu_time_us: int = 0
    """The processor time that the engine process spent on it, over all its threads."""


class BatchRunner(Protocol):
    """What the batcher needs of an engine."""

    @property
    def slots(self) -> int:
        """How many batches can be under way at once, those included that wait for others."""
        ...

    @property
    def instances(self) -> int:
        """How many batches run at once."""
        ...

    def run(self, batch: Batch) -> Awaitable[BatchOutput]:
        """Runs ``batch``; returns what will be its output, and must not be cancelled.

        Raises:
            ModelFailureError: if the model failed on these rows.
            NotAvailableError: if the engine died, is not there, or hangs.
        """
        ...
