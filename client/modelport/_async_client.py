"""The asynchronous client, on which the blocking one stands."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import grpc
import grpc.aio
import numpy as np

from modelport import _health, _inputs, _joining, _results, _signatures, _status
from modelport._bulk import Batch, BulkCall, Call
from modelport._channel import channel_target, checked_addresses, open_channel
from modelport._conversation import Conversation
from modelport._inputs import Inputs
from modelport._models import ModelChange, ModelInfo, SignatureInfo, model_info
from modelport._options import (
    MIB,
    ClientOptions,
    Keepalive,
    RetryPolicy,
    StreamOptions,
    Target,
    Tls,
    check_duration,
)
from modelport._results import Prediction, StreamResult
from modelport._retry import Retrier
from modelport._rollouts import AsyncRollouts
from modelport.exceptions import (
    ClientClosedError,
    InputError,
    InvalidArgumentError,
    NotFoundError,
    RpcError,
    UnavailableError,
    VersionRetiredError,
)
from modelport.v1 import model_pb2, model_pb2_grpc, prediction_pb2, prediction_pb2_grpc, rollout_pb2_grpc

if TYPE_CHECKING:
    from modelport.v1.model_pb2_grpc import ModelServiceAsyncStub
    from modelport.v1.prediction_pb2_grpc import PredictionServiceAsyncStub
    from modelport.v1.rollout_pb2_grpc import RolloutServiceAsyncStub

RequestT = TypeVar("RequestT", contravariant=True)
ResponseT = TypeVar("ResponseT", covariant=True)
T = TypeVar("T")
OnError = Literal["raise", "return"]

_HEALTH_INTERVAL_S = 0.05
_FROM_MANY = prediction_pb2.PredictManyResponse.FromString
_WHOLE_CALLS = 3
"""How often a call sent in parts is begun, should its version be retired under way."""


class _Method(Protocol[RequestT, ResponseT]):
    def __call__(self, request: RequestT, timeout: float | None = None) -> Awaitable[ResponseT]: ...


class _Answers(Protocol[ResponseT]):
    def __aiter__(self) -> AsyncIterator[ResponseT]: ...
    def cancel(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Connection:
    channel: grpc.aio.Channel
    predictions: PredictionServiceAsyncStub
    models: ModelServiceAsyncStub
    rollouts: RolloutServiceAsyncStub
    health: _Method[bytes, bytes]
    many: _joining.Method


class AsyncClient:
    """Calls models on one or several servers, from asyncio.

    Belongs to the event loop in which it is first used. Use it as ``async with`` or call ``close``.

    Args:
        address: ``host:port`` or ``unix:path``, or several ``host:port`` between which calls are
            shared out among those that are up and ready. Of several, hosts given by name are looked up
            once, with the first call; a single one whenever a connection is made.
        timeout_s: how long a call may take, with all its attempts, in seconds.
        retry: when and how often a call is tried again.
        keepalive: how connections that went dead are noticed.
        tls: encryption; None for none.
        max_message_bytes: the largest message in either direction; larger batches go in parts.

    Raises:
        InputError: if an address or an option can't be what it is.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        keepalive: Keepalive | None = None,
        tls: Tls | None = None,
        max_message_bytes: int = 64 * MIB,
    ) -> None:
        self._addresses = checked_addresses(address)
        self._options = ClientOptions(
            timeout_s=timeout_s,
            retry=retry or RetryPolicy(),
            keepalive=keepalive or Keepalive(),
            tls=tls,
            max_message_bytes=max_message_bytes,
        )
        self._retrier = Retrier(self._options.retry)
        self._signatures = _signatures.SignatureCache()
        self._joiner = _joining.Joiner(
            self._server,
            max_message_bytes,
            may_retry=self._options.retry.max_attempts > 1,
            finish=self._finish,
            on_answer=self._retrier.budget.succeeded,
        )
        self._predicts_under_way = 0
        self._connection: _Connection | None = None
        self._is_closed = False
        self._bulk_calls: weakref.WeakSet[BulkCall] = weakref.WeakSet()
        self.rollouts = AsyncRollouts(_RolloutCalls(self._call, self._follow, self._connected, self._deadline))
        """How versions come into service, and how people steer that."""

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends what is under way and closes all connections; closing twice does nothing more."""
        self._is_closed = True
        await self._joiner.close()
        for bulk_call in list(self._bulk_calls):
            await bulk_call.aclose()
        if self._connection is not None:
            await self._connection.channel.close(None)

    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: int | None = None,
        alias: str | None = None,
        signature: str = "",
        outputs: Iterable[str] | None = None,
        routing_key: str = "",
        timeout_s: float | None = None,
    ) -> Prediction:
        """Returns a model's answer to ``inputs``.

        Arrays are sent with the dtype that they have. Lists of Python numbers, text or bytes become
        what the signature asks for; for them, and for a single array, the server is asked once how the
        model is called. What does not fit into one message is sent in parts, if the signature counts
        rows, and one version answers them all.

        Args:
            model: the model's name.
            inputs: the sole input's array or list, or a mapping of input names to arrays or lists.
            version: the version that shall answer; not together with ``alias``.
            alias: the alias whose version shall answer.
            signature: the signature to run; empty for ``serving_default``.
            outputs: the outputs wanted; None for all.
            routing_key: while a rollout shares out calls, those with equal keys go to the same version, on
                every server; without a key they are spread evenly. Not secret, and of any length.
            timeout_s: how long the call may take, in seconds; None for the client's own.

        Raises:
            InputError: if the inputs can't be sent.
            RpcError: if the server answers with an error, or there is none.
        """
        target = make_target(model, version, alias, signature, outputs, routing_key)
        deadline = self._deadline(timeout_s)
        known = self._signatures.get(target)
        try:
            return await self._predict(target, inputs, deadline)
        except InvalidArgumentError:
            self._signatures.forget(target)
            if known is None or not _inputs.needs_signature(inputs):
                raise
            if await self._signature(target, deadline) == known:
                raise
        return await self._predict(target, inputs, deadline)  # the model is called otherwise by now

    def predict_stream(
        self,
        model: str,
        batches: AsyncIterable[Inputs] | Iterable[Inputs],
        *,
        version: int | None = None,
        alias: str | None = None,
        signature: str = "",
        outputs: Iterable[str] | None = None,
        routing_key: str = "",
        follow: bool = False,
        window: int = 8,
        on_error: OnError = "raise",
        timeout_s: float = 120.0,
        resume_timeout_s: float = 30.0,
    ) -> AsyncGenerator[StreamResult, None]:
        """Yields a model's answer to each of ``batches``, in order.

        A connection that breaks is resumed: what has no answer is sent again, and every batch is
        answered once. At most ``window`` batches are taken from ``batches`` ahead of the answers. All
        are answered by one version, unless ``follow`` is set or that version is retired meanwhile;
        each result names its version. Where the next version is called otherwise, lists that were
        taken before that was known may be refused; give arrays where that matters.

        Args:
            model: the model's name.
            batches: what ``predict`` takes as inputs, any number of times.
            version: the version that shall answer; not together with ``alias``.
            alias: the alias whose version shall answer.
            signature: the signature to run; empty for ``serving_default``.
            outputs: the outputs wanted; None for all.
            routing_key: while a rollout shares out calls, those with equal keys go to the same version, on
                every server; without a key they are spread evenly. Not secret, and of any length.
            follow: let each batch be answered by the version in charge when it arrives.
            window: how many batches are on their way at most.
            on_error: whether a batch's error is raised and ends the stream, or is returned as its result.
            timeout_s: how long the stream may go without an answer before it counts as broken, in seconds.
            resume_timeout_s: how long a broken stream may take until its next answer, in seconds.

        Raises:
            InputError: if a batch can't be sent.
            RpcError: if the server refuses the stream or a batch.
            VersionRetiredError: if ``version`` is given and not served any more.
            StreamInterruptedError: if the stream broke and could not be resumed in time.
        """
        target = make_target(model, version, alias, signature, outputs, routing_key)
        options = stream_options(follow, window, on_error, timeout_s, resume_timeout_s)
        return self._results(self.bulk_call(target, batches, options))

    async def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Returns every model that the server serves or tries to serve, by name."""
        stub = (await self._connected()).models
        request = model_pb2.ListModelsRequest()
        response = await self._call(stub.ListModels, request, self._deadline(timeout_s))
        return [model_info(message) for message in response.models]

    async def model(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """Returns one model with its versions; raises NotFoundError if the server has it not."""
        return await self._model(name, self._deadline(timeout_s))

    async def watch(self, model: str = "") -> AsyncGenerator[ModelChange, None]:
        """Yields every model at once and then each whenever something about it has changed.

        Goes on over broken connections; what changed meanwhile comes when the server is back.

        Args:
            model: the only model of interest; empty for all.

        Raises:
            RpcError: if the server refuses, or can't be reached for as long as retries last.
            ClientClosedError: if the client is closed meanwhile.
        """
        request = model_pb2.WatchModelsRequest(model=model)
        responses = self._follow(lambda connection: connection.models.WatchModels(request))
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield ModelChange(model=model_info(response.model), removed=response.removed)

    async def _follow(self, method: Callable[[_Connection], _Answers[T]]) -> AsyncGenerator[T, None]:
        """Yields the answers of a stream; opens it again when its connection breaks."""
        losses = 0
        while True:
            call = method(await self._connected())
            try:
                async for response in call:
                    losses = 0
                    yield response
            except grpc.aio.AioRpcError as error:
                failure = _status.from_aio(error, self._server)
                if not isinstance(failure, UnavailableError) or losses >= self._options.retry.max_attempts:
                    raise failure from error
            except asyncio.CancelledError as error:
                if self._is_closed and not _is_cancelling():
                    raise ClientClosedError("the client was closed during the call") from error
                raise
            finally:
                call.cancel()
            losses += 1
            await asyncio.sleep(self._retrier.jittered_s(losses))

    async def is_ready(self, *, model: str = "", timeout_s: float | None = None) -> bool:
        """Returns whether the server takes calls, or the one model can answer.

        Raises:
            RpcError: if there is no server, or one without ``grpc.health.v1``.
        """
        request = _health.request(model)
        try:
            answer = await self._call((await self._connected()).health, request, self._deadline(timeout_s))
        except NotFoundError:
            return False
        return _health.status(answer) == _health.SERVING

    async def wait_ready(self, *, model: str = "", timeout_s: float = 60.0) -> None:
        """Waits until the server takes calls, or the one model can answer.

        Raises:
            UnavailableError: if that has not come within ``timeout_s`` seconds.
        """
        check_duration("timeout_s", timeout_s)
        deadline = time.monotonic() + timeout_s
        reason = "the server says that it is not serving"
        while True:
            try:
                if await self.is_ready(model=model, timeout_s=max(0.001, deadline - time.monotonic())):
                    return
            except RpcError as error:
                if error.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                reason = str(error)
            if time.monotonic() + _HEALTH_INTERVAL_S >= deadline:
                text = f"{model or self._server} was not ready within {timeout_s:g} s: {reason}"
                raise UnavailableError(text, code=grpc.StatusCode.UNAVAILABLE, details=reason)
            await asyncio.sleep(_HEALTH_INTERVAL_S)

    def bulk_call(
        self, target: Target, batches: AsyncIterable[Inputs] | Iterable[Inputs], options: StreamOptions
    ) -> BulkCall:
        """Returns a stream that is not begun yet; for the blocking client, and to be closed by its owner."""
        conversation = Conversation(target, options, self._retrier, self._server, self._signatures)
        bulk_call = BulkCall(
            conversation,
            self._open_stream,
            self._requests(batches, target, conversation),
            target=target,
            options=options,
            retrier=self._retrier,
            server=self._server,
        )
        self._bulk_calls.add(bulk_call)
        return bulk_call

    async def _open_stream(self) -> Call:
        method = cast("Callable[[], Call]", (await self._connected()).predictions.PredictStream)
        return method()

    @staticmethod
    async def _results(bulk_call: BulkCall) -> AsyncGenerator[StreamResult, None]:
        try:
            while results := await bulk_call.results(1):
                yield results[0]
        finally:
            await bulk_call.aclose()

    async def _requests(
        self, batches: AsyncIterable[Inputs] | Iterable[Inputs], target: Target, conversation: Conversation
    ) -> AsyncGenerator[Batch, None]:
        async for batch in _iterated(batches):
            try:
                yield await self._request(batch, target, conversation.pinned_version)
            except (InputError, InvalidArgumentError) as error:
                yield error

    async def _request(self, inputs: Inputs, target: Target, pinned: int | None) -> prediction_pb2.PredictStreamRequest:
        signature = await self._stream_signature(target, pinned) if _inputs.needs_signature(inputs) else None
        message = prediction_pb2.PredictStreamRequest()
        _inputs.write(message.request, _inputs.named_arrays(inputs, signature), target)
        if not _inputs.fits(message.request, self._options.max_message_bytes):
            raise _inputs.too_large(message.request.ByteSize(), self._options.max_message_bytes)
        return message

    async def _stream_signature(self, target: Target, pinned: int | None) -> SignatureInfo:
        deadline = self._deadline(None)
        if pinned is not None:
            try:
                return await self._signature(_signatures.at_version(target, pinned), deadline)
            except (NotFoundError, InvalidArgumentError):
                pass  # it is gone, which the stream is about to learn
        return await self._signature(target, deadline)

    async def _predict(self, target: Target, inputs: Inputs, deadline: float) -> Prediction:
        limit = self._options.max_message_bytes
        signature = await self._signature(target, deadline) if _inputs.needs_signature(inputs) else None
        arrays = _inputs.named_arrays(inputs, signature)
        if _inputs.number_bytes(arrays) > limit:
            return await self._predict_in_parts(target, arrays, deadline)
        message = _inputs.request(arrays, target)
        if not _inputs.fits(message, limit):
            return await self._predict_in_parts(target, arrays, deadline)
        _inputs.address(message, target)
        return self.answered(target, await self._answer(message, deadline))

    def joinable(self, target: Target, inputs: Inputs) -> prediction_pb2.PredictRequest | None:
        """Returns the message of a call that may be joined with others at once, else None.

        For the blocking client, as are the next two: all may be called by any thread.

        Raises:
            InputError: if the inputs can't be sent.
        """
        signature = self._signatures.fresh(target) if _inputs.needs_signature(inputs) else None
        if self._connection is None or (signature is None and _inputs.needs_signature(inputs)):
            return None
        arrays = _inputs.named_arrays(inputs, signature)
        if not self._joiner.takes(_inputs.number_bytes(arrays)):
            return None
        message = _inputs.request(arrays, target)
        _inputs.address(message, target)
        return message if self._joiner.takes(message.ByteSize()) else None

    def hand_over(
        self,
        message: prediction_pb2.PredictRequest,
        timeout_s: float | None,
        call_soon: Callable[[Callable[[], object]], None],
    ) -> prediction_pb2.PredictResponse:
        """Makes a call for a thread that is not the event loop's, and waits for its answer.

        Args:
            message: what ``joinable`` returned.
            timeout_s: how long the call may take, in seconds; None for the client's own.
            call_soon: has something called in the client's event loop.

        Raises:
            RpcError: if the server answers with an error, or there is none.
            ClientClosedError: if the client is closed, before or meanwhile.
        """
        if self._connection is None or self._is_closed:
            raise ClientClosedError("the client is closed")
        return self._joiner.hand_over(self._connection.many, message, self._deadline(timeout_s), call_soon)

    def answered(self, target: Target, response: prediction_pb2.PredictResponse) -> Prediction:
        """Returns an answer from its message; takes note of the version that gave it."""
        self._signatures.answered(target, response.version)
        return _results.prediction(response)

    async def _answer(self, message: prediction_pb2.PredictRequest, deadline: float) -> prediction_pb2.PredictResponse:
        """Makes a call, together with others that wait at the same moment if there are any."""
        connection = await self._connected()
        self._predicts_under_way += 1
        try:
            outcome: _joining.Outcome = None
            if self._predicts_under_way > 1 and self._joiner.takes(message.ByteSize()):
                outcome = await self._joiner.outcome(connection.many, message, deadline)
            if isinstance(outcome, prediction_pb2.PredictResponse):
                return outcome
            return await self._finish(outcome, message, deadline)
        finally:
            self._predicts_under_way -= 1

    async def _finish(
        self, failure: RpcError | None, message: prediction_pb2.PredictRequest, deadline: float
    ) -> prediction_pb2.PredictResponse:
        """Makes a call by itself; one that was joined and failed only if that may pass."""
        if failure is not None:
            await self._wait_again(failure, deadline)
        stub = (await self._connected()).predictions
        return await self._call(stub.Predict, message, deadline, attempts=int(failure is not None))

    async def _predict_in_parts(self, target: Target, arrays: dict[str, Any], deadline: float) -> Prediction:
        signature = await self._signature(target, deadline)
        if not signature.batched or not all(isinstance(a, np.ndarray) for a in arrays.values()):
            raise _inputs.too_large(_inputs.number_bytes(arrays), self._options.max_message_bytes)
        for attempt in range(1, _WHOLE_CALLS + 1):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await self._joined_parts(target, arrays, signature, deadline)
            except VersionRetiredError:
                if target.version is not None or attempt == _WHOLE_CALLS:
                    raise
            except TimeoutError as error:
                text = f"{len(arrays)} inputs sent in parts"
                raise _status.rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, text, server=self._server) from error
        raise AssertionError("unreachable")

    async def _joined_parts(
        self, target: Target, arrays: dict[str, Any], signature: SignatureInfo, deadline: float
    ) -> Prediction:
        left_s = max(0.001, deadline - time.monotonic())
        options = StreamOptions(one_version=True, resume_timeout_s=left_s, answer_timeout_s=left_s)
        answer_bytes = _inputs.answer_row_bytes(signature, target.outputs)
        parts = _inputs.parts(arrays, self._options.max_message_bytes, answer_bytes)
        bulk_call = self.bulk_call(target, parts, options)
        answers: list[Prediction] = []
        try:
            while results := await bulk_call.results(options.window):
                answers += [result.prediction for result in results]
        finally:
            await bulk_call.aclose()
        return _results.joined(answers)

    async def _signature(self, target: Target, deadline: float) -> SignatureInfo:
        known = self._signatures.take(target)
        if known is not None:
            return known
        version, signature = _signatures.find(await self._model(target.model, deadline), target)
        self._signatures.put(target, version, signature)
        return signature

    async def _model(self, name: str, deadline: float) -> ModelInfo:
        request = model_pb2.GetModelRequest(model=name)
        response = await self._call((await self._connected()).models.GetModel, request, deadline)
        return model_info(response.model)

    async def _call(self, method: _Method[RequestT, T], request: RequestT, deadline: float, attempts: int = 0) -> T:
        """Makes a call; tries it again where the server asks for that. gRPC itself retries the rest.

        ``attempts`` is how many were made already.
        """
        while True:
            attempts += 1
            try:
                response = await method(request, timeout=max(0.0, deadline - time.monotonic()))
            except grpc.aio.AioRpcError as error:
                failure = _status.from_aio(error, self._server, connected=self._is_connected)
                failure.__cause__ = error
            except asyncio.CancelledError as error:
                if self._is_closed and not _is_cancelling():
                    raise ClientClosedError("the client was closed during the call") from error
                raise
            else:
                self._retrier.budget.succeeded()
                return response
            await self._sleep(self._pushed_back_s(failure, attempts), deadline, failure)

    async def _wait_again(self, failure: RpcError, deadline: float) -> None:
        """Waits until a joined call that failed may be made by itself, which gRPC then tries again.

        Raises:
            RpcError: the failure, if it had better not.
        """
        if failure.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            wait_s = self._retrier.wait_s(1, failure.retry_after_s or 0.0)
        else:
            wait_s = self._pushed_back_s(failure, 1)
        await self._sleep(wait_s, deadline, failure)

    async def _sleep(self, wait_s: float | None, deadline: float, failure: RpcError) -> None:
        """Waits before another attempt.

        Raises:
            RpcError: the failure of the last one, if there shall be none, or it would come too late.
        """
        if wait_s is None or time.monotonic() + wait_s >= deadline:
            raise failure
        await asyncio.sleep(wait_s)
        if self._is_closed:
            raise ClientClosedError("the client was closed during the call")

    def _pushed_back_s(self, failure: RpcError, attempt: int) -> float | None:
        if failure.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or failure.retry_after_s is None:
            return None
        return self._retrier.wait_s(attempt, failure.retry_after_s)

    async def _connected(self) -> _Connection:
        if self._connection is None and not self._is_closed:
            target = await channel_target(self._addresses)
            if self._connection is None and not self._is_closed:  # both may have come meanwhile
                self._connection = _connection(open_channel(target, self._addresses, self._options))
        if self._connection is None or self._is_closed:
            raise ClientClosedError("the client is closed")
        return self._connection

    def _deadline(self, timeout_s: float | None) -> float:
        if timeout_s is None:
            return time.monotonic() + self._options.timeout_s
        check_duration("timeout_s", timeout_s)
        return time.monotonic() + timeout_s

    @property
    def _server(self) -> str:
        return ", ".join(self._addresses)

    @property
    def _is_connected(self) -> bool:
        """Whether a connection is there, or nobody has asked for one."""
        states = grpc.ChannelConnectivity
        tries = (states.CONNECTING, states.TRANSIENT_FAILURE)
        return self._connection is None or self._connection.channel.get_state() not in tries


