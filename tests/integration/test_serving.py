"""What a server promises beside right answers: bounds, hints, deadlines, and telling what it has."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from modelport.v1 import model_pb2, model_pb2_grpc
from modelport_registry import Published, Registry
from tests.support.rpc import Stream, call, engines, open_channel, request, start, start_raw
from tests.support.server import ServerProcess, run_server, wait_for
from tests.support.zoo import Zoo

OK = grpc.StatusCode.OK
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
MIB = 1 << 20
X = np.ones((1, 4), np.float32)
EIGHT = np.repeat(X, 8, axis=0)


@pytest.fixture(scope="module")
def server(
    saved_models: Path, tmp_path_factory: pytest.TempPathFactory, publish_tag: Callable[[Path, str, int], Published]
) -> Generator[ServerProcess]:
    scratch = tmp_path_factory.mktemp("serving")
    publish_tag(scratch / "registry", "toy", 1)
    with run_server(scratch / "registry", scratch, "--instances", "1", "--max-enqueued-rows", "64") as server:
        server.wait_serving("toy", 1)
        yield server
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]
    assert "never retrieved" not in log, log[-4000:]


@pytest.fixture
def channel(server: ServerProcess) -> Generator[grpc.Channel]:
    with open_channel(server.address) as channel:
        yield channel


@contextmanager
def _busy(server: ServerProcess) -> Generator[None]:
    """Lets the engine stand still, as a very slow model would."""
    engine = engines(psutil.Process(server.process.pid))[0]
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


def _queued(channel: grpc.Channel) -> None:
    """Returns once all calls that were sent before on the same connection are in the queue."""
    assert call(channel, request("toy", {})).code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(server: ServerProcess, channel: grpc.Channel) -> None:
    with _busy(server):
        running = start(channel, request("toy", {"x": X}))
        _queued(channel)  # in the engine, by itself
        waiting = [start(channel, request("toy", {"x": EIGHT})) for _ in range(8)]
        _queued(channel)
        # Calls may overtake each other on the way, so that the engine has the one row or the first eight:
        # there is no room for eight more in either case.
        refused = start_raw(channel, request("toy", {"x": EIGHT}))
        assert refused.code() is RESOURCE_EXHAUSTED
        hint = dict(refused.trailing_metadata())
        assert int(hint["grpc-retry-pushback-ms"]) > 0
        assert re.search(r"(64|57) rows wait", refused.details())
    assert [wait().code for wait in [running, *waiting]] == [OK] * 9


def test_a_stream_is_held_back_where_a_call_is_refused(server: ServerProcess, channel: grpc.Channel) -> None:
    with Stream(channel) as stream:
        stream.ask(request("toy", {"x": X}))
        with _busy(server):
            for number in range(1, 41):
                stream.send(request("toy", {"x": EIGHT}, sequence=number))
            _queued(channel)
        assert [stream.next().response.sequence for _ in range(40)] == list(range(1, 41))


def test_a_deadline_that_passes_in_the_queue(server: ServerProcess, channel: grpc.Channel) -> None:
    with _busy(server):
        running = start(channel, request("toy", {"x": X}))
        outcome = call(channel, request("toy", {"x": X}), timeout_s=0.3)
        assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert running().code is OK
    assert call(channel, request("toy", {"x": X})).code is OK


def test_callers_that_go_away_make_room(server: ServerProcess, channel: grpc.Channel) -> None:
    with _busy(server):
        running = start(channel, request("toy", {"x": X}))
        _queued(channel)  # in the engine, by itself
        gone = [start_raw(channel, request("toy", {"x": EIGHT})) for _ in range(8)]
        _queued(channel)
        assert call(channel, request("toy", {"x": EIGHT})).code is RESOURCE_EXHAUSTED
        for waiting in gone:
            waiting.cancel()
        last: list[Any] = []

        def taken() -> bool:
            """Whether there is room again: a call that is taken can only run into its deadline."""
            last[:] = [call(channel, request("toy", {"x": X}), timeout_s=0.2)]
            return last[0].code is grpc.StatusCode.DEADLINE_EXCEEDED

        wait_for(taken, "the queue to have room", server.alive, 10)
    assert running().code is OK


def test_a_burst_of_calls_is_answered_whatever_the_front_is_at(server: ServerProcess) -> None:
    """However many come before the front takes the first."""
    front = psutil.Process(server.process.pid)
    with ExitStack() as stack:
        channels = [stack.enter_context(open_channel(server.address)) for _ in range(3)]
        for channel in channels:
            _queued(channel)
        front.suspend()
        try:
            waits = [start(channels[number % 3], request("toy", {})) for number in range(2400)]
            time.sleep(1)
        finally:
            front.resume()
        assert {wait().code for wait in waits} == {grpc.StatusCode.INVALID_ARGUMENT}


def test_one_connection_may_have_more_calls_than_run_at_once(server: ServerProcess) -> None:
    """None may be refused that its peer rightly begins as another ends; most clients would hide it by a second try."""
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        waits = [start(channel, request("toy", {})) for _ in range(4000)]
        assert {wait().code for wait in waits} == {grpc.StatusCode.INVALID_ARGUMENT}


def test_calls_that_are_cancelled_at_once_over_and_over_take_little_memory(server: ServerProcess) -> None:
    front = psutil.Process(server.process.pid)
    with open_channel(server.address) as channel:
        _queued(channel)
        before = front.memory_info().rss
        for _ in range(20_000):
            start_raw(channel, request("toy", {})).cancel()
        _queued(channel)
        assert front.memory_info().rss - before < 200 * MIB


def test_an_answer_larger_than_a_message_is_refused_and_a_stream_goes_on(zoo: Zoo) -> None:
    text = np.array([b"x" * (25 * MIB)], dtype=object)
    with open_channel(zoo.server.address) as channel:
        outcome = call(channel, request("strings", {"text": text}))
        assert outcome.code is RESOURCE_EXHAUSTED
        assert "larger" in outcome.message
        with Stream(channel) as stream:
            assert stream.ask(request("strings", {"text": text[:0]}, sequence=1)).response.sequence == 1
            error = stream.ask(request("strings", {"text": text}, sequence=2)).error
            assert (error.sequence, error.code) == (2, RESOURCE_EXHAUSTED.value[0])
            small = np.array([b"a"], dtype=object)
            assert stream.ask(request("strings", {"text": small}, sequence=3)).response.sequence == 3


def test_a_message_over_the_limit_is_refused(channel: grpc.Channel) -> None:
    x = np.ones((5 * MIB, 4), np.float32)
    outcome = call(channel, request("toy", {"x": x}))
    assert outcome.code is RESOURCE_EXHAUSTED
    assert call(channel, request("toy", {"x": X})).code is OK


def test_models_are_told_and_watched(tmp_path: Path, publish_tag: Callable[[Path, str, int], Published]) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    Registry(root).set_alias("toy", "stable", 1)
    with run_server(root, tmp_path, "--threads", "1") as server, open_channel(server.address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        watch: Any = stub.WatchModels(model_pb2.WatchModelsRequest(model="toy"), timeout=250)
        states: list[int] = []
        model = next(watch).model
        while model.serving_version != 1:
            states += [version.state for version in model.versions]
            model = next(watch).model
        kinds = model_pb2.ModelVersion
        assert states == sorted(states)
        assert kinds.STATE_LOADING in states
        assert dict(model.aliases) == {"stable": 1}
        version = model.versions[0]
        signature = version.signatures[0]
        assert version.state == kinds.STATE_AVAILABLE
        assert (version.version, version.golden_examples, signature.name) == (1, 2, "serving_default")
        assert signature.batched
        assert [(spec.name, list(spec.shape)) for spec in signature.inputs] == [("x", [-1, 4])]
        Registry(root).set_alias("toy", "canary", 1)
        assert dict(next(watch).model.aliases) == {"stable": 1, "canary": 1}
        models = stub.ListModels(model_pb2.ListModelsRequest(), timeout=20).models
        assert [model.name for model in models] == ["toy"]
        for name, code in (("nothing", grpc.StatusCode.NOT_FOUND), ("../x", grpc.StatusCode.INVALID_ARGUMENT)):
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetModel(model_pb2.GetModelRequest(model=name), timeout=20)
            error: Any = caught.value
            assert error.code() is code
        assert server.stop() == 0  # the watch does not hold it up
        assert watch.code() is OK


def test_unknown_methods_and_services(channel: grpc.Channel) -> None:
    unary: Any = getattr(channel, "unary_unary")  # noqa: B009 - the type stubs ask for a serialiser
    for path in ("/modelport.v1.PredictionService/Nope", "/nope.Service/Predict", "/modelport.v1.predictionservice/x"):
        with pytest.raises(grpc.RpcError) as caught:
            unary(path)(b"", timeout=20)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_reflection_tells_every_service(channel: grpc.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    wanted: Any = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(iter(stub.ServerReflectionInfo(iter([wanted]), timeout=20)))
    names = {service.name for service in answer.list_services_response.service}
    assert {"modelport.v1.PredictionService", "modelport.v1.ModelService", "grpc.health.v1.Health"} <= names


def test_compressed_messages_are_refused_unread(channel: grpc.Channel) -> None:
    unary: Any = getattr(channel, "unary_unary")  # noqa: B009 - the type stubs ask for a serialiser
    message = request("toy", {"x": X}).SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        unary("/modelport.v1.PredictionService/Predict")(message, timeout=20, compression=grpc.Compression.Gzip)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
