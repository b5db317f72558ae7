"""``python -m modelport._healthcheck ADDRESS [SERVICE]``: asks a server's health service, for containers.

It ends with 0 if the answer is SERVING, else with 1 and one line that says why. It needs no more
than grpcio: the two messages of ``grpc.health.v1`` have one field each.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc

_METHOD = "/grpc.health.v1.Health/Check"
_TIMEOUT_S = 4.0
_STATUS_FIELD = 0x08
_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def check(address: str, service: str = "", timeout_s: float = _TIMEOUT_S) -> str:
    """Returns what a server says of a service: ``SERVING``, or what it says instead.

    Args:
        address: HOST:PORT or unix:PATH.
        service: a service or a model; empty for the server as a whole. At most 127 bytes.
        timeout_s: how long the answer may take, in seconds.

    Raises:
        grpc.RpcError: if there is no answer.
    """
    name = service.encode()
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    with grpc.insecure_channel(address) as channel:
        raw: Any = channel  # grpcio's stubs leave calls without serialisers untyped
        answer: bytes = raw.unary_unary(_METHOD)(request, timeout=timeout_s)
    number = answer[1] if len(answer) == 2 and answer[0] == _STATUS_FIELD else 0
    return _STATUSES[number] if number < len(_STATUSES) else f"status {number}"


def main() -> int:
    """Checks what the command line names; returns the exit status."""
    if len(sys.argv) not in (2, 3):
        print("usage: python -m modelport._healthcheck ADDRESS [SERVICE]", file=sys.stderr)
        return 2
    address, service = [*sys.argv[1:], ""][:2]
    try:
        status = check(address, service)
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else error
        print(f"no answer from {address}: {code}", file=sys.stderr)
        return 1
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
