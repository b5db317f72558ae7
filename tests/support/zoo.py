"""One server for every odd kind of model, with what TensorFlow itself makes of their golden examples."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: TID253 - the models under test use bfloat16
import numpy as np
import psutil
from numpy.typing import NDArray

from modelport.v1 import model_pb2, model_pb2_grpc
from modelport_registry import Golden, Registry
from tests.support.expected import Arrays, Case, by_tensorflow
from tests.support.rpc import open_channel
from tests.support.saved_models import SERVING_DEFAULT
from tests.support.server import ServerProcess, run_server, wait_for

LOADING_S = 600.0
"""Ten engines start at the lowest priority, so a machine that has other things to do takes its time."""

_RANDOM = np.random.default_rng(7)


def _floats(*shape: int) -> NDArray[np.float32]:
    return _RANDOM.standard_normal(shape).astype(np.float32)


def _strings(*items: bytes) -> NDArray[Any]:
    return np.array(items, dtype=object)


INPUTS: dict[tuple[str, str], Arrays] = {
    ("two_inputs", SERVING_DEFAULT): {"a": _floats(9, 3), "b": np.arange(-4, 5, dtype=np.int32)},
    ("strings", SERVING_DEFAULT): {
        "text": _strings(b"", b"ab", "gr\u00fc\u00df".encode(), b"\xff\x00\xfe", b"x" * 999)
    },
    ("no_batch", SERVING_DEFAULT): {"matrix": _floats(3, 3)},
    ("signatures", SERVING_DEFAULT): {"x": _floats(5)},
    ("signatures", "double"): {"x": _floats(5)},
    ("signatures", "triple"): {"x": _floats(5)},
    ("many", SERVING_DEFAULT): {"x": _floats(4)},
    ("bfloat16", SERVING_DEFAULT): {"x": _floats(6, 2).astype(ml_dtypes.bfloat16)},
    ("scalars", SERVING_DEFAULT): {"a": np.float32(1.5) * np.ones((), np.float32), "b": np.array(7, np.int64)},
    ("bad_rows", SERVING_DEFAULT): {"x": np.abs(_floats(8))},
    ("batch_mates", SERVING_DEFAULT): {"x": _floats(8)},
}
"""Inputs by model and signature: they are published as golden examples, and called with."""

_ODD_BITS = [0x7FC00000, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x7F800001]
ODD_NUMBERS = np.repeat(np.array([_ODD_BITS], np.uint32).T, 4, axis=1).view(np.float32)
"""NaN, infinities, -0, the smallest denormal and a signalling NaN, for ``canary``."""


@dataclass(frozen=True, slots=True)
class Zoo:
    """A server of the zoo's models, and of ``canary``, a versioned model with the tag 1."""

    server: ServerProcess
    process: psutil.Process
    expected: dict[tuple[str, str], dict[str, NDArray[Any]]]
    """What TensorFlow answers to ``INPUTS``, and to ``ODD_NUMBERS`` under ``canary`` and ``odd``."""
    saved_models: Path
    registry: Registry


def publish_zoo(root: Path, saved_models: Path, scratch: Path) -> dict[tuple[str, str], dict[str, NDArray[Any]]]:
    """Publishes every model of the zoo with golden examples; returns what TensorFlow answers to ``INPUTS``."""
    cases = {
        f"{model}.{signature}": Case(saved_models / "zoo" / model, inputs, signature)
        for (model, signature), inputs in INPUTS.items()
    }
    cases["canary.odd"] = Case(saved_models / "versioned-1", {"x": ODD_NUMBERS})
    outputs = by_tensorflow(scratch, cases)
    expected = {(model, signature): outputs[f"{model}.{signature}"] for model, signature in INPUTS}
    for model in sorted({model for model, _ in INPUTS}):
        golden = [
            Golden(signature, INPUTS[name, signature], expected[name, signature])
            for name, signature in INPUTS
            if name == model
        ]
        Registry(root).publish(model, saved_models / "zoo" / model, golden=golden)
    return {**expected, ("canary", "odd"): outputs["canary.odd"]}


def _served(server: ServerProcess) -> set[str]:
    with open_channel(server.address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        models = stub.ListModels(model_pb2.ListModelsRequest(), timeout=60, wait_for_ready=True).models
    return {model.name for model in models if model.serving_version}


@contextmanager
def run_zoo(scratch: Path, saved_models: Path, canary: Golden) -> Generator[Zoo]:
    """Serves the zoo."""
    root = scratch / "registry"
    expected = publish_zoo(root, saved_models, scratch / "expected")
    Registry(root).publish("canary", saved_models / "versioned-1", golden=[canary])
    with run_server(root, scratch, "--threads", "1") as server:
        names = {"canary", *(model for model, _ in INPUTS)}
        wait_for(lambda: _served(server) == names, "the zoo to be served", server.alive, LOADING_S)
        yield Zoo(server, psutil.Process(server.process.pid), expected, saved_models, Registry(root))
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]
    assert "never retrieved" not in log, log[-4000:]
