"""Engine processes without TensorFlow: the real zygote and worker, with another ``Engine`` in them.

Run by ``tests.support.launch`` as ``python -m tests.support.stub_engine modelport_server.engines.MODULE ...``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modelport_registry import Golden
from modelport_server.engines import worker, zygote
from modelport_server.engines.protocol import Array
from tests.support.saved_models import SERVING_DEFAULT, Tensors, write_fake_saved_model

SIGNATURES: Mapping[str, tuple[Tensors, Tensors]] = {
    SERVING_DEFAULT: ({"x": ("float32", [None, 4])}, {"y": ("float32", [None, 4]), "version": ("int64", [None])}),
}


def write_stub(folder: Path, tag: int) -> Path:
    """Writes what ``StubEngine`` takes for a SavedModel; it answers as ``write_versioned_model``'s do."""
    return write_fake_saved_model(folder, SIGNATURES, variables=f"{tag}".encode())


def stub_golden(tag: int) -> Golden:
    """Returns what the stub with a tag answers."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    return Golden(SERVING_DEFAULT, {"x": x}, {"y": x * 2, "version": np.full(2, tag, np.int64)})


class StubEngine:
    """Doubles its input, and says which version it is."""

    name = "stub"

    def __init__(self) -> None:
        self._tag = 0

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Reads the tag, which stands where the variables would."""
        assert list(signatures) == [SERVING_DEFAULT]
        self._tag = int((path / "variables" / "variables.data-00000-of-00001").read_text())

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Answers at once."""
        assert signature == SERVING_DEFAULT
        return {"y": inputs["x"] * 2, "version": np.full(len(inputs["x"]), self._tag, np.int64)}


def main() -> None:
    """Is what the first argument names, without TensorFlow."""
    module = sys.argv.pop(1)
    setattr(worker, "_import_engine", lambda: None)  # noqa: B010 - it is not ours
    setattr(worker, "_new_engine", lambda threads: StubEngine())  # noqa: B010
    {"worker": worker.main, "zygote": zygote.main}[module.rpartition(".")[2]]()


if __name__ == "__main__":
    main()
