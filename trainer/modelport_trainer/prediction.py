"""Step 5, prediction: a stored model answers on new data, without the code that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport.names import DEFAULT_SIGNATURE
from modelport_trainer import _libraries
from modelport_trainer.errors import ExportError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SavedModelPredictor:
    """Runs one signature of a SavedModel in this process, numpy in and out."""

    def __init__(self, path: Path, signature: str = DEFAULT_SIGNATURE) -> None:
        """Loads the model.

        Args:
            path: The SavedModel's folder.
            signature: The signature to run.

        Raises:
            ExportError: If there is no SavedModel that TensorFlow can load, or no such signature.
        """
        tf = _libraries.tensorflow()
        if not (path / "saved_model.pb").is_file():
            raise ExportError(f"{path}: not a SavedModel, it has no saved_model.pb")
        try:
            # Kept because its variables go when it goes.
            self._loaded = tf.saved_model.load(str(path))
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise ExportError(f"{path}: TensorFlow cannot load it ({_first_line(error)})") from error
        if signature not in self._loaded.signatures:
            names = ", ".join(sorted(self._loaded.signatures)) or "none"
            raise ExportError(f"{path}: no signature {signature!r}; it has {names}")
        self._run = self._loaded.signatures[signature]
        self._specs: dict[str, Any] = dict(self._run.structured_input_signature[1])

    @property
    def input_names(self) -> tuple[str, ...]:
        """The signature's inputs, sorted."""
        return tuple(sorted(self._specs))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Runs the signature once, on whole tensors.

        Args:
            inputs: Arrays, or anything that becomes one, by input name.

        Returns:
            Arrays by output name.

        Raises:
            ExportError: If an input is missing, unknown, or of a shape or type that the model does not take.
        """
        tf = _libraries.tensorflow()
        if inputs.keys() != self._specs.keys():
            raise ExportError(
                f"the model takes {', '.join(self.input_names)}, it was given {', '.join(sorted(inputs))}"
            )
        try:
            tensors = {name: tf.constant(inputs[name], dtype=spec.dtype) for name, spec in self._specs.items()}
            outputs = self._run(**tensors)
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise ExportError(f"the model does not take these inputs: {_first_line(error)}") from error
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    def predict(self, inputs: Mapping[str, Any], *, batch_rows: int = 256) -> dict[str, NDArray[Any]]:
        """Runs the signature over rows, ``batch_rows`` at a time; dimension 0 of everything is the row.

        Args:
            inputs: Arrays ``[rows, ...]`` by input name.
            batch_rows: The most rows per run.

        Returns:
            Arrays ``[rows, ...]`` by output name.

        Raises:
            ExportError: If inputs differ in rows, or as ``run`` says.
        """
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        counts = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
        if len(set(counts.values())) != 1:
            raise ExportError(f"inputs differ in rows: {counts}")
        rows = next(iter(counts.values()))
        parts = [
            self.run({name: array[start : start + batch_rows] for name, array in arrays.items()})
            for start in range(0, max(rows, 1), batch_rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
