"""What a call gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport import tensors
from modelport.exceptions import ModelportError
from modelport.v1 import prediction_pb2

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction(Mapping[str, "NDArray[Any]"]):
    """A model's answer: a mapping of output names to arrays, with what is known about the answer.

    Numbers are read-only arrays; strings are object arrays of ``bytes``; bfloat16 comes as
    ``ml_dtypes.bfloat16`` where that package is installed, else widened to float32.
    """

    outputs: Mapping[str, NDArray[Any]]
    """The arrays by output name, in the signature's order."""
    model: str
    """The model that answered."""
    version: int
    """The version that answered."""
    queue_time_s: float
    """How long the call waited for the engine, in seconds; of a call sent in parts, the longest of them."""
    engine_time_s: float
    """How long the engine ran the batches that the call was part of, in seconds; of parts, their sum."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        try:
            return self.outputs[name]
        except KeyError:
            raise KeyError(f"there is no output {name!r}; the outputs are {', '.join(self.outputs)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamResult:
    """The outcome of one batch of a stream."""

    index: int
    """The batch's place in what was given, counted from 0."""
    outcome: Prediction | ModelportError
    """The answer, or with ``on_error="return"`` the error that the batch got."""

    @property
    def error(self) -> ModelportError | None:
        """The error that the batch got; None if it was answered."""
        return None if isinstance(self.outcome, Prediction) else self.outcome

    @property
    def prediction(self) -> Prediction:
        """The answer; raises the error if the batch got one."""
        if isinstance(self.outcome, Prediction):
            return self.outcome
        raise self.outcome


def prediction(response: prediction_pb2.PredictResponse) -> Prediction:
    """Returns an answer from its message.

    Raises:
        ModelportError: if the message breaks the wire format.
    """
    try:
        outputs = {tensor.name: tensors.decode(tensor) for tensor in response.outputs}
    except tensors.TensorError as error:
        raise ModelportError(f"the server's answer is damaged: an output {error}") from error
    return Prediction(
        outputs=outputs,
        model=response.model,
        version=response.version,
        queue_time_s=response.queue_time_us / 1e6,
        engine_time_s=response.engine_time_us / 1e6,
    )


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Returns the answers to the parts of one call as one, row after row."""
    first = parts[0]
    return Prediction(
        outputs={name: np.concatenate([part[name] for part in parts]) for name in first},
        model=first.model,
        version=first.version,
        queue_time_s=max(part.queue_time_s for part in parts),
        engine_time_s=sum(part.engine_time_s for part in parts),
    )
