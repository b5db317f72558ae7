"""Small value objects that say how a client behaves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from modelport.exceptions import InputError

MIB = 1 << 20
MAX_ATTEMPTS = 5
"""gRPC does not try more often than this, whatever it is told."""


def require(condition: bool, message: str) -> None:
    """Raises InputError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def _is_whole(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Integral)


def check_duration(name: str, value: Any, *, or_zero: bool = False) -> None:
    """Checks that ``value`` is a number of seconds above 0, or ``or_zero``.

    Raises:
        InputError: if it is not.
    """
    seconds = float(value) if type(value) is not bool and isinstance(value, Real) else math.nan
    if not (seconds > 0 or (or_zero and seconds == 0)):
        raise InputError(f"{name} must be a number of seconds, {'0 or more' if or_zero else 'above 0'}, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When and how often a call is tried again.

    Tried again is only what another try can help and can't harm: a call that found no server or a
    stopping one (UNAVAILABLE, CANCELLED), and one that a full server asked to repeat later
    (RESOURCE_EXHAUSTED with a pushback). The waits double up to a limit and are drawn at random.
    """

    max_attempts: int = 5
    """How often a call is sent at most, 1 to 5; 1 turns retries off. Default 5."""
    initial_backoff_s: float = 0.2
    """The bound of the wait before the second attempt, in seconds. Default 0.2."""
    max_backoff_s: float = 2.0
    """The bound of all later waits, in seconds. Default 2."""
    budget: int = 100
    """Failed attempts take one token, answers give some back; below half of this many tokens nothing
    is tried again, so that retries can't double the load of a server that is down. 2 to 1000, default 100."""
    budget_ratio: float = 0.1
    """The tokens that an answer gives back, 0.001 to 1. Default 0.1."""

    def __post_init__(self) -> None:
        require(1 <= self.max_attempts <= MAX_ATTEMPTS, f"max_attempts must be 1 to {MAX_ATTEMPTS}")
        require(
            0 < self.initial_backoff_s <= self.max_backoff_s,
            "initial_backoff_s must be above 0, not above max_backoff_s",
        )
        require(2 <= self.budget <= 1000, "budget must be 2 to 1000")
        require(0.001 <= self.budget_ratio <= 1, "budget_ratio must be 0.001 to 1")

    def backoff_limit_s(self, attempt: int) -> float:
        """Returns the longest wait, in seconds, after attempt number ``attempt``, counted from 1."""
        return min(self.max_backoff_s, self.initial_backoff_s * 2.0 ** min(attempt - 1, 30))


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepalive:
    """How a connection that has gone dead without a word is noticed."""

    time_s: float = 4.0
    """How long nothing may come before the server is asked for a sign of life, in seconds. Default 4."""
    timeout_s: float = 3.0
    """How long that sign may take before the connection is given up, in seconds. Default 3."""

    def __post_init__(self) -> None:
        require(self.time_s >= 1, "keepalive time_s must be at least 1; servers close connections that ask more often")
        require(self.timeout_s > 0, "keepalive timeout_s must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Encrypts connections and checks whom they reach; all certificates and keys are PEM."""

    root_certificates: bytes | None = None
    """The authorities to trust; None, the default, for those that gRPC brings."""
    private_key: bytes | None = field(default=None, repr=False)
    """The client's own key, where the server asks for one."""
    certificate_chain: bytes | None = None
    """The client's own certificate; goes together with the key."""
    server_name: str = ""
    """The name that the server's certificate must have; empty, the default, for the first address's host."""

    def __post_init__(self) -> None:
        together = (self.private_key is None) == (self.certificate_chain is None)
        require(together, "private_key and certificate_chain go together: give both or neither")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Everything that can be set about a client."""

    timeout_s: float = 30.0
    """How long a call may take, with all its attempts, in seconds. Default 30."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """When a call is tried again."""
    keepalive: Keepalive = field(default_factory=Keepalive)
    """How dead connections are noticed."""
    tls: Tls | None = None
    """Encryption; None, the default, for none."""
    max_message_bytes: int = 64 * MIB
    """The largest message in either direction; the server has a limit too. Default 64 MiB."""

    def __post_init__(self) -> None:
        check_duration("timeout_s", self.timeout_s)
        require(4096 <= self.max_message_bytes < 2**31, "max_message_bytes must be 4096 to 2147483647")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Which version of which model is asked, and for what."""

    model: str
    """The model's name in the registry."""
    version: int | None = None
    """The version that answers; None leaves the choice to alias or server."""
    alias: str | None = None
    """The alias that names the version; None leaves the choice to the server."""
    signature: str = ""
    """The signature to run; empty means ``serving_default``."""
    outputs: tuple[str, ...] = ()
    """The outputs wanted; none means all."""
    routing_key: str = ""
    """Reserved: sent, and used once rollouts share out traffic; calls with equal keys will then be routed alike."""

    def __post_init__(self) -> None:
        texts: dict[str, object] = {
            "model": self.model, "alias": self.alias or "", "signature": self.signature, "routing_key": self.routing_key
        }  # fmt: skip
        for name, text in texts.items():
            if not isinstance(text, str):
                raise InputError(f"{name} must be a text, not {text!r}")
        require(bool(self.model), "model must be a name, not empty")
        if self.version is not None and not (_is_whole(self.version) and self.version > 0):
            raise InputError(f"version must be a positive number, not {self.version!r}")
        require(self.version is None or self.alias is None, "give a version or an alias, not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How a stream of batches is run."""

    follow: bool = False
    """Each batch is answered by the version in charge when it arrives. Default: all by one version."""
    window: int = 8
    """How many batches are on their way at most, 1 to 1024. Default 8."""
    return_errors: bool = False
    """A batch that fails gets its error as its result, and the stream goes on. Default: it raises."""
    resume_timeout_s: float = 30.0
    """How long a broken stream may take until the next answer, in seconds. Default 30."""
    answer_timeout_s: float = 120.0
    """How long no answer may come to what was sent until the stream counts as broken, in seconds. Default 120."""
    one_version: bool = False
    """No other version may go on where the first one ends. Default: a later one may, unless asked by number."""

    def __post_init__(self) -> None:
        if not (_is_whole(self.window) and 1 <= self.window <= 1024):
            raise InputError(f"window must be 1 to 1024, not {self.window!r}")
        check_duration("resume_timeout_s", self.resume_timeout_s, or_zero=True)
        check_duration("timeout_s", self.answer_timeout_s)
