"""What TensorFlow itself answers, computed in a process of its own.

Run as ``python -m tests.support.expected FOLDER``, with ``FOLDER/cases.json`` saying for each case the
SavedModel and the signature, and ``FOLDER/<case>.in.npz`` holding its inputs; writes ``FOLDER/<case>.out.npz``.
Nothing is pickled: each array is held as the bytes of a ``modelport.v1.Tensor``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelport.tensors import decode, encode
from modelport.v1 import tensor_pb2

ROOT = Path(__file__).resolve().parents[2]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """One call."""

    model: Path
    inputs: Arrays
    signature: str = "serving_default"


def by_tensorflow(folder: Path, cases: Mapping[str, Case]) -> dict[str, dict[str, NDArray[Any]]]:
    """Returns the outputs that TensorFlow gives for each case, by the case's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in cases.items():
        _write(folder / f"{name}.in.npz", case.inputs)
    orders = {name: [str(case.model), case.signature] for name, case in cases.items()}
    (folder / "cases.json").write_text(json.dumps(orders))
    command = [sys.executable, "-m", "tests.support.expected", str(folder)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    return {name: _read(folder / f"{name}.out.npz") for name in cases}


def _write(path: Path, arrays: Arrays) -> None:
    raw = {name: np.frombuffer(encode(name, array).SerializeToString(), np.uint8) for name, array in arrays.items()}
    np.savez(path, allow_pickle=False, **raw)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: decode(tensor_pb2.Tensor.FromString(stored[name].tobytes())) for name in stored.files}


def main() -> None:
    """Computes every case."""
    import tensorflow as tf

    tensorflow: Any = tf
    folder = Path(sys.argv[1])
    models: dict[str, Any] = {}
    for name, (path, signature) in json.loads((folder / "cases.json").read_text()).items():
        model = models.setdefault(path, tensorflow.saved_model.load(path))
        inputs = _read(folder / f"{name}.in.npz")
        tensors = {key: tensorflow.convert_to_tensor(array) for key, array in inputs.items()}
        outputs = model.signatures[signature](**tensors)
        _write(folder / f"{name}.out.npz", {key: np.asarray(value.numpy()) for key, value in outputs.items()})


if __name__ == "__main__":
    main()
