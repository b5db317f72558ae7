"""A servable by itself, without an engine."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from modelport.tensors import array_bytes, dtype_of
from modelport_registry import Manifest, SignatureSpec, TensorSpec
from modelport_server.batching.calls import Batch, BatchOutput, Call
from modelport_server.engines.process import LoadOrder
from modelport_server.errors import NotAvailableError
from modelport_server.options import BatchLimits, EngineLimits
from modelport_server.servable import Servable, ServedSignature
from modelport_server.tensors import RawTensor

X = np.zeros((2, 4), np.float32)


class Listener:
    """An observer that writes down what it hears."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def on_call(self, call: Call, now_s: float) -> None:
        self.calls.append(call)

    def on_batch(self, batch: Batch, output: BatchOutput) -> None:
        raise AssertionError("there is no engine")


class Broken(Listener):
    """An observer that fails."""

    def on_call(self, call: Call, now_s: float) -> None:
        raise ValueError("I can't count")


async def test_an_observer_that_fails_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    tensor = TensorSpec("x", "float32", (None, 4))
    spec = SignatureSpec("serving_default", (tensor,), (tensor,))
    servable = Servable(
        LoadOrder(Path("registry"), "digits", 3, 8),
        cast("Manifest", None),
        BatchLimits(),
        EngineLimits(),
        on_state=lambda _: None,
        on_rejected=lambda _gate, _reason: None,
    )
    servable.signatures = {spec.name: ServedSignature(spec, batched=True)}
    listener = Listener()
    servable.observers = (Broken(), listener)
    call = servable.prepare("", [RawTensor("x", dtype_of(X), X.shape, array_bytes(X, dtype_of(X)))], (), float("inf"))
    servable.submit(call)
    await servable.stop()
    with pytest.raises(NotAvailableError):
        await call.future
    await asyncio.sleep(0)  # it had ended before anybody waited
    assert listener.calls == [call]
    assert servable.oldest_wait_s == 0
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("modelport_server.servable", logging.ERROR)
    assert "digits@3" in record.getMessage()
