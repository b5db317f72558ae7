"""The two messages of ``grpc.health.v1``, which have one field each, written and read by hand.

Imports nothing: the health check of a container needs no more than grpcio.
"""

from __future__ import annotations

METHOD = "/grpc.health.v1.Health/Check"
SERVING = "SERVING"
_SERVICE_TAG = b"\x0a"
_STATUS_TAG = 0x08
_STATUSES = ("UNKNOWN", SERVING, "NOT_SERVING", "SERVICE_UNKNOWN")


def request(service: str) -> bytes:
    """Returns the HealthCheckRequest for a service or a model; empty for the server as a whole."""
    name = service.encode(errors="replace")
    return _SERVICE_TAG + _varint(len(name)) + name if name else b""


def status(response: bytes) -> str:
    """Returns what a HealthCheckResponse says, by name; a number where that is unknown."""
    number = response[1] if len(response) == 2 and response[0] == _STATUS_TAG else 0
    return _STATUSES[number] if number < len(_STATUSES) else f"status {number}"


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
