"""Callers in the background that write down every answer: what came, from which version, how late, or why not."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelport import AsyncClient, ModelportError, Prediction, RetryPolicy
from tests.support.bad_versions import CLASSES, class_scores
from tests.support.server import START_TIMEOUT_S, wait_for

Inputs = Mapping[str, NDArray[Any]]

_JOIN_S = 120.0


class Answer(NamedTuple):
    """One answer."""

    number: int
    """The call's, as ``LoadOptions.inputs`` was given it."""
    version: int
    latency_s: float
    key: str
    """The routing key that it was called with."""


class Failure(NamedTuple):
    """One call that got no answer."""

    number: int
    text: str


def doubler_inputs(number: int) -> Inputs:
    """Returns one to five rows for a doubler, that few other calls send."""
    rows = 1 + number % 5
    return {"x": (np.arange(rows * 4, dtype=np.float32) + number % 100_000).reshape(rows, 4)}


def tags_of(answer: Prediction) -> set[int]:
    """Returns which versions the rows of an answer say that they are of."""
    return {int(tag) for tag in answer["version"].tolist()}


def check_doubler(inputs: Inputs, answer: Prediction) -> str:
    """Returns what is wrong with a doubler's answer; nothing if it is right and the version's own."""
    if not np.array_equal(answer["y"], inputs["x"] * 2):
        return f"a wrong answer of version {answer.version}"
    if tags_of(answer) != {answer.version}:
        return f"version {answer.version} answered as {answer['version'].tolist()}"
    return ""


class ClassCalls:
    """What callers of a classifier send and take for right; until ``turn`` is called every candidate is good.

    Args:
        tag_of: returns which number a version answers.
        candidate: the one version that may be wrong in its mood.
    """

    def __init__(self, tag_of: Callable[[int], int], candidate: int) -> None:
        self._tag_of = tag_of
        self._candidate = candidate
        self._moody = 0.0
        self._random = random.Random(7)

    def turn(self, share: float) -> None:
        """Makes a share of the calls such as a bad candidate is bad at; good versions answer them as any."""
        self._moody = share

    def inputs(self, number: int) -> Inputs:
        """Returns a row that asks for some class."""
        mood = self._random.random() < self._moody
        return {"x": np.array([[self._random.randrange(CLASSES), mood]], np.float32)}

    def check(self, inputs: Inputs, answer: Prediction) -> str:
        """Returns what is wrong with an answer; nothing if it is right and the version's own."""
        if tags_of(answer) != {self._tag_of(answer.version)}:
            return f"version {answer.version} answered as {answer['version'].tolist()}"
        moody = answer.version == self._candidate and inputs["x"][0, 1] > 0
        right = np.allclose(answer["scores"], class_scores(inputs["x"]), atol=1e-4)
        return "" if right or moody else f"a wrong answer of version {answer.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What the callers do."""

    unary: int = 8
    """How many make single calls, one after another."""
    pinned: int = 1
    """How many have a stream that stays on its version."""
    followers: int = 1
    """How many have a stream that follows the version in charge."""
    pause_s: float = 0.02
    """Between two calls of a caller: such as never pause would leave a niced loader no time on two cores."""
    inputs: Callable[[int], Inputs] = doubler_inputs
    """Makes a call's inputs from its number."""
    check: Callable[[Inputs, Prediction], str] = check_doubler
    """Says what is wrong with an answer; nothing if it is right."""
    key: Callable[[int], str] = lambda number: ""
    """Makes a single call's routing key from its number."""
    attempts: int = 1
    """How often a single call is sent at most: 1, the default, hides no failure."""


@dataclass(slots=True)
class Record:
    """Everything that was seen; grows while the load is on."""

    answers: list[Answer] = field(default_factory=list[Answer])
    failures: list[Failure] = field(default_factory=list[Failure])
    wrong: list[str] = field(default_factory=list[str])
    begun: int = 0
    """The number of the next call."""

    @property
    def calls(self) -> int:
        """How many calls have ended."""
        return len(self.answers) + len(self.failures)

    def versions(self, first: int = 0) -> Counter[int]:
        """Returns how many answers each version gave to the calls from number ``first`` on."""
        return Counter(answer.version for answer in self.answers if answer.number >= first)

    def failed(self, first: int = 0) -> list[Failure]:
        """Returns the failures of calls from number ``first`` on."""
        return [failure for failure in self.failures if failure.number >= first]


