"""What one batch costs on an engine that nobody else calls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from modelport.tensors import array_bytes, dtype_of
from modelport_registry import SignatureSpec
from modelport_server.batching.calls import Answer, Batch, BatchRunner, Call, Part
from modelport_server.gates.speed import Probe
from modelport_server.signatures import arrange
from modelport_server.tensors import RawTensor

Inputs = Mapping[str, NDArray[Any]]


def to_raw(inputs: Inputs) -> list[RawTensor]:
    """Returns arrays as tensors of the wire format."""
    tensors: list[RawTensor] = []
    for name, array in inputs.items():
        dtype = dtype_of(array)
        tensors.append(RawTensor(name, dtype, array.shape, array_bytes(array, dtype)))
    return tensors


async def probe(engine: BatchRunner, spec: SignatureSpec, inputs: Inputs) -> Probe:
    """Runs one batch by itself and returns what it cost.

    Args:
        engine: has loaded the model.
        spec: the signature.
        inputs: every input, all rows at once.

    Raises:
        ServeError: if it can't be run.
    """
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    call = Call(spec.name, (spec.name,), arrange(spec, to_raw(inputs)), 1, splittable=False, future=future)
    output = await engine.run(Batch(spec.name, [Part(call, 0, 1)]))
    output.release()
    return Probe(output.engine_time_us, output.cpu_time_us)
