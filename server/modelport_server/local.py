"""Runs a stored version in this process, without a server: for offline prediction."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from modelport.exceptions import ModelportError
from modelport.names import DEFAULT_SIGNATURE, shown
from modelport.tensors import dtype_of
from modelport_registry import Registry, SignatureSpec
from modelport_server.engines.protocol import Array, Engine, EngineError
from modelport_server.signatures import arrange
from modelport_server.tensors import RawTensor


class LocalModel:
    """A version that has been loaded into this process.

    Args:
        engine: the engine that has it.
        version: its number.
        signature: the signature that is run.
    """

    def __init__(self, engine: Engine, version: int, signature: SignatureSpec) -> None:
        self._engine = engine
        self.version = version
        self.signature = signature

    def predict(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Returns the outputs by name, as TensorFlow gives them.

        Raises:
            ModelportError: if the inputs are not what the signature takes, or the model fails on them.
        """
        arrange(self.signature, [RawTensor(name, dtype_of(a), a.shape, b"") for name, a in inputs.items()])
        try:
            return self._engine.run(self.signature.name, inputs)
        except EngineError as error:
            raise ModelportError(f"the model failed: {error}") from error


@contextmanager
def open_local(
    registry: Path, model: str, *, version: int | None = None, alias: str | None = None, signature: str = ""
) -> Generator[LocalModel]:
    """Loads a version into this process, holding it in the registry for as long as it is used.

    Args:
        registry: the registry's folder.
        model: the model's name.
        version: which version; without it the one with ``alias``, else ``stable``, else the highest.
        alias: an alias instead of a version.
        signature: which signature; empty means ``serving_default``.

    Raises:
        ModelportError: if there is no such version or signature, or its files are damaged.
    """
    from modelport_server.engines.tensorflow_engine import TensorFlowEngine

    store = Registry(registry)
    number = store.resolve(model, version=version, alias=alias)
    with store.lease(model, number):
        specs = store.verify(model, number).signatures
        wanted = signature or DEFAULT_SIGNATURE
        if wanted not in specs:
            raise ModelportError(f"{model} has no signature {shown(wanted)}; it has {', '.join(map(repr, specs))}")
        engine = TensorFlowEngine()
        try:
            engine.load(store.path(model, number), [wanted])
        except EngineError as error:
            raise ModelportError(f"{model}@{number} can't be loaded: {error}") from error
        yield LocalModel(engine, number, specs[wanted])
