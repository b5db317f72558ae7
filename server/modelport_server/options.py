"""What can be set, each value checked when it is set."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelport.exceptions import ModelportError
from modelport.names import DEFAULT_ADDRESS, is_valid_name, shown
from modelport_server.engines import kinds
from modelport_server.engines.ahead import ALL_CORES
from modelport_server.engines.parallel import Parallelism, settled

MIB = 1 << 20
MAX_INSTANCES = 64
"""The most batches of a version that may be told to run at once."""
_DAY_S = 86_400.0


class OptionError(ModelportError):
    """An option has a value that it can't have."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


_OPTIONS = {
    "max_batch_size": "--max-batch-size",
    "max_enqueued_rows": "--max-enqueued-rows",
    "load_timeout_s": "--load-timeout",
    "run_timeout_s": "--run-timeout",
}
"""What the command line calls fields that are checked together with others that it does not have."""


def _known_as(field: str) -> str:
    """Returns the name that users know a field by."""
    return _OPTIONS.get(field, field)


def _is_address(text: str) -> bool:
    return len(text) > len("unix:") if text.startswith("unix:") else _is_host_port(text)


def _is_host_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and int(port) <= 65535


def split_host_port(address: str) -> tuple[str, int]:
    """Returns the host, without an IPv6 address's brackets, and the port of ``host:port``."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host, _ = split_host_port(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of a servable's queue and of the batches that are made from it."""

    max_batch_size: int = 128
    """The most rows that run together; larger calls are split. Default 128."""
    adaptive: bool = False
    """Whether fewer rows run together where warming up shows that more are not faster. Default off."""
    efficient_batch_size: int = 0
    """With how many rows a batch takes no more than half as long again per row as with any number; 0, the default, if
    that is not known."""
    max_batch_bytes: int = 16 * MIB
    """The most input bytes that run together, if a row is not larger by itself. Default 16 MiB."""
    max_enqueued_rows: int = 8192
    """The most rows that wait for a servable. One call of any size may wait alone. Default 8192."""
    max_enqueued_bytes: int = 256 * MIB
    """The most input bytes that wait for a servable, counted in the same way. Default 256 MiB."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_batch_bytes", "max_enqueued_rows", "max_enqueued_bytes"):
            _require(getattr(self, name) >= 1, f"{_known_as(name)} must be at least 1, not {getattr(self, name)}")
        size = self.efficient_batch_size
        _require(size >= 0, f"efficient_batch_size must be at least 0, not {size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of an engine process."""

    integrity_timeout_s: float = 300.0
    """The longest that reading and checking all files of a version may take, in seconds. Default 300."""
    safety_timeout_s: float = 60.0
    """The longest that looking through a version's operations may take, in seconds. Default 60."""
    signature_timeout_s: float = 10.0
    """The longest that comparing signatures may take, in seconds. Default 10."""
    load_timeout_s: float = 300.0
    """The longest that loading may take, in seconds. Default 300."""
    golden_timeout_s: float = 300.0
    """The longest that running the golden examples may take, in seconds. Default 300."""
    warm_up_timeout_s: float = 120.0
    """The longest that warming up may take, in seconds. Default 120."""
    speed_timeout_s: float = 60.0
    """The longest that measuring beside the stable version may take, in seconds. Default 60."""
    run_timeout_s: float = 60.0
    """The longest that one batch may run before the engine counts as hung, in seconds. Default 60."""
    max_memory_bytes: int = 0
    """The most resident memory of an engine process, and of what it starts while it loads; 0, the default, means 80%
    of the machine's."""
    max_threads: int = 1024
    """The most threads of an engine process, and of what it starts while it loads. Default 1024."""
    max_concurrent_loads: int = 2
    """How many versions load at the same time, over all models. Default 2."""
    zygote: bool = True
    """Fork engine processes from one that has imported TensorFlow already. Default on."""

    def __post_init__(self) -> None:
        for name in (
            "integrity_timeout_s",
            "safety_timeout_s",
            "signature_timeout_s",
            "load_timeout_s",
            "golden_timeout_s",
            "warm_up_timeout_s",
            "speed_timeout_s",
            "run_timeout_s",
        ):
            seconds = getattr(self, name)
            _require(0 < seconds <= _DAY_S, f"{_known_as(name)} must be above 0 and at most a day, not {seconds:g} s")
        _require(self.max_threads >= 1, "max_threads must be at least 1")
        _require(self.max_memory_bytes >= 0, "max_memory_bytes must not be negative")
        _require(self.max_concurrent_loads >= 1, "max_concurrent_loads must be at least 1")

    @property
    def memory_limit_bytes(self) -> int:
        """The effective limit of resident memory, in bytes."""
        return self.max_memory_bytes or int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRules:
    """What a model's versions run on."""

    engine: str = kinds.AUTO
    """``tensorflow``, ``openvino``, or ``auto``, the default: the fastest that is installed and reproduces the
    golden examples."""
    precision: str = kinds.FLOAT32
    """What is computed in: ``float32``, the default, ``bfloat16``, ``float16`` or ``int8``. The golden examples have
    to be reproduced all the same, or it is float32."""
    instances: int = 0
    """How many batches of a version run at once; 0, the default, means what suits the machine and the model."""
    threads: int = 0
    """Threads that one batch may use; 0, the default, means what suits the machine and the model."""

    def __post_init__(self) -> None:
        _require(0 <= self.instances <= MAX_INSTANCES, f"--instances must be 0 to {MAX_INSTANCES}")
        _require(self.threads >= 0, "--threads must not be negative")
        known = (kinds.AUTO, *kinds.ENGINES)
        _require(self.engine in known, f"the engine must be one of {', '.join(known)}, not {shown(self.engine)}")
        precisions = ", ".join(kinds.PRECISIONS)
        _require(
            self.precision in kinds.PRECISIONS,
            f"the precision must be one of {precisions}, not {shown(self.precision)}",
        )
        _require(
            self.engine == kinds.AUTO or self.precision in kinds.PRECISIONS_OF[self.engine],
            f"TensorFlow does not compute in {self.precision}: use --engine openvino, or another --precision",
        )

    @property
    def parallelism(self) -> Parallelism | None:
        """How many batches run at once on how many threads; None if that is left open."""
        if not self.instances and not self.threads:
            return None
        return settled(self.instances, self.threads, len(ALL_CORES))

    @property
    def engines(self) -> tuple[str, ...]:
        """The installed engines that may be taken.

        Raises:
            OptionError: if there is none, or what computes in the precision is not installed.
        """
        installed = kinds.installed()
        if self.precision == kinds.INT8:
            _require(
                kinds.OPENVINO in installed and kinds.has_nncf(),
                "int8 takes OpenVINO and nncf, which are not both installed: pip install 'modelport[int8]'",
            )
        if self.engine == kinds.AUTO:
            _require(
                bool(installed), "no engine is installed: pip install 'modelport[server]' or 'modelport[openvino]'"
            )
            _require(
                any(self.precision in kinds.PRECISIONS_OF[engine] for engine in installed),
                f"{self.precision} takes OpenVINO, which is not installed: pip install 'modelport[openvino]'",
            )
            return installed
        extra = {kinds.TENSORFLOW: "server"}.get(self.engine, self.engine)
        _require(
            self.engine in installed,
            f"the engine {self.engine} is not installed: pip install 'modelport[{extra}]'",
        )
        return (self.engine,)


def engine_rules(
    engines: Sequence[str], precisions: Sequence[str], instances: Sequence[str] = (), threads: Sequence[str] = ()
) -> dict[str, EngineRules]:
    """Returns what each model runs on, by name; under the empty name what all others do.

    Args:
        engines: each ``ENGINE`` or ``MODEL=ENGINE``.
        precisions: each ``PRECISION`` or ``MODEL=PRECISION``.
        instances: each ``COUNT`` or ``MODEL=COUNT``.
        threads: each ``COUNT`` or ``MODEL=COUNT``.

    Raises:
        OptionError: if one is not of that form, or there are two for one model.
    """
    chosen: dict[str, Mapping[str, Any]] = {
        "engine": _by_model("--engine", engines),
        "precision": _by_model("--precision", precisions),
        "instances": _counts("--instances", instances),
        "threads": _counts("--threads", threads),
    }
    models = {"", *(model for values in chosen.values() for model in values)}
    return {model: EngineRules(**_rules_of(model, chosen)) for model in models}


def _rules_of(model: str, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    given = {rule: values.get(model, values.get("")) for rule, values in chosen.items()}
    return {rule: value for rule, value in given.items() if value is not None}


def _counts(option: str, texts: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for model, value in _by_model(option, texts).items():
        _require(value.isascii() and value.isdigit(), f"{option} takes a number from 0 on, not {shown(value)}")
        counts[model] = int(value)
    return counts


def _by_model(option: str, texts: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for text in texts:
        model, equals, value = text.rpartition("=")
        _require(not equals or is_valid_name(model), f"{option} takes a value or MODEL=VALUE, not {shown(text)}")
        _require(bool(value), f"{option} takes a value or MODEL=VALUE, not {shown(text)}")
        _require(model not in values, f"{option} is given twice for {model or 'all models'}")
        values[model] = value
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """How versions come and go."""

    poll_interval_s: float = 0.25
    """How often the registry is looked at, in seconds. At most 2, as those who publish wait
    3 s for a server to see it. Default 0.25."""
    pinned_stream_limit_s: float = 600.0
    """How long streams may stay on a version that has been replaced, in seconds. Default 600."""
    max_beside_stable: int = 2
    """How many versions of a model may be loaded beside the one in charge and the aliased ones, loading
    and draining ones counted. When more are wanted, the streams of the oldest are ended. Default 2."""

    def __post_init__(self) -> None:
        _require(0 < self.poll_interval_s <= 2, "--poll-interval must be above 0 and at most 2 s")
        _require(self.pinned_stream_limit_s >= 0, "--pinned-stream-limit must not be negative")
        _require(self.max_beside_stable >= 1, "max_beside_stable must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcOptions:
    """The gRPC server's own bounds.

    At most ``max_concurrent_calls`` messages of ``max_message_bytes`` can be held at once, which is
    the worst case of the front's memory.
    """

    max_message_bytes: int = 64 * MIB
    """The largest message, in bytes, either way. Default 64 MiB."""
    max_concurrent_calls: int = 4096
    """The most calls and streams at once; more get RESOURCE_EXHAUSTED. Default 4096."""
    max_streams_per_connection: int = 1024
    """The most calls and streams at once on one connection; more wait. Default 1024."""
    stream_window_messages: int = 32
    """The most messages of one stream that are worked on at once. Default 32."""
    stream_window_bytes: int = 4 * MIB
    """The most bytes of one stream's messages that are worked on at once, if one message is not
    larger by itself. Default 4 MiB."""
    stream_stall_s: float = 60.0
    """How long an answer of a stream may wait for its caller to read before the stream is ended, in
    seconds. Default 60."""
    reuse_port: bool = False
    """Let several servers share the port. Default off."""

    def __post_init__(self) -> None:
        _require(self.stream_stall_s > 0, "stream_stall_s must be above 0")
        _require(1024 <= self.max_message_bytes < 2**31, "--max-message-mib must be 1 to 2047")
        for name in (
            "max_concurrent_calls",
            "max_streams_per_connection",
            "stream_window_messages",
            "stream_window_bytes",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Everything that ``modelport serve`` can be told."""

    registry: Path
    """The registry's folder."""
    models: tuple[str, ...] = ()
    """The models to serve; none, the default, means all that the registry has."""
    address: str = DEFAULT_ADDRESS
    """Where to listen: ``host:port``, port 0 for any free one, or ``unix:PATH``."""
    metrics_address: str = ""
    """Where to answer scrapes of metrics over HTTP: ``host:port``, port 0 for any free one; empty, the default, for
    nowhere."""
    allow_control: bool = False
    """Let callers beyond this machine change rollouts too: whoever reaches the port may. Default off."""
    grace_s: float = 10.0
    """How long accepted calls may take after SIGTERM, in seconds. Default 10."""
    lame_duck_s: float = 0.3
    """How long new calls are still taken after health has turned NOT_SERVING, in seconds. Default 0.3."""
    batch: BatchLimits = field(default_factory=BatchLimits)
    """Bounds of queues and batches."""
    engine: EngineLimits = field(default_factory=EngineLimits)
    """Bounds of engine processes."""
    engines: Mapping[str, EngineRules] = field(default_factory=lambda: {"": EngineRules()})
    """What each model runs on, by name; under the empty name what all others do."""
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    """How versions come and go."""
    rpc: RpcOptions = field(default_factory=RpcOptions)
    """The gRPC server's bounds."""
    actor: str = field(default_factory=lambda: f"server {os.getpid()}@{os.uname().nodename}")
    """Who the journal says decided. Default: the process id and the host's name."""

    def __post_init__(self) -> None:
        for model in self.models:
            _require(is_valid_name(model), f"{shown(model)} is not a model name: use [a-z0-9][a-z0-9_-]{{0,63}}")
        _require(
            _is_address(self.address),
            f"--address must be HOST:PORT with a port up to 65535, or unix:PATH, not {shown(self.address)}",
        )
        _require(
            not self.metrics_address or _is_host_port(self.metrics_address),
            f"--metrics-address must be HOST:PORT with a port up to 65535, not {shown(self.metrics_address)}",
        )
        _require(
            self.metrics_address != self.address or self.address.endswith(":0"),
            "--metrics-address and --address are the same: gRPC and metrics want a port each",
        )
        _require(0 <= self.grace_s <= _DAY_S, "--grace must be 0 s to a day")
        _require("" in self.engines, "engines must have an entry for all other models, under the empty name")
        _require(0 <= self.lame_duck_s <= 60, "--lame-duck must be 0 to 60 s")
        unserved = sorted(self.engines.keys() - {"", *self.models}) if self.models else []
        _require(not unserved, f"{', '.join(unserved)}: there are options for it, but it is not served; add --model")

    def engine_rules(self, model: str) -> EngineRules:
        """Returns what a model's versions run on."""
        return self.engines.get(model, self.engines[""])

    def uses(self, engine: str) -> bool:
        """Returns whether any model may run on an engine.

        Raises:
            OptionError: if an engine that was asked for is not installed.
        """
        return engine in {one for rules in self.engines.values() for one in rules.engines}

    @property
    def forks(self) -> bool:
        """Whether engine processes are forked from one that has imported TensorFlow.

        Raises:
            OptionError: as ``uses``.
        """
        return self.uses(kinds.TENSORFLOW) and self.engine.zygote

    @property
    def changes_allowed(self) -> bool:
        """Whether callers may change rollouts: where only this machine can call, or where it is asked for."""
        return self.allow_control or _is_local(self.address)
