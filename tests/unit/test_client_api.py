"""What ``import modelport`` gives, and what it loads."""

from __future__ import annotations

import json
import subprocess
import sys

import grpc
import pytest

import modelport
from modelport import _status, exceptions

NAMES = [
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


def test_exports_exactly_these_names() -> None:
    assert sorted(modelport.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(modelport, name).__name__ == name
    assert set(NAMES) <= set(dir(modelport))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = modelport.Nonsense  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]


def test_loads_grpc_protobuf_and_numpy_alone() -> None:
    code = "\n".join(
        [
            "import json, sys",
            "before = set(sys.modules)",
            "import modelport",
            "[getattr(modelport, name) for name in modelport.__all__]",
            "tops = {name.partition('.')[0] for name in set(sys.modules) - before}",
            "print(json.dumps(sorted(t for t in tops if t not in sys.stdlib_module_names)))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert {"modelport", "grpc", "numpy"} <= loaded
    private = {name for name in loaded if name.startswith(("_", "cython", "grpc_"))}  # grpc takes in its extensions
    assert loaded - private <= {"modelport", "grpc", "numpy", "google", "typing_extensions"}


def test_the_name_alone_loads_nothing() -> None:
    code = "import sys, modelport; print({'grpc', 'numpy', 'google'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_has_its_exception(code: grpc.StatusCode) -> None:
    error = _status.rpc_error(code, "it is so", server="here:1")
    assert isinstance(error, exceptions.RpcError)
    assert error.details == "it is so"
    assert "\n" not in str(error)
    if code is grpc.StatusCode.OK:
        assert type(error) is exceptions.UnknownError
    else:
        assert error.code is code
        assert _status.code_of_number(code.value[0]) is code
        expected = "CallCancelled" if code.name == "CANCELLED" else code.name.title().replace("_", "")
        assert type(error).__name__ == f"{expected}Error"


def test_each_status_has_a_class_of_its_own() -> None:
    classes = list(_status.ERROR_CLASSES.values())
    assert len(set(classes)) == len(classes) == len(grpc.StatusCode) - 1
    assert _status.code_of_number(99) is _status.code_of_number(0) is grpc.StatusCode.UNKNOWN


def test_the_tree_in_the_docstring_is_the_hierarchy() -> None:
    text = exceptions.__doc__ or ""
    for name, cls in vars(exceptions).items():
        if isinstance(cls, type) and issubclass(cls, Exception):
            assert name in text, name
            assert issubclass(cls, exceptions.ModelportError)


@pytest.mark.parametrize(
    ("code", "details", "text"),
    [
        (
            "UNAVAILABLE",
            "last error: connect: Connection refused (111)",
            "no server answers at here:1 (connection refused)",
        ),
        ("UNAVAILABLE", "ping timeout", "gave no sign of life"),
        ("UNAVAILABLE", "connection attempt timed out before SETTINGS", "no server answers at here:1: conn"),
        ("UNAVAILABLE", "DNS resolution failed for x", "no address is known for here:1"),
        ("UNAVAILABLE", "the server is stopping", "the server is stopping"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "here:1 did not answer in time"),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (9 vs. 8)", "send fewer rows at a time"),
        ("INTERNAL", "two\nlines", "two lines"),
        ("ABORTED", "", "here:1 answered ABORTED"),
    ],
)
def test_texts_say_what_was_wrong(code: str, details: str, text: str) -> None:
    assert text in str(_status.rpc_error(grpc.StatusCode[code], details, server="here:1"))


def test_pushback_is_read_from_metadata() -> None:
    assert _status.pushback_s([("a", "b"), ("grpc-retry-pushback-ms", "250")]) == 0.25
    assert _status.pushback_s([("grpc-retry-pushback-ms", "-1")]) is None
    assert _status.pushback_s([("grpc-retry-pushback-ms", "soon")]) is None
    assert _status.pushback_s(None) is None
