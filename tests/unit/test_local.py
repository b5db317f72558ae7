"""The offline model checks its inputs as the server does, before an engine sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from modelport.exceptions import ModelportError
from modelport_registry import SignatureSpec, TensorSpec
from modelport_server.engines.protocol import Array
from modelport_server.local import LocalModel

SPEC = SignatureSpec("serving_default", (TensorSpec("x", "uint8", (None, 2)),), (TensorSpec("y", "uint8", (None, 2)),))


class Echo:
    """An engine that gives its inputs back."""

    name = "echo"

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Has nothing to load."""

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"y": inputs["x"]}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.ones((1, 2), np.float32)}, "input 'x' must be uint8, not float32"),
        ({"x": np.ones((1, 3), np.uint8)}, "input 'x' must have shape [?, 2], not [1, 3]"),
        ({}, "input 'x' of signature 'serving_default' is missing"),
    ],
)
def test_wrong_inputs_get_the_servers_words(inputs: dict[str, Array], message: str) -> None:
    with pytest.raises(ModelportError) as raised:
        LocalModel(Echo(), 1, SPEC).predict(inputs)
    assert str(raised.value) == message


def test_right_inputs_are_run() -> None:
    x = np.ones((2, 2), np.uint8)
    assert LocalModel(Echo(), 1, SPEC).predict({"x": x})["y"] is x
