"""modelport: calls models that a modelport server serves.

    from modelport import Client

    with Client("127.0.0.1:8500") as client:
        answer = client.predict("mnist", images)
        print(answer.version, answer["classes"])

Names are imported when they are first used, so that ``import modelport`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelport._async_client import AsyncClient
    from modelport._client import Client
    from modelport._models import (
        EngineAttempt,
        ModelChange,
        ModelInfo,
        SignatureInfo,
        TensorInfo,
        VersionInfo,
        VersionState,
    )
    from modelport._options import Keepalive, RetryPolicy, Tls
    from modelport._results import Prediction, StreamResult
    from modelport._rollout_types import (
        EndedRollout,
        GateInfo,
        JournalRecord,
        Rejection,
        Rollout,
        RolloutInfo,
        RolloutPolicy,
        RolloutState,
        RolloutStep,
        RolloutVersion,
        Traffic,
    )
    from modelport._rollouts import AsyncRollouts, Rollouts
    from modelport.exceptions import (
        AbortedError,
        AlreadyExistsError,
        CallCancelledError,
        ClientClosedError,
        DataLossError,
        DeadlineExceededError,
        FailedPreconditionError,
        InputError,
        InternalError,
        InvalidArgumentError,
        ModelportError,
        NotFoundError,
        OutOfRangeError,
        PermissionDeniedError,
        ResourceExhaustedError,
        RolloutError,
        RolloutTimeoutError,
        RpcError,
        StreamInterruptedError,
        UnauthenticatedError,
        UnavailableError,
        UnimplementedError,
        UnknownError,
        VersionRejectedError,
        VersionRetiredError,
    )

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncRollouts",
    "CallCancelledError",
    "Client",
    "ClientClosedError",
    "DataLossError",
    "DeadlineExceededError",
    "EndedRollout",
    "EngineAttempt",
    "FailedPreconditionError",
    "GateInfo",
    "InputError",
    "InternalError",
    "InvalidArgumentError",
    "JournalRecord",
    "Keepalive",
    "ModelChange",
    "ModelInfo",
    "ModelportError",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "Prediction",
    "Rejection",
    "ResourceExhaustedError",
    "RetryPolicy",
    "Rollout",
    "RolloutError",
    "RolloutInfo",
    "RolloutPolicy",
    "RolloutState",
    "RolloutStep",
    "RolloutTimeoutError",
    "RolloutVersion",
    "Rollouts",
    "RpcError",
    "SignatureInfo",
    "StreamInterruptedError",
    "StreamResult",
    "TensorInfo",
    "Tls",
    "Traffic",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnknownError",
    "VersionInfo",
    "VersionRejectedError",
    "VersionRetiredError",
    "VersionState",
]

_MODULES = {
    "AsyncClient": "_async_client",
    "AsyncRollouts": "_rollouts",
    "Client": "_client",
    "EndedRollout": "_rollout_types",
    "EngineAttempt": "_models",
    "GateInfo": "_rollout_types",
    "JournalRecord": "_rollout_types",
    "Keepalive": "_options",
    "ModelChange": "_models",
    "ModelInfo": "_models",
    "Prediction": "_results",
    "Rejection": "_rollout_types",
    "RetryPolicy": "_options",
    "Rollout": "_rollout_types",
    "RolloutInfo": "_rollout_types",
    "RolloutPolicy": "_rollout_types",
    "RolloutState": "_rollout_types",
    "RolloutStep": "_rollout_types",
    "RolloutVersion": "_rollout_types",
    "Rollouts": "_rollouts",
    "SignatureInfo": "_models",
    "StreamResult": "_results",
    "TensorInfo": "_models",
    "Tls": "_options",
    "Traffic": "_rollout_types",
    "VersionInfo": "_models",
    "VersionState": "_models",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'modelport' has no attribute {name!r}")
    value: object = getattr(import_module(f"modelport.{_MODULES.get(name, 'exceptions')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
