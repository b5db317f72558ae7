"""``python -m modelport._healthcheck ADDRESS [SERVICE]``: asks a server's health service, for containers.

It ends with 0 if the answer is SERVING, else with 1 and one line that says why. It needs no more
than grpcio.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc

from modelport import _health

_TIMEOUT_S = 4.0


def check(address: str, service: str = "", timeout_s: float = _TIMEOUT_S) -> str:
    """Returns what a server says of a service: ``SERVING``, or what it says instead.

    Args:
        address: HOST:PORT or unix:PATH.
        service: a service or a model; empty for the server as a whole.
        timeout_s: how long the answer may take, in seconds.

    Raises:
        grpc.RpcError: if there is no answer.
    """
    with grpc.insecure_channel(address) as channel:
        raw: Any = channel  # grpcio's stubs leave calls without serialisers untyped
        answer: bytes = raw.unary_unary(_health.METHOD)(_health.request(service), timeout=timeout_s)
    return _health.status(answer)


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
    return 0 if status == _health.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
