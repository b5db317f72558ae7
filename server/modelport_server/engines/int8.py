"""Models in int8: quantised after training by nncf, in a process of its own, which ends with that.

Started by ``quantise`` in an engine process. The command line gives the engine process's pid, the model and a folder:
samples are read from there, and the model in int8, or why there is none, is written there.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelport_registry import Golden
from modelport_server.engines._imports import without
from modelport_server.engines._system import live_under
from modelport_server.engines.protocol import Array

Samples = Sequence[Mapping[str, Array]]
"""Inputs by name, as a model is called with them."""
_NOT_IMPORTED = ("openvino.tools", "openvino_telemetry", "torch", "onnx")
"""What nncf does without where it is not installed: the second one reports to nncf's makers how it is used."""
_QUANTISED = "FakeQuantize"
"""The operation at which OpenVINO goes over to int8; nncf puts it into a model."""
_SAMPLES, _MODEL, _ERROR = "samples.npz", "int8.xml", "error"


class QuantisingError(Exception):
    """A model can't be made int8; the text is nncf's, of any length."""


def samples_of(golden: Sequence[Golden], batched: Container[str]) -> dict[str, Samples]:
    """Returns what a model is calibrated with, by signature: all golden inputs, row by row where they are batched."""
    samples = dict[str, list[Mapping[str, Array]]]()
    for example in golden:
        inputs = example.inputs
        rows = range(len(next(iter(inputs.values())))) if example.signature in batched else ()
        parts: Samples = [{name: array[row : row + 1] for name, array in inputs.items()} for row in rows]
        samples.setdefault(example.signature, []).extend(parts or [inputs])
    return {**samples}


def quantise(model: Path, samples: Samples, folder: Path) -> Path:
    """Makes a model int8 where that can be, and returns where it is.

    That is done in a process of its own: nncf would leave behind some 60 MiB, and threads of the priority that
    versions are loaded at, on which batches would run.

    Args:
        model: a SavedModel that OpenVINO can read.
        samples: inputs from which it is learned what range of values each operation has to do with.
        folder: an empty one, for files.

    Raises:
        QuantisingError: if nncf is not installed, or can't do it.
        OSError: if files can't be written, or the process can't be started.
    """
    arrays = {f"{number}.{name}": array for number, inputs in enumerate(samples) for name, array in inputs.items()}
    save: Any = np.savez  # its types take every keyword for an option of newer versions
    save(folder / _SAMPLES, **arrays)
    command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), str(model), str(folder)]
    silent = subprocess.DEVNULL  # it draws progress bars, and warns of what is ours to decide
    done = subprocess.run(command, stdin=silent, stdout=silent, stderr=silent, check=False)
    if (folder / _MODEL).exists() and not done.returncode:
        return folder / _MODEL
    error = folder / _ERROR
    raise QuantisingError(error.read_text() if error.exists() else f"it ended with status {done.returncode}")


def is_quantised(model: Any) -> bool:
    """Returns whether anything in a model of OpenVINO's is computed in int8."""
    return any(operation.get_type_name() == _QUANTISED for operation in model.get_ops())


def main() -> None:
    """Makes a model int8."""
    engine, model, folder = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    if not live_under(engine):
        return
    try:
        with without(*_NOT_IMPORTED):
            _quantise(model, folder)
    except ModuleNotFoundError as error:
        (folder / _ERROR).write_text(f"there is no {error.name}: pip install 'modelport[int8]'")
    except Exception as error:  # whatever it is, the engine process has to say it
        (folder / _ERROR).write_text(str(error).strip() or type(error).__name__)


def _quantise(path: Path, folder: Path) -> None:
    from modelport_server.engines.openvino_engine import import_openvino

    openvino = import_openvino()
    nncf: Any = importlib.import_module("nncf")
    model = openvino.Core().read_model(path)
    places = {name: at for at, given in enumerate(model.inputs) for name in given.get_names()}
    samples = list(_read(folder / _SAMPLES, places))
    # Golden examples are few, so all that they show counts; by itself it takes means, as of thousands.
    estimators: Any = importlib.import_module("nncf.quantization.range_estimator")
    ranges = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=estimators.RangeEstimatorParametersSet.MINMAX
    )
    found = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples), advanced_parameters=ranges)
    openvino.save_model(found, folder / _MODEL, compress_to_fp16=False)


def _read(path: Path, places: Mapping[str, int]) -> Iterator[dict[int, Array]]:
    """Yields the samples by the inputs' places; OpenVINO leaves out inputs that nothing depends on."""
    samples: dict[str, dict[int, Array]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            number, _, name = key.partition(".")
            sample = samples.setdefault(number, {})
            if name in places:
                sample[places[name]] = arrays[key]
    yield from samples.values()


if __name__ == "__main__":
    main()
