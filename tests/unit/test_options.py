"""Options are checked when they are set, in one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelport_server.options import (
    BatchLimits,
    EngineLimits,
    OptionError,
    RolloutOptions,
    RpcOptions,
    ServerOptions,
)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (BatchLimits, "max_batch_size", 0),
        (BatchLimits, "max_batch_bytes", 0),
        (BatchLimits, "max_enqueued_rows", -1),
        (BatchLimits, "max_enqueued_bytes", 0),
        (EngineLimits, "load_timeout_s", 0.0),
        (EngineLimits, "run_timeout_s", -1.0),
        (EngineLimits, "max_memory_bytes", -1),
        (EngineLimits, "threads", -1),
        (EngineLimits, "max_threads", 0),
        (EngineLimits, "integrity_timeout_s", 0.0),
        (EngineLimits, "golden_timeout_s", -1.0),
        (EngineLimits, "warm_up_timeout_s", float("nan")),
        (EngineLimits, "max_concurrent_loads", 0),
        (RolloutOptions, "poll_interval_s", 0.0),
        (RolloutOptions, "poll_interval_s", 2.1),
        (RolloutOptions, "pinned_stream_limit_s", -1.0),
        (RolloutOptions, "max_beside_stable", 0),
        (RpcOptions, "max_message_bytes", 0),
        (RpcOptions, "max_message_bytes", 2**31),
        (RpcOptions, "max_concurrent_calls", 0),
        (RpcOptions, "stream_window_messages", 0),
        (RpcOptions, "stream_window_bytes", 0),
        (EngineLimits, "run_timeout_s", float("inf")),
        (ServerOptions, "grace_s", -1.0),
        (ServerOptions, "lame_duck_s", 61.0),
        (EngineLimits, "load_timeout_s", float("nan")),
        (EngineLimits, "run_timeout_s", float("nan")),
        (RolloutOptions, "poll_interval_s", float("nan")),
        (RolloutOptions, "pinned_stream_limit_s", float("nan")),
        (ServerOptions, "grace_s", float("nan")),
        (ServerOptions, "grace_s", float("inf")),
        (ServerOptions, "lame_duck_s", float("nan")),
    ],
)
def test_a_value_that_cant_be(kind: Callable[..., Any], name: str, value: object) -> None:
    more = {"registry": Path("registry")} if kind is ServerOptions else {}
    with pytest.raises(OptionError, match=name) as caught:
        kind(**more, **{name: value})
    assert "\n" not in str(caught.value)


def test_models_are_names() -> None:
    ServerOptions(registry=Path("registry"), models=("digits", "a_b-c"))
    with pytest.raises(OptionError, match="model name"):
        ServerOptions(registry=Path("registry"), models=("../x",))


@pytest.mark.parametrize("address", ["localhost:0", "[::1]:8500", "0.0.0.0:65535", "unix:/run/x.sock", "unix:x"])
def test_addresses(address: str) -> None:
    assert ServerOptions(registry=Path("registry"), address=address).address == address


@pytest.mark.parametrize(
    "address",
    ["", ":", ":8500", "localhost", "localhost:", "localhost:http", "localhost:65536", "a:-1", "a:²", "unix:"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(OptionError, match="--address"):
        ServerOptions(registry=Path("registry"), address=address)


def test_memory_is_limited_to_a_part_of_the_machines() -> None:
    assert EngineLimits(max_memory_bytes=5).memory_limit_bytes == 5
    assert EngineLimits().memory_limit_bytes > 1 << 20
