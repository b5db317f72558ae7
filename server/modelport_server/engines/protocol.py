"""The seam between modelport and whatever runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]


class Engine(Protocol):
    """Runs one SavedModel, in an engine process."""

    @property
    def name(self) -> str:
        """The engine and its version, for people."""
        ...

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Loads the SavedModel at ``path`` and makes ``signatures`` ready to run.

        Raises:
            EngineError: if the model can't be loaded.
            OSError: if its files can't be read now.
        """
        ...

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Runs one batch; several threads may be in here. What it returns is valid until the thread's next run.

        Strings are object arrays of ``bytes``; bfloat16 is ``ml_dtypes.bfloat16``.

        Raises:
            EngineError: if the model fails on these inputs.
        """
        ...


class Runs(Protocol):
    """What of an engine it takes to warm it up."""

    def run(self, signature: str, inputs: Mapping[str, Array]) -> object:
        """Runs one batch.

        Raises:
            EngineError: if the model fails on these inputs.
        """
        ...


class EngineError(Exception):
    """The model could not be loaded or run; the text is fit for callers.

    Args:
        message: what went wrong, in one line.
        caller_fault: whether the inputs are to blame.
    """

    def __init__(self, message: str, *, caller_fault: bool = False) -> None:
        super().__init__(message)
        self.caller_fault = caller_fault
