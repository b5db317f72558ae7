"""What a server says about its models, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from types import MappingProxyType

from modelport.tensors import DTYPES_BY_NUMBER
from modelport.v1 import model_pb2


class VersionState(Enum):
    """Where a version stands in its life."""

    UNKNOWN = "unknown"
    """The server is newer than this client."""
    DISCOVERED = "discovered"
    """Seen in the registry."""
    VERIFYING = "verifying"
    """Its files are being checked."""
    LOADING = "loading"
    """An engine process is loading it."""
    WARMING = "warming"
    """It reproduces its golden examples and warms up."""
    AVAILABLE = "available"
    """It can answer."""
    DRAINING = "draining"
    """It answers what it began, and nothing new."""
    RETIRED = "retired"
    """Its engine process is gone."""
    REJECTED = "rejected"
    """It failed a gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """An input or output of a signature."""

    name: str
    """Its name."""
    dtype: str
    """numpy's name of the element type; ``bfloat16`` and ``string`` besides."""
    shape: tuple[int | None, ...] | None
    """The size of each dimension, None where it is free; None as a whole where the rank is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureInfo:
    """One way to call a model."""

    name: str
    """Its name."""
    inputs: tuple[TensorInfo, ...]
    """What it takes."""
    outputs: tuple[TensorInfo, ...]
    """What it gives."""
    batched: bool
    """The first dimension of every input and output counts rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAttempt:
    """How an engine did that the server tried for a version."""

    engine: str
    """Its name, with its version once that is known."""
    reason: str
    """Why it was not taken; empty for the one that was."""
    row_ms: Mapping[int, float]
    """What a row took in the median, in milliseconds, by the size of the batch; empty if it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """A version of a model and how it fares on the server."""

    version: int
    """Its number."""
    state: VersionState
    """Where it stands in its life."""
    reason: str
    """For a rejected version, the gate that it failed and why; for others what people should know."""
    since: datetime | None
    """When it got into its state, in UTC."""
    engine: str
    """The engine that runs it; empty until it is loaded."""
    engines: tuple[EngineAttempt, ...] = ()
    """Every engine that was tried, the one that runs it among them."""
    instances: int = 0
    """How many of its batches run at once; 0 until it is loaded, or if the server does not say."""
    threads: int = 0
    """How many threads each of them has; likewise."""
    max_batch_size: int = 0
    """The most rows that run together; likewise."""
    golden_examples: int
    """How many golden examples it reproduced on the server's machine."""
    signatures: Mapping[str, SignatureInfo]
    """Its signatures by name."""
    metrics: Mapping[str, float]
    """The metrics that it was published with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that a server serves or tries to serve."""

    name: str
    """Its name."""
    serving_version: int | None
    """The version that answers calls which name none; None if none can yet."""
    aliases: Mapping[str, int]
    """Each alias with the version that it stands for."""
    versions: tuple[VersionInfo, ...]
    """The versions that the server knows of, highest first."""

    def version(self, number: int) -> VersionInfo | None:
        """Returns the version with this number; None if the server does not know it."""
        return next((v for v in self.versions if v.version == number), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChange:
    """Something about a model has changed."""

    model: ModelInfo
    """The model as it is now; of a removed one only the name counts."""
    removed: bool
    """It was taken out of service."""


_STATES = {
    int(model_pb2.ModelVersion.State.Value(f"STATE_{state.name}")): state
    for state in VersionState
    if state is not VersionState.UNKNOWN
}


def model_info(message: model_pb2.Model) -> ModelInfo:
    """Returns a model from its message."""
    return ModelInfo(
        name=message.name,
        serving_version=message.serving_version or None,
        aliases=MappingProxyType(dict(message.aliases)),
        versions=tuple(map(_version_info, message.versions)),
    )


def _version_info(message: model_pb2.ModelVersion) -> VersionInfo:
    return VersionInfo(
        version=message.version,
        state=version_state(message.state),
        reason=message.reason,
        since=message.since.ToDatetime(UTC) if message.HasField("since") else None,
        engine=message.engine,
        engines=tuple(map(_engine_attempt, message.engines)),
        instances=message.instances,
        threads=message.threads,
        max_batch_size=message.max_batch_size,
        golden_examples=message.golden_examples,
        signatures=MappingProxyType({s.name: _signature_info(s) for s in message.signatures}),
        metrics=MappingProxyType(dict(sorted(message.metrics.items()))),
    )


def _engine_attempt(message: model_pb2.EngineAttempt) -> EngineAttempt:
    return EngineAttempt(
        engine=message.engine, reason=message.reason, row_ms=MappingProxyType(dict(sorted(message.row_ms.items())))
    )


def version_state(number: int) -> VersionState:
    """Returns the state that a number of ``ModelVersion.State`` stands for."""
    return _STATES.get(number, VersionState.UNKNOWN)


def _signature_info(message: model_pb2.Signature) -> SignatureInfo:
    return SignatureInfo(
        name=message.name,
        inputs=_tensor_infos(message.inputs),
        outputs=_tensor_infos(message.outputs),
        batched=message.batched,
    )


def _tensor_infos(messages: Iterable[model_pb2.TensorSpec]) -> tuple[TensorInfo, ...]:
    return tuple(map(_tensor_info, messages))


def _tensor_info(message: model_pb2.TensorSpec) -> TensorInfo:
    dtype = DTYPES_BY_NUMBER.get(message.dtype)
    shape = None if message.unknown_rank else tuple(None if n < 0 else n for n in message.shape)
    return TensorInfo(name=message.name, dtype=dtype.name if dtype else "unknown", shape=shape)