class _RolloutCalls:
    """What ``AsyncRollouts`` needs of a client."""

    def __init__(
        self,
        call: Callable[[_Method[Any, Any], Any, float], Awaitable[Any]],
        follow: Callable[[Callable[[_Connection], _Answers[Any]]], AsyncGenerator[Any, None]],
        connected: Callable[[], Awaitable[_Connection]],
        deadline: Callable[[float | None], float],
    ) -> None:
        self._call = call
        self._follow = follow
        self._connected = connected
        self._deadline = deadline

    async def call(
        self, method: Callable[[RolloutServiceAsyncStub], Any], request: Any, timeout_s: float | None
    ) -> Any:
        """Makes a unary call."""
        stub = (await self._connected()).rollouts
        return await self._call(method(stub), request, self._deadline(timeout_s))

    def follow(self, method: Callable[[RolloutServiceAsyncStub], Any], request: Any) -> AsyncGenerator[Any, None]:
        """Yields the answers of a stream, which is opened again when its connection breaks."""
        return self._follow(lambda connection: method(connection.rollouts)(request))


def _connection(channel: grpc.aio.Channel) -> _Connection:
    return _Connection(
        channel,
        cast("PredictionServiceAsyncStub", prediction_pb2_grpc.PredictionServiceStub(channel)),
        cast("ModelServiceAsyncStub", model_pb2_grpc.ModelServiceStub(channel)),
        cast("RolloutServiceAsyncStub", rollout_pb2_grpc.RolloutServiceStub(channel)),
        cast("_Method[bytes, bytes]", cast("Any", channel).unary_unary(_health.METHOD)),
        cast("_joining.Method", cast("Any", channel).unary_stream(_joining.METHOD, None, _FROM_MANY)),
    )


def make_target(
    model: str, version: int | None, alias: str | None, signature: str, outputs: Iterable[str] | None, key: str
) -> Target:
    """Returns a call's target as it is given to ``predict``, checked."""
    if isinstance(outputs, str):
        raise InputError(f"outputs must be several names, not the text {outputs!r}")
    wanted = tuple(outputs or ())
    return Target(model=model, version=version, alias=alias, signature=signature, outputs=wanted, routing_key=key)


def stream_options(
    follow: bool, window: int, on_error: OnError, timeout_s: float, resume_timeout_s: float
) -> StreamOptions:
    """Returns a stream's options as they are given to ``predict_stream``, checked."""
    if on_error not in ("raise", "return"):
        raise InputError(f'on_error must be "raise" or "return", not {on_error!r}')
    return StreamOptions(
        follow=follow,
        window=window,
        return_errors=on_error == "return",
        answer_timeout_s=timeout_s,
        resume_timeout_s=resume_timeout_s,
    )


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _iterated(batches: AsyncIterable[Inputs] | Iterable[Inputs]) -> AsyncGenerator[Inputs, None]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch
