"""Options are checked when they are set, in one clear line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelport_server.engines import kinds
from modelport_server.engines.parallel import Parallelism
from modelport_server.options import (
    BatchLimits,
    EngineLimits,
    EngineRules,
    OptionError,
    RolloutOptions,
    RpcOptions,
    ServerOptions,
    engine_rules,
)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (BatchLimits, "max_batch_size", 0),
        (BatchLimits, "efficient_batch_size", -1),
        (BatchLimits, "max_batch_bytes", 0),
        (BatchLimits, "max_enqueued_rows", -1),
        (BatchLimits, "max_enqueued_bytes", 0),
        (EngineLimits, "load_timeout_s", 0.0),
        (EngineLimits, "run_timeout_s", -1.0),
        (EngineLimits, "max_memory_bytes", -1),
        (EngineRules, "threads", -1),
        (EngineRules, "instances", 65),
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
    option = name.removesuffix("_s").removesuffix("_bytes").replace("_", "[-_]")
    with pytest.raises(OptionError, match=option) as caught:
        kind(**more, **{name: value})
    assert "\n" not in str(caught.value)


def test_who_runs_on_something_is_served() -> None:
    rules = engine_rules(["digits=openvino"], [])
    ServerOptions(registry=Path("registry"), models=("digits", "words"), engines=rules)
    with pytest.raises(OptionError, match="digits: there are options for it, but it is not served; add --model"):
        ServerOptions(registry=Path("registry"), models=("words",), engines=rules)


def test_models_are_names() -> None:
    ServerOptions(registry=Path("registry"), models=("digits", "a_b-c"))
    with pytest.raises(OptionError, match="model name"):
        ServerOptions(registry=Path("registry"), models=("../x",))


def test_grpc_and_metrics_want_a_port_each() -> None:
    free = ServerOptions(registry=Path("registry"), address="127.0.0.1:0", metrics_address="127.0.0.1:0")
    assert free.metrics_address == "127.0.0.1:0"
    with pytest.raises(OptionError, match="want a port each"):
        ServerOptions(registry=Path("registry"), address="127.0.0.1:8500", metrics_address="127.0.0.1:8500")


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


def test_what_models_run_on() -> None:
    rules = engine_rules(
        ["openvino", "digits=tensorflow"], ["digits=bfloat16", "words=float16"], ["4", "digits=0"], ["words=2"]
    )
    options = ServerOptions(registry=Path("registry"), engines=rules)
    assert options.engine_rules("digits") == EngineRules(engine="tensorflow", precision="bfloat16")
    assert options.engine_rules("words") == EngineRules(engine="openvino", precision="float16", instances=4, threads=2)
    assert options.engine_rules("others") == EngineRules(engine="openvino", instances=4)
    assert options.engine_rules("digits").parallelism is None
    assert options.engine_rules("words").parallelism == Parallelism(4, 2)
    assert ServerOptions(registry=Path("registry")).engine_rules("any") == EngineRules(engine="auto")


@pytest.mark.parametrize(
    ("engines", "precisions", "text"),
    [
        (["onnx"], [], "auto, openvino, tensorflow"),
        ([], ["int4"], "float32, bfloat16, float16, int8"),
        (["digits=tensorflow"], ["int8"], "TensorFlow does not compute in int8: use --engine openvino"),
        (["../x=openvino"], [], "MODEL=VALUE"),
        (["=openvino"], [], "MODEL=VALUE"),
        (["openvino", "tensorflow"], [], "twice for all models"),
        ([], ["digits=float16", "digits=bfloat16"], "twice for digits"),
    ],
)
def test_what_models_cant_run_on(engines: list[str], precisions: list[str], text: str) -> None:
    with pytest.raises(OptionError, match=text) as caught:
        engine_rules(engines, precisions)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("instances", "threads", "text"),
    [
        (["two"], [], "--instances takes a number from 0 on, not 'two'"),
        (["-1"], [], "--instances takes a number from 0 on, not '-1'"),
        (["65"], [], "instances must be 0 to 64"),
        (["digits="], [], "MODEL=VALUE"),
        ([], ["digits=1.5"], "--threads takes a number from 0 on, not '1.5'"),
        ([], ["1", "2"], "--threads is given twice for all models"),
    ],
)
def test_how_many_batches_cant_run_at_once(instances: list[str], threads: list[str], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        engine_rules([], [], instances, threads)


@pytest.mark.parametrize(
    ("installed", "engine", "text"),
    [
        ([], "auto", "modelport[server]"),
        (["tensorflow"], "openvino", "pip install 'modelport[openvino]'"),
        (["openvino"], "tensorflow", "pip install 'modelport[server]'"),
    ],
)
def test_an_engine_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], engine: str, text: str
) -> None:
    monkeypatch.setattr(kinds, "installed", lambda: tuple(installed))
    with pytest.raises(OptionError, match=re.escape(text)):
        _ = EngineRules(engine=engine).engines


@pytest.mark.parametrize("engine", ["auto", "openvino"])
@pytest.mark.parametrize(
    ("installed", "has_nncf"), [(("openvino", "tensorflow"), False), (("tensorflow",), True), ((), True)]
)
def test_int8_takes_openvino_and_nncf(
    monkeypatch: pytest.MonkeyPatch, engine: str, installed: tuple[str, ...], has_nncf: bool
) -> None:
    monkeypatch.setattr(kinds, "installed", lambda: installed)
    monkeypatch.setattr(kinds, "has_nncf", lambda: has_nncf)
    with pytest.raises(OptionError, match=re.escape("pip install 'modelport[int8]'")):
        _ = EngineRules(engine=engine, precision="int8").engines


def test_int8_where_all_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "installed", lambda: ("openvino", "tensorflow"))
    monkeypatch.setattr(kinds, "has_nncf", lambda: True)
    rules = engine_rules(["openvino", "words=auto"], ["digits=int8", "words=int8"])
    assert (rules["digits"].engines, rules["digits"].precision) == (("openvino",), "int8")
    assert rules["words"].engines == ("openvino", "tensorflow")
    assert rules[""].precision == "float32"


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "installed", lambda: ("tensorflow",))
    assert EngineRules().engines == ("tensorflow",)
