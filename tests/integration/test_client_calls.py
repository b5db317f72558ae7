"""The asynchronous client against a real gRPC server: unary calls, what is asked of it, what goes wrong."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc
import numpy as np
import pytest

from modelport import (
    AsyncClient,
    ClientClosedError,
    DeadlineExceededError,
    InputError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    RetryPolicy,
    RpcError,
    UnavailableError,
    VersionState,
)
from tests.support.fake_server import DOUBLER, FakeServer, RefusalError, Request, StreamResponse, signature, spec

X = np.arange(3, dtype=np.float32)
QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)


async def test_an_answer_is_a_mapping_with_what_is_known_about_it() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        answer = await client.predict("m", {"x": X})
    np.testing.assert_array_equal(answer["y"], 2 * X)
    assert list(answer) == ["y", "version"]
    assert len(answer) == 2
    assert (answer.model, answer.version) == ("m", 1)
    assert (answer.queue_time_s, answer.engine_time_s) == (0.0015, 0.0025)
    with pytest.raises(KeyError, match="no output 'z'; the outputs are y, version"):
        answer["z"]


async def test_the_request_says_what_was_asked() -> None:
    async with FakeServer(aliases={"beta": 1}) as server, AsyncClient(server.address) as client:
        answer = await client.predict("m", {"x": X}, alias="beta", signature="s", outputs=["y"], routing_key="k")
        await client.predict("m", {"x": X}, version=1)
    first, second = server.requests
    assert (first.model, first.alias, first.signature, first.routing_key) == ("m", "beta", "s", "k")
    assert list(answer) == ["y"]
    assert second.version == 1


async def test_lists_and_bare_arrays_ask_for_the_signature_once() -> None:
    asked = 0

    class Counting(FakeServer):
        def model(self) -> Any:
            nonlocal asked
            asked += 1
            return super().model()

    async with Counting() as server, AsyncClient(server.address) as client:
        assert (await client.predict("m", [1, 2]))["y"].tolist() == [2, 4]
        assert (await client.predict("m", X))["y"].tolist() == [0, 2, 4]
        assert (await client.predict("m", {"x": [5]}))["y"].tolist() == [10]
        assert asked == 1
        server.publish(2)
        await client.predict("m", X)  # another version answers: what is known of the first is forgotten
        await client.predict("m", X)
        assert asked == 2


async def test_a_signature_that_has_changed_is_asked_for_again() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        await client.predict("m", [1])
        server.sign = signature([spec("z", "int32", -1)], [spec("y", "int32", -1)])
        server.run = lambda inputs, version: {"y": inputs["z"]}

        async def refuse_x(request: Request) -> None:
            if request.inputs[0].name == "x":
                raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "there is no input 'x'")

        server.on_request = refuse_x
        answer = await client.predict("m", [1])
        assert answer["y"].dtype == np.int32
        with pytest.raises(InvalidArgumentError, match="no input 'x'"):
            await client.predict("m", {"x": X})


async def test_arrays_are_never_cast() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        await client.predict("m", X.astype(np.float64))
    assert server.requests[0].inputs[0].dtype == 12


async def test_every_type_comes_back_as_it_went() -> None:
    def echo(inputs: Any, version: int) -> Any:
        return {name: array for name, array in inputs.items() if len(array)}

    arrays = {
        name: np.array([0, 1], name) for name in ("bool", "int8", "uint16", "int64", "float16", "float64", "uint64")
    }
    arrays["text"] = np.array([b"a\0", b""], object)
    async with FakeServer(run=echo) as server, AsyncClient(server.address) as client:
        answer = await client.predict("m", arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(answer[name], array)
        assert answer[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
        (grpc.StatusCode.INTERNAL, InternalError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError),
    ],
)
async def test_an_error_is_raised_at_once_with_its_text(code: grpc.StatusCode, expected: type[Exception]) -> None:
    async def refuse(request: Request) -> None:
        raise RefusalError(code, "because")

    async with FakeServer(on_request=refuse) as server, AsyncClient(server.address) as client:
        with pytest.raises(expected, match=r"^because$"):
            await client.predict("m", {"x": X})
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_stopping_server_s_refusals_are_tried_again(code: grpc.StatusCode) -> None:
    async def refuse_twice(request: Request) -> None:
        if len(server.requests) < 3:
            raise RefusalError(code)

    async with FakeServer(on_request=refuse_twice) as server, AsyncClient(server.address, retry=QUICK) as client:
        await client.predict("m", {"x": X})
    assert len(server.requests) == 3


async def test_requests_over_256_kib_are_tried_again_too() -> None:
    async def refuse_once(request: Request) -> None:
        if len(server.requests) < 2:
            raise RefusalError(grpc.StatusCode.UNAVAILABLE)

    async with FakeServer(on_request=refuse_once) as server, AsyncClient(server.address, retry=QUICK) as client:
        await client.predict("m", {"x": np.zeros(1 << 20, np.float32)})
    assert len(server.requests) == 2


async def test_a_full_server_s_pushback_is_obeyed() -> None:
    async def full_twice(request: Request) -> None:
        if len(server.requests) < 3:
            raise RefusalError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_ms=20)

    async with FakeServer(on_request=full_twice) as server, AsyncClient(server.address, retry=QUICK) as client:
        await client.predict("m", {"x": X})
    assert len(server.requests) == 3


@pytest.mark.parametrize(("pushback_ms", "tries", "retry_after_s"), [(None, 1, None), (-1, 1, None), (5, 5, 0.005)])
async def test_a_full_server_without_pushback_is_left_alone(
    pushback_ms: int | None, tries: int, retry_after_s: float | None
) -> None:
    async def full(request: Request) -> None:
        raise RefusalError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_ms=pushback_ms)

    async with FakeServer(on_request=full) as server, AsyncClient(server.address, retry=QUICK) as client:
        with pytest.raises(ResourceExhaustedError, match="full") as caught:
            await client.predict("m", {"x": X})
    assert caught.value.retry_after_s == retry_after_s
    assert len(server.requests) == tries


async def test_a_deadline_passes() -> None:
    async def hang(request: Request) -> None:
        await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server, AsyncClient(server.address) as client:
        with pytest.raises(DeadlineExceededError, match=f"{server.address} did not answer in time"):
            await client.predict("m", {"x": X}, timeout_s=0.1)


async def test_a_deadline_passes_where_no_server_is() -> None:
    with socket.socket() as taken:  # nobody listens there
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with AsyncClient(address) as client:
            with pytest.raises(RpcError) as caught:
                await client.predict("m", {"x": X}, timeout_s=1.5)
    assert address in str(caught.value)
    assert "is `modelport serve` running?" in str(caught.value)


async def test_cancelling_a_call_is_the_callers_own() -> None:
    async def hang(request: Request) -> None:
        await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server, AsyncClient(server.address) as client:
        task = asyncio.create_task(client.predict("m", {"x": X}))
        await server.seen(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_closing_the_client_ends_its_calls() -> None:
    async def hang(request: Request) -> None:
        await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server:
        client = AsyncClient(server.address)
        task = asyncio.create_task(client.predict("m", {"x": X}))
        await server.seen(1)
        await client.close()
        await client.close()
        with pytest.raises(ClientClosedError):
            await task
        with pytest.raises(ClientClosedError, match="closed"):
            await client.predict("m", {"x": X})


async def test_nobody_there_is_said_in_one_line() -> None:
    async with FakeServer() as server:
        address = server.address
    async with AsyncClient(address, retry=QUICK) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.predict("m", {"x": X})
    assert str(caught.value) == (f"no server answers at {address} (connection refused); is `modelport serve` running?")


async def test_a_batch_over_the_limit_goes_in_parts_and_comes_back_whole() -> None:
    x = np.random.default_rng(1).random((5000, 8), np.float32)
    sign = signature([spec("x", "float32", -1, 8)], [spec("y", "float32", -1, 8)])
    async with FakeServer(sign=sign) as server, AsyncClient(server.address, max_message_bytes=1 << 16) as client:
        answer = await client.predict("m", x, outputs=["y"])
        named = await client.predict("m", {"x": x}, outputs=["y"])
    np.testing.assert_array_equal(answer["y"], 2 * x)
    np.testing.assert_array_equal(named["y"], 2 * x)
    assert len(server.requests) > 4
    assert answer.engine_time_s == pytest.approx(0.0025 * len(server.requests) / 2)


async def test_strings_over_the_limit_go_in_parts_too() -> None:
    texts = np.array([b"t" * 100] * 500, object)
    sign = signature([spec("x", "string", -1)], [spec("y", "string", -1)])
    server = FakeServer(sign=sign, run=lambda inputs, version: {"y": inputs["x"]})
    async with server, AsyncClient(server.address, max_message_bytes=1 << 14) as client:
        assert (await client.predict("m", texts))["y"].tolist() == texts.tolist()
    assert len(server.requests) > 2


async def test_parts_come_from_one_version_even_if_that_is_retired_meanwhile() -> None:
    async def retire_at_third(request: Request) -> None:
        if len(server.requests) == 3:
            server.retire(1, successor=2)
            await asyncio.Event().wait()

    x = np.zeros(50000, np.float32)
    server = FakeServer(on_request=retire_at_third)
    async with server, AsyncClient(server.address, max_message_bytes=1 << 16) as client:
        answer = await client.predict("m", x)
    assert answer.version == 2
    assert set(answer["version"].tolist()) == {2}
    assert len(answer["version"]) == 50000


async def test_what_has_no_rows_can_not_be_split() -> None:
    sign = signature([spec("x", "float32", 50000)], [spec("y", "float32", 50000)], batched=False)
    async with FakeServer(sign=sign) as server, AsyncClient(server.address, max_message_bytes=1 << 16) as client:
        with pytest.raises(InputError, match="the inputs take 200,000 bytes and one message holds"):
            await client.predict("m", np.zeros(50000, np.float32))


async def test_parts_have_a_deadline_together() -> None:
    async def hang(request: Request) -> None:
        await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server, AsyncClient(server.address, max_message_bytes=1 << 16) as client:
        with pytest.raises(DeadlineExceededError):
            await client.predict("m", np.zeros(50000, np.float32), timeout_s=0.3)


async def test_a_damaged_answer_is_said_to_be_one() -> None:
    async def damaged(request: Request) -> StreamResponse:
        response = StreamResponse()
        response.response.outputs.add(name="y", dtype=11, shape=[3], data=b"123")  # pyright: ignore[reportArgumentType]
        return response

    async with FakeServer(on_request=damaged) as server, AsyncClient(server.address) as client:
        with pytest.raises(Exception, match="the server's answer is damaged"):
            await client.predict("m", {"x": X})


async def test_models_and_versions() -> None:
    async with FakeServer(versions={1, 3}, serving=3, aliases={"old": 1}) as server, AsyncClient(server.address) as c:
        (listed,) = await c.models()
        model = await c.model("m")
        with pytest.raises(NotFoundError, match="no model 'n'"):
            await c.model("n")
        with pytest.raises(NotFoundError, match="no version 2"):
            await c.predict("m", [1], version=2)
        with pytest.raises(NotFoundError, match="no alias 'x'"):
            await c.predict("m", [1], alias="x")
        with pytest.raises(InvalidArgumentError, match="has no signature 'x'; it has serving_default"):
            await c.predict("m", [1], signature="x")
    assert listed == model
    assert (model.name, model.serving_version, dict(model.aliases)) == ("m", 3, {"old": 1})
    assert [v.version for v in model.versions] == [3, 1]
    first = model.versions[0]
    assert (first.state, first.since, dict(first.metrics)) == (VersionState.AVAILABLE, None, {"accuracy": 0.5})
    assert first.signatures["serving_default"].inputs[0].shape == (None,)
    assert model.version(2) is None
    assert len(DOUBLER.outputs) == len(first.signatures["serving_default"].outputs)


async def test_watching_shows_the_model_and_its_changes_over_a_broken_connection() -> None:
    server = FakeServer()
    async with server, AsyncClient(server.address) as client:
        changes = client.watch("m")
        assert (await anext(changes)).model.serving_version == 1
        server.publish(2)
        await server.model_changed()
        assert (await anext(changes)).model.serving_version == 2
        await server.kill()
        server.publish(3)
        await server.start()
        change = await anext(changes)
        assert (change.model.serving_version, change.removed) == (3, False)
        await changes.aclose()


async def test_readiness() -> None:
    async with FakeServer(healthy=False) as server, AsyncClient(server.address, retry=QUICK) as client:
        assert not await client.is_ready()
        with pytest.raises(UnavailableError, match=r"was not ready within 0.1 s: the server says"):
            await client.wait_ready(timeout_s=0.1)
        waiting = asyncio.create_task(client.wait_ready(model="m"))
        server.healthy = True
        await waiting
        assert await client.is_ready()


async def test_waiting_for_a_server_that_is_not_there_yet() -> None:
    server = FakeServer()
    async with server:
        pass
    async with AsyncClient(server.address, retry=QUICK) as client:
        waiting = asyncio.create_task(client.wait_ready())
        async with server:
            await waiting


async def test_a_unix_socket(tmp_path: Any) -> None:
    async with FakeServer(address=f"unix:{tmp_path}/s") as server, AsyncClient(server.address) as client:
        assert (await client.predict("m", {"x": X})).version == 1
