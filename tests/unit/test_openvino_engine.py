"""What OpenVINO is given and what it is not, on models made without TensorFlow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelport_server.engines.openvino_engine import OpenVINOEngine, import_openvino
from modelport_server.engines.parallel import Parallelism


@pytest.mark.parametrize("elements", [4, 1000, 100_000])
def test_inputs_that_can_not_be_written_to_live_until_it_is_done(tmp_path: Path, elements: int) -> None:
    """It shares memory with its inputs, and does not keep copies that were made of them."""
    openvino = import_openvino()
    ops = openvino.opset13
    inputs = [ops.parameter([-1], np.float32, name=name) for name in "abc"]
    for number in inputs:
        number.output(0).get_tensor().set_names({number.get_friendly_name()})
    results = [ops.add(number, np.float32(1)) for number in inputs]
    for name, result in zip("xyz", results, strict=True):
        result.output(0).get_tensor().set_names({name})
    engine = OpenVINOEngine(parallelism=Parallelism(1, 1))
    compiled = openvino.Core().compile_model(openvino.Model(results, inputs, "three"), "CPU")
    engine.add("three", compiled, list("xyz"))
    arrays = {name: np.full(elements, value, np.float32) for value, name in enumerate("abc")}
    for array in arrays.values():
        array.flags.writeable = False
    for _ in range(5):
        outputs = engine.run("three", arrays)
        assert {name: set(array.tolist()) for name, array in outputs.items()} == {"x": {1.0}, "y": {2.0}, "z": {3.0}}
