"""Engine processes without TensorFlow: the real zygote and worker, with another ``Engine`` in them.

Run by ``tests.support.launch`` as ``python -m tests.support.stub_engine modelport_server.engines.MODULE ...``.

A version can be held at any gate: while there is a file ``hold_file(folder, version, gate)``, it stays there,
and says so with a file of the same name and ``.reached``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelport_registry import Golden
from modelport_server.engines import primed, worker, zygote
from modelport_server.engines.order import LoadOrder
from modelport_server.engines.parallel import Parallelism
from modelport_server.engines.protocol import Array, EngineError
from modelport_server.gates.result import SPEED
from tests.support.saved_models import SERVING_DEFAULT, Tensors, write_fake_saved_model

HOLD = "MODELPORT_TEST_HOLD"
"""The environment variable that names the folder of hold files."""

SIGNATURES: Mapping[str, tuple[Tensors, Tensors]] = {
    SERVING_DEFAULT: ({"x": ("float32", [None, 4])}, {"y": ("float32", [None, 4]), "version": ("string", [None])}),
}
_MOODY = " moody"
_POLL_S = 0.01


def write_stub(folder: Path, tag: int, *, moody: bool = False) -> Path:
    """Writes what ``StubEngine`` takes for a SavedModel; it answers y = 2x and version string [n], the tag.

    One that is moody fails on rows below zero.
    """
    return write_fake_saved_model(folder, SIGNATURES, variables=stub_variables(tag, moody=moody))


def stub_variables(tag: int, *, moody: bool = False) -> bytes:
    """Returns what stands in a stub's file of variables."""
    return f"{tag}{_MOODY if moody else ''}".encode()


def stub_golden(tag: int) -> Golden:
    """Returns what the stub with a tag answers."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    return Golden(SERVING_DEFAULT, {"x": x}, {"y": x * 2, "version": np.full(2, f"{tag}".encode(), object)})


def hold_file(folder: Path, version: int, gate: str) -> Path:
    """Returns the file that holds a version at a gate."""
    return folder / f"{version}-{gate}"


def reached_file(folder: Path, version: int, gate: str) -> Path:
    """Returns the file that says that a version is held at a gate."""
    return folder / f"{version}-{gate}.reached"


class StubEngine:
    """Doubles its input, and says which version it is."""

    name = "stub"

    def __init__(self) -> None:
        self._tag = 0
        self._moody = False

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Reads the tag, which stands where the variables would."""
        assert list(signatures) == [SERVING_DEFAULT]
        text = (path / "variables" / "variables.data-00000-of-00001").read_text()
        self._tag, self._moody = int(text.removesuffix(_MOODY)), text.endswith(_MOODY)

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Answers at once."""
        assert signature == SERVING_DEFAULT
        if self._moody and (inputs["x"] < 0).any():
            raise EngineError("it is in a bad mood")
        return {"y": inputs["x"] * 2, "version": np.full(len(inputs["x"]), f"{self._tag}".encode(), object)}


def _hold(version: int, gate: str) -> None:
    """Returns when nothing holds a version at a gate any more."""
    folder = Path(os.environ[HOLD])
    while hold_file(folder, version, gate).exists():
        reached_file(folder, version, gate).touch()
        time.sleep(_POLL_S)


def _hold_at_gates() -> None:
    """Makes the real worker wait where it is told to, within the gate."""
    loading: Any = worker._Loading  # pyright: ignore[reportPrivateUsage]
    begun, served = loading._gate, worker.Worker._run  # pyright: ignore[reportPrivateUsage]
    versions: list[int] = []

    @contextlib.contextmanager
    def gate(self: Any, name: str) -> Generator[Any]:
        versions[:] = [self._order.version]
        with begun(self, name) as figures:
            _hold(versions[0], name)
            yield figures

    def run(self: Any, message: Any) -> None:
        _hold(versions[0], SPEED)  # what it first runs once it is loaded
        served(self, message)

    loading._gate, worker.Worker._run = gate, run  # type: ignore[method-assign]


def _new_engine(order: LoadOrder, parallelism: Parallelism, samples: object) -> StubEngine:
    return StubEngine()


def _import_nothing(_: str) -> None:
    """The stub needs no library."""


def main() -> None:
    """Is what the first argument names, without TensorFlow."""
    module = sys.argv.pop(1)
    setattr(worker, "_import_engine", _import_nothing)  # noqa: B010 - it is not ours
    setattr(worker, "_new_engine", _new_engine)  # noqa: B010
    if os.environ[HOLD]:
        _hold_at_gates()
    {"primed": primed.main, "worker": worker.main, "zygote": zygote.main}[module.rpartition(".")[2]]()


if __name__ == "__main__":
    main()
