"""PredictMany: each request of a message is served as a Predict call of its own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport import AsyncClient, DeadlineExceededError, Prediction, RpcError
from modelport.tensors import decode
from modelport.v1 import prediction_pb2 as pb
from modelport_registry import Phase, Published, Registry
from tests.support.rollouts import Watched, canary_policy
from tests.support.rpc import (
    Outcome,
    call,
    engines,
    joined,
    open_channel,
    outcomes,
    request,
    start,
    start_many,
)
from tests.support.server import ServerProcess, run_server, wait_for
from tests.support.zoo import INPUTS, Zoo

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT
MIB = 1 << 20
X = np.ones((1, 4), np.float32)
EIGHT = np.repeat(X, 8, axis=0)


@pytest.fixture(scope="module")
def server(
    saved_models: Path, tmp_path_factory: pytest.TempPathFactory, publish_tag: Callable[[Path, str, int], Published]
) -> Generator[ServerProcess]:
    scratch = tmp_path_factory.mktemp("many")
    for tag in (1, 2):
        publish_tag(scratch / "registry", "toy", tag)
    Registry(scratch / "registry").set_alias("toy", "old", 1)
    with run_server(scratch / "registry", scratch, "--instances", "1", "--max-enqueued-rows", "64") as server:
        server.wait_serving("toy")
        server.wait_state("toy", 1, "AVAILABLE")
        yield server
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]
    assert "never retrieved" not in log, log[-4000:]


@pytest.fixture
def channel(server: ServerProcess) -> Generator[grpc.Channel]:
    with open_channel(server.address) as channel:
        yield channel


@contextmanager
def busy(server: ServerProcess) -> Generator[None]:
    """Lets the engines stand still, as very slow models would."""
    found = engines(psutil.Process(server.process.pid))
    for engine in found:
        engine.suspend()
    try:
        yield
    finally:
        for engine in found:
            engine.resume()


def queued(channel: grpc.Channel) -> None:
    """Returns once all calls that were sent before on the same connection are in the queue."""
    assert call(channel, request("toy", {})).code is INVALID


def many(channel: grpc.Channel, messages: list[pb.PredictRequest]) -> list[Outcome]:
    """Sends requests in one message and returns how each ended."""
    found = outcomes(start_many(channel, joined(messages)))
    assert sorted(found) == list(range(len(messages)))
    return [found[index] for index in range(len(messages))]


def same(found: Outcome, alone: Outcome) -> bool:
    """Returns whether two calls ended alike, bit by bit, times aside."""
    for response in (found.response, alone.response):
        response.queue_time_us = response.engine_time_us = 0
    return found == alone


def odd_request(kind: int, number: int) -> pb.PredictRequest:
    """Returns a request of one of many kinds, good ones and bad ones; the number tells it from its like."""
    rows = number % 5
    x = np.full((rows, 4), number, np.float32)
    good = request("toy", {"x": x}, sequence=number)
    bad = np.array([-1.0 if number % 2 else number], np.float32)
    text = np.array([str(number).encode() * row for row in range(rows)], object)
    kinds: list[Callable[[], pb.PredictRequest]] = [
        lambda: good,
        lambda: request("toy", {"x": x}, version=1 + number % 3),
        lambda: request("toy", {"x": x}, alias="old" if number % 2 else "new"),
        lambda: request("toy", {"x": x}, outputs=["y"] if number % 2 else ["z"]),
        lambda: request("toy", {"x": x.astype(np.float64)}),
        lambda: request("nothing", {"x": x}),
        lambda: request("../x", {"x": x}),
        lambda: request("toy", {"x": x}, routing_key=f"{number}"),
        lambda: pb.PredictRequest(),
    ]
    zoo: list[Callable[[], pb.PredictRequest]] = [
        lambda: request("bad_rows", {"x": bad}),
        lambda: request("strings", {"text": text}),
        lambda: request("signatures", INPUTS["signatures", "double"], signature="double" if number % 2 else "none"),
        lambda: request("batch_mates", INPUTS["batch_mates", "serving_default"]),
        lambda: request("no_batch", INPUTS["no_batch", "serving_default"]),
        lambda: request("two_inputs", INPUTS["two_inputs", "serving_default"], sequence=number),
        lambda: request("many", INPUTS["many", "serving_default"], outputs=["out_03"]),
    ]
    chosen = [*kinds, *zoo]
    return chosen[kind % len(chosen)]()


KINDS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40)), min_size=1, max_size=40)
ZOO_KINDS = st.lists(st.tuples(st.integers(5, 15), st.integers(0, 40)), min_size=1, max_size=40)


@settings(max_examples=30)
@given(KINDS)
def test_joined_requests_end_as_they_end_alone(channel_of_module: grpc.Channel, kinds: list[tuple[int, int]]) -> None:
    messages = [odd_request(kind, number) for kind, number in kinds]
    found = many(channel_of_module, messages)
    for outcome, message in zip(found, messages, strict=True):
        assert same(outcome, call(channel_of_module, message))


@pytest.fixture(scope="module")
def channel_of_module(server: ServerProcess) -> Generator[grpc.Channel]:
    with open_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def zoo_channel(zoo: Zoo) -> Generator[grpc.Channel]:
    with open_channel(zoo.server.address) as channel:
        yield channel


@settings(max_examples=30)
@given(ZOO_KINDS)
def test_requests_to_any_models_end_as_they_end_alone(zoo_channel: grpc.Channel, kinds: list[tuple[int, int]]) -> None:
    messages = [odd_request(kind, number) for kind, number in kinds]
    found = many(zoo_channel, messages)
    for outcome, message in zip(found, messages, strict=True):
        assert same(outcome, call(zoo_channel, message))


FATES = st.sampled_from(["answered", "answered", "answered", "cancelled", "late"])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40), FATES), min_size=2, max_size=40))
def test_the_clients_calls_at_the_same_moment_end_as_they_end_alone(
    server: ServerProcess, calls: list[tuple[int, int, str]]
) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            await client.predict("toy", {"x": X})
            tasks = [asyncio.create_task(sdk_call(client, kind, number, fate)) for kind, number, fate in calls]
            await asyncio.sleep(0)  # each has begun
            for task, (_, number, fate) in zip(tasks, calls, strict=True):
                if fate == "cancelled" and number % 2:
                    task.cancel()
            await asyncio.sleep(0)
            for task, (_, _, fate) in zip(tasks, calls, strict=True):
                if fate == "cancelled":
                    task.cancel()
            found = [ending(outcome) for outcome in await asyncio.gather(*tasks, return_exceptions=True)]
            for (kind, number, fate), end in zip(calls, found, strict=True):
                if fate == "cancelled":
                    assert end == (asyncio.CancelledError,)
                elif fate == "answered" or end[0] is not DeadlineExceededError:  # gRPC may be quicker than no time
                    (alone,) = await asyncio.gather(sdk_call(client, kind, number), return_exceptions=True)
                    assert end == ending(alone)

    asyncio.run(main())


async def sdk_call(client: AsyncClient, kind: int, number: int, fate: str = "answered") -> Prediction:
    """Makes the call that ``odd_request`` asks for."""
    message = odd_request(kind, number)
    return await client.predict(
        message.model or "-",
        {tensor.name: decode(tensor) for tensor in message.inputs},
        version=message.version or None,
        alias=message.alias or None,
        signature=message.signature,
        outputs=message.outputs,
        routing_key=message.routing_key,
        timeout_s=1e-6 if fate == "late" else None,
    )


def ending(outcome: Prediction | BaseException) -> tuple[Any, ...]:
    """Returns all that is to be alike of how a call ended."""
    if isinstance(outcome, RpcError):
        return type(outcome), str(outcome), outcome.code, outcome.details, outcome.retry_after_s
    if isinstance(outcome, Prediction):
        outputs = [(name, array.dtype, array.shape, array.tolist()) for name, array in outcome.items()]
        return outcome.model, outcome.version, outputs
    return (type(outcome),)


def test_one_bad_row_among_31_good_ones(zoo_channel: grpc.Channel) -> None:
    rows = [np.array([-1.0 if number == 13 else number], np.float32) for number in range(32)]
    found = many(zoo_channel, [request("bad_rows", {"x": row}) for row in rows])
    assert [number for number, outcome in enumerate(found) if outcome.code is not OK] == [13]
    assert "x is negative" in found[13].message


def test_the_most_requests_of_a_message(channel: grpc.Channel) -> None:
    messages = [request("toy", {"x": X}, version=9, sequence=number) for number in range(1024)]
    assert {outcome.code for outcome in many(channel, messages)} == {grpc.StatusCode.NOT_FOUND}
    empty = [request("toy", {"x": X[:0]}, sequence=number) for number in range(1024)]
    found = many(channel, empty)
    assert [outcome.response.sequence for outcome in found] == list(range(1024))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", "PredictMany takes 1 to 1024 requests, not 0"),
        (joined([pb.PredictRequest()] * 1025), "PredictMany takes 1 to 1024 requests, not 1025"),
        (b"\xff\xff", "the message is not a modelport.v1.PredictManyRequest"),
    ],
)
def test_what_is_no_message(channel: grpc.Channel, message: Any, text: str) -> None:
    refused = start_many(channel, message)
    assert (refused.code(), refused.details()) == (INVALID, text)


def test_a_full_queue_refuses_those_for_whom_there_is_no_room(server: ServerProcess, channel: grpc.Channel) -> None:
    messages = [request("toy", {"x": EIGHT}, version=2) for _ in range(20)]
    with busy(server):
        running = start_many(channel, joined(messages))
        first = pb.PredictManyResponse.FromString(next(running)).results  # at once, before any is answered
        assert {result.error.code for result in first} == {grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}
        assert all(result.error.retry_after_ms > 0 for result in first)
    rest = outcomes(running)
    assert [outcome.code for outcome in rest.values()] == [OK] * len(rest)
    assert sorted([*rest, *(result.index for result in first)]) == list(range(20))


def test_each_request_has_its_own_time(server: ServerProcess, channel: grpc.Channel) -> None:
    message = joined([request("toy", {"x": X})] * 4)
    for hurried in (1, 2):
        message.requests[hurried].timeout_us = 200_000
    with busy(server):
        warm = start(channel, request("toy", {"x": X}))  # the engine has this one
        queued(channel)
        running = start_many(channel, message)
        late: dict[int, int] = {}
        while len(late) < 2:
            for result in pb.PredictManyResponse.FromString(next(running)).results:
                late[result.index] = result.error.code
        assert late == dict.fromkeys((1, 2), grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    assert {index: outcome.code for index, outcome in outcomes(running).items()} == {0: OK, 3: OK}
    assert warm().code is OK


def test_the_deadline_of_the_call_ends_them_all(server: ServerProcess, channel: grpc.Channel) -> None:
    with busy(server):
        running = start_many(channel, joined([request("toy", {"x": X})] * 5, timeout_s=60), timeout_s=0.3)
        assert running.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert call(channel, request("toy", {"x": X})).code is OK


def test_callers_that_go_away_make_room(server: ServerProcess, channel: grpc.Channel) -> None:
    full = request("toy", {"x": EIGHT}, version=2)
    with busy(server):
        running = start(channel, request("toy", {"x": X}, version=2))
        queued(channel)
        gone = start_many(channel, joined([full] * 8))
        queued(channel)
        assert call(channel, full).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        gone.cancel()

        def taken() -> bool:
            """Whether there is room again: a call that is taken can only run into its deadline."""
            one = request("toy", {"x": X}, version=2)
            return call(channel, one, timeout_s=0.2).code is grpc.StatusCode.DEADLINE_EXCEEDED

        wait_for(taken, "the queue to have room", server.alive, 10)
    assert running().code is OK


def test_an_answer_larger_than_a_message_is_refused_alone(zoo_channel: grpc.Channel) -> None:
    large, small = np.array([b"x" * (25 * MIB)], object), np.array([b"a"], object)
    found = many(zoo_channel, [request("strings", {"text": text}) for text in (small, large, small)])
    assert [outcome.code for outcome in found] == [OK, grpc.StatusCode.RESOURCE_EXHAUSTED, OK]
    assert "larger than a message may be" in found[1].message


def test_answers_that_are_large_together_come_in_several_messages(zoo_channel: grpc.Channel) -> None:
    text = np.array([b"x" * (7 * MIB)], object)
    found = many(zoo_channel, [request("strings", {"text": text})] * 6)  # some 35 MiB each
    assert [outcome.code for outcome in found] == [OK] * 6


def test_a_canary_gets_its_share_of_joined_requests(
    tmp_path: Path, publish_tag: Callable[[Path, str, int], Published]
) -> None:
    watched = Watched(Registry(tmp_path / "registry"), "toy")
    publish_tag(watched.registry.root, "toy", 1)
    watched.registry.set_policy("toy", canary_policy((0.25, 600.0)))
    with run_server(watched.registry.root, tmp_path, "--threads", "1") as server:
        server.wait_serving("toy", 1)
        publish_tag(watched.registry.root, "toy", 2)
        watched.wait_phase(Phase.STEP, 0, 2)
        server.wait_state("toy", 2, "AVAILABLE")
        with open_channel(server.address) as channel:
            counted = [0, 0, 0]

            def shared_out() -> bool:
                """Whether the server has heard of the step."""
                for outcome in many(channel, [request("toy", {"x": X})] * 40):
                    counted[outcome.response.version] += 1
                return counted[2] > 0

            wait_for(shared_out, "the canary's first calls", server.alive)
            found = many(channel, [request("toy", {"x": X})] * 40)
            assert [outcome.response.version for outcome in found].count(2) == 10
            keyed = [request("toy", {"x": X}, routing_key=f"{number}") for number in range(40)]
            versions = [outcome.response.version for outcome in many(channel, keyed)]
            assert versions == [call(channel, message).response.version for message in keyed]


def test_a_stopping_server_answers_what_it_has(
    tmp_path: Path, publish_tag: Callable[[Path, str, int], Published]
) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    with run_server(root, tmp_path, "--threads", "1") as server, open_channel(server.address) as channel:
        server.wait_serving("toy", 1)
        with busy(server):
            running = start_many(channel, joined([request("toy", {"x": X})] * 20))
            queued(channel)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: "not serving" in server.log.read_text(), "the server to stop", timeout_s=20)
        assert [outcome.code for outcome in outcomes(running).values()] == [OK] * 20
        assert server.process.wait(60) == 0
