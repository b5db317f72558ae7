"""The two ways in which ``modelport predict`` runs a model: on a server, and in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from modelport._async_client import make_target
from modelport._client import Client
from modelport._models import SignatureInfo
from modelport._signatures import find
from modelport.exceptions import InputError, ModelportError

_LOCAL = "modelport.local"


class ServedModel:
    """A model on a server. Use it as ``with``."""

    signature: SignatureInfo

    def __init__(
        self,
        server: Sequence[str],
        model: str,
        *,
        version: int | None,
        alias: str | None,
        signature: str,
        outputs: Sequence[str],
    ) -> None:
        self._client = Client(server)
        self._target = make_target(model, version, alias, signature, outputs, "")

    def __enter__(self) -> ServedModel:
        try:
            _, self.signature = find(self._client.model(self._target.model), self._target)
        except BaseException:
            self._client.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def answers(self, batches: Iterator[dict[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the version that answered and the outputs, batch by batch."""
        target = self._target
        if not self.signature.batched:
            for batch in batches:
                answer = self._client.predict(
                    target.model,
                    batch,
                    version=target.version,
                    alias=target.alias,
                    signature=target.signature,
                    outputs=target.outputs,
                )
                yield answer.version, answer.outputs
            return
        results = self._client.predict_stream(
            target.model,
            batches,
            version=target.version,
            alias=target.alias,
            signature=target.signature,
            outputs=target.outputs,
        )
        for result in results:
            yield result.prediction.version, result.prediction.outputs


class LocalModel:
    """A stored version in this process. Use it as ``with``."""

    signature: Any

    def __init__(
        self,
        registry: Path,
        model: str,
        *,
        version: int | None,
        alias: str | None,
        signature: str,
        outputs: Sequence[str],
    ) -> None:
        self._registry = registry
        self._model = model
        self._choice: dict[str, Any] = {"version": version, "alias": alias, "signature": signature}
        self._wanted = outputs
        self._stack = ExitStack()
        self._local: Any = None

    def __enter__(self) -> LocalModel:
        self._local = self._stack.enter_context(_opener()(self._registry, self._model, **self._choice))
        self.signature = self._local.signature
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def answers(self, batches: Iterator[dict[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the version that answered and the outputs, batch by batch."""
        for batch in batches:
            outputs: Mapping[str, Any] = self._local.predict(batch)
            if missing := [name for name in self._wanted if name not in outputs]:
                raise InputError(f"the model has no output {missing[0]!r}; it has {', '.join(outputs)}")
            yield self._local.version, {name: outputs[name] for name in self._wanted or outputs}


def _opener() -> Any:
    for entry in metadata.entry_points(group=_LOCAL, name="tensorflow"):
        try:
            return entry.load()
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("modelport"):
                raise
    raise ModelportError("--local runs the model here, which needs: pip install 'modelport[server]'")