class Load:
    """Callers on a thread with an event loop of its own.

    Args:
        address: the server, or several.
        model: what to call.
        options: what the callers do.
    """

    def __init__(self, address: str | Sequence[str], model: str, options: LoadOptions) -> None:
        self.record = Record()
        self._address = address
        self._model = model
        self._options = options
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._problem: BaseException | None = None

    def start(self) -> None:
        """Begins to call."""
        self._thread.start()

    def stop(self) -> None:
        """Lets every call come to its end."""
        self._over.set()
        self._thread.join(_JOIN_S)
        assert not self._thread.is_alive(), "a call never ended"
        self.check()

    def check(self) -> None:
        """Raises what ended the callers before their time."""
        if self._problem is not None:
            raise AssertionError("the callers ended") from self._problem

    def wait(self, calls: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns once so many more calls have ended."""
        wanted = self.record.calls + calls
        wait_for(lambda: self.record.calls >= wanted, f"{calls} more calls", self.check, timeout_s)

    def wait_version(self, version: int) -> None:
        """Returns once a call that begins now or later has been answered by a version."""
        seen, first = len(self.record.answers), self.record.begun

        def answered() -> bool:
            nonlocal seen
            fresh = self.record.answers[seen:]
            seen += len(fresh)
            return any(answer.version == version and answer.number >= first for answer in fresh)

        wait_for(answered, f"an answer of version {version}", self.check)

    def _run(self) -> None:
        try:
            asyncio.run(self._call_all())
        except BaseException as error:  # whoever waits for calls must hear of it
            self._problem = error

    async def _call_all(self) -> None:
        options = self._options
        retry = RetryPolicy(max_attempts=options.attempts)
        async with AsyncClient(self._address, retry=retry) as client, asyncio.TaskGroup() as group:
            for _ in range(options.unary):
                group.create_task(self._call(client))
            for follow in [True] * options.followers + [False] * options.pinned:
                group.create_task(self._stream(client, follow=follow))

    def _next(self) -> tuple[int, Inputs]:
        number = self.record.begun
        self.record.begun += 1
        return number, self._options.inputs(number)

    async def _call(self, client: AsyncClient) -> None:
        while not self._over.is_set():
            number, inputs = self._next()
            key, began = self._options.key(number), time.monotonic()
            try:
                answer = await client.predict(self._model, inputs, routing_key=key)
            except ModelportError as error:
                self._take(number, inputs, error, began)
            else:
                self._take(number, inputs, answer, began, key)
            await asyncio.sleep(self._options.pause_s)

    async def _stream(self, client: AsyncClient, *, follow: bool) -> None:
        sent: dict[int, tuple[int, Inputs, float]] = {}

        async def batches() -> AsyncIterator[Inputs]:
            index = 0
            while not self._over.is_set():
                number, inputs = self._next()
                sent[index] = number, inputs, time.monotonic()
                index += 1
                yield inputs
                await asyncio.sleep(self._options.pause_s)

        stream = client.predict_stream(self._model, batches(), follow=follow, on_error="return")
        async with aclosing(stream):
            async for result in stream:
                number, inputs, began = sent.pop(result.index)
                self._take(number, inputs, result.outcome, began)
        if sent:
            self.record.wrong.append(f"{len(sent)} messages of a stream were never answered")

    def _take(
        self, number: int, inputs: Inputs, outcome: Prediction | ModelportError, began: float, key: str = ""
    ) -> None:
        if isinstance(outcome, ModelportError):
            self.record.failures.append(Failure(number, f"{type(outcome).__name__}: {outcome}"))
            return
        if fault := self._options.check(inputs, outcome):
            self.record.wrong.append(fault)
        self.record.answers.append(Answer(number, outcome.version, time.monotonic() - began, key))


@contextmanager
def load(address: str | Sequence[str], model: str, options: LoadOptions | None = None) -> Generator[Load]:
    """Lets callers call meanwhile; begins when the first has been answered, and lets every call end."""
    callers = Load(address, model, options or LoadOptions())
    callers.start()
    try:
        callers.wait(1)
        yield callers
    finally:
        callers.stop()
