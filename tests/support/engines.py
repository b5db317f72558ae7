"""Stand-ins for engines, at the seam that the batcher sees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from modelport.tensors import DTYPES, STRING, pack_strings, unpack_strings
from modelport_server.batching.calls import Answer, Batch, BatchOutput, Call
from modelport_server.errors import EngineDiedError
from modelport_server.tensors import RawTensor, cut_rows, join_rows

ID = DTYPES["int64"]


def numbers(name: str, ids: Sequence[int]) -> RawTensor:
    """Returns an int64 column."""
    return RawTensor(name, ID, (len(ids),), np.array(ids, "<i8").tobytes())


def texts(name: str, ids: Sequence[int]) -> RawTensor:
    """Returns a string column that says the same as ``numbers``, each row of a length of its own."""
    return RawTensor(name, STRING, (len(ids),), pack_strings(text(number) for number in ids))


def text(number: int) -> bytes:
    """Returns the string for a row."""
    return f"{number}".encode() + b"\x00" * (number % 5)


def ids_of(tensor: RawTensor) -> list[int]:
    """Returns the rows' ids, which a ``numbers`` tensor holds."""
    return [int(number) for number in np.frombuffer(tensor.data, "<i8")]


def texts_of(tensor: RawTensor) -> list[bytes]:
    """Returns the strings of a ``texts`` tensor."""
    return unpack_strings(tensor.data, tensor.elements)


def new_call(
    ids: Sequence[int],
    loop: asyncio.AbstractEventLoop | None = None,
    *,
    signature: str = "numbers",
    splittable: bool = True,
    deadline: float = float("inf"),
) -> Call:
    """Returns a call whose rows carry ``ids``, as numbers or, with the signature ``texts``, as strings too."""
    inputs = (numbers("id", ids), texts("text", ids)) if signature == "texts" else (numbers("id", ids),)
    future: asyncio.Future[Answer] = (loop or asyncio.get_running_loop()).create_future()
    return Call(
        signature=signature,
        key=(signature, ()) if splittable else (signature,),
        inputs=inputs,
        rows=len(ids) if splittable else 1,
        splittable=splittable,
        future=future,
        deadline=deadline,
    )


@dataclass(eq=False, slots=True)
class Run:
    """A batch that the fake engine is asked to run, until the test says how it ends."""

    batch: Batch
    inputs: tuple[RawTensor, ...]
    end: asyncio.Future[BatchOutput]
    released: bool = False

    @property
    def ids(self) -> list[int]:
        """The ids of all its rows."""
        return ids_of(self.inputs[0])

    def output(self, outputs: Sequence[RawTensor] | None = None) -> BatchOutput:
        """Returns what a model would answer that gives its inputs back, or ``outputs``."""

        def release() -> None:
            assert not self.released
            self.released = True

        views = tuple(self.inputs if outputs is None else outputs)
        return BatchOutput(views, 100, release)


@dataclass(slots=True)
class FakeEngine:
    """A ``BatchRunner`` whose batches end when and how the test says."""

    slots: int = 2
    instances: int = 1
    on_run: Callable[[Run], None] = lambda run: None
    """Called with each batch as it begins."""
    runs: list[Run] = field(default_factory=list[Run])
    """The batches that are under way."""
    most: int = 0
    """How many were under way at once."""
    dead: bool = False

    def run(self, batch: Batch) -> asyncio.Future[BatchOutput]:
        """Runs ``batch``: waits for the test.

        Raises:
            EngineDiedError: if it is ``dead``.
        """
        if self.dead:
            raise EngineDiedError("the engine died")
        columns = range(len(batch.parts[0].call.inputs))
        inputs = tuple(
            join_rows([cut_rows(part.call.inputs[i], part.start, part.stop) for part in batch.parts])
            if batch.parts[0].call.splittable
            else batch.parts[0].call.inputs[i]
            for i in columns
        )
        run = Run(batch, inputs, asyncio.get_running_loop().create_future())
        self.runs.append(run)
        self.most = max(self.most, len(self.runs))
        self.on_run(run)
        run.end.add_done_callback(lambda _: self.runs.remove(run))
        return run.end


async def settle() -> None:
    """Lets everything happen that can happen without waiting."""
    for _ in range(20):
        await asyncio.sleep(0)
