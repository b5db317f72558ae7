"""A real grpc.aio server with answers that a test scripts; it runs numpy, no model."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import numpy as np

from modelport import tensors
from modelport.v1 import model_pb2, prediction_pb2, rollout_pb2, tensor_pb2

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

Request = prediction_pb2.PredictRequest
StreamRequest = prediction_pb2.PredictStreamRequest
StreamResponse = prediction_pb2.PredictStreamResponse
Context = Any  # grpc.aio.ServicerContext, whose stubs are generic in what raw bytes handlers don't have
Run = Callable[["Arrays", int], "Arrays"]

DEFAULT_OPTIONS = [
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
]


class RefusalError(Exception):
    """Raised by a script: the call gets this status; in a stream, in-band."""

    def __init__(self, code: grpc.StatusCode, text: str = "refused", retry_after_ms: int | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.retry_after_ms = retry_after_ms


def spec(name: str, dtype: str, *shape: int) -> model_pb2.TensorSpec:
    """Returns an input or output of a signature; -1 is a free dimension."""
    number = cast("tensor_pb2.DataType.ValueType", tensors.DTYPES[dtype].number)
    return model_pb2.TensorSpec(name=name, dtype=number, shape=shape)


def signature(
    inputs: list[model_pb2.TensorSpec], outputs: list[model_pb2.TensorSpec], *, batched: bool = True
) -> model_pb2.Signature:
    """Returns a signature named serving_default."""
    return model_pb2.Signature(name="serving_default", inputs=inputs, outputs=outputs, batched=batched)


DOUBLER = signature([spec("x", "float32", -1)], [spec("y", "float32", -1), spec("version", "int64", -1)])


def doubled(inputs: Arrays, version: int) -> Arrays:
    """The default model: y = 2 x, and which version said so."""
    x = inputs["x"]
    return {"y": 2 * x, "version": np.full(x.shape[:1], version, np.int64)}


@dataclass
class FakeServer:
    """A server of one model, ``m`` by default; use it as ``async with``.

    ``on_request`` sees every request before it is answered and may raise RefusalError, wait, or return a
    message to send in place of the answer. Streams can be told to end by ``drain`` and ``retire``.
    """

    versions: set[int] = field(default_factory=lambda: {1})
    serving: int = 1
    aliases: dict[str, int] = field(default_factory=dict[str, int])
    sign: model_pb2.Signature = field(default_factory=lambda: DOUBLER)
    run: Run = doubled
    on_request: Callable[[Request], Awaitable[StreamResponse | None]] | None = None
    on_open: Callable[[Context], Awaitable[None]] | None = None
    address: str = "127.0.0.1:0"
    name: str = "m"
    options: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])
    credentials: grpc.ServerCredentials | None = None

    rollout: rollout_pb2.RolloutStatus | None = None
    """What the rollout service says; None for that ``serving`` is in charge."""
    policy: rollout_pb2.RolloutPolicy = field(default_factory=rollout_pb2.RolloutPolicy)
    changes: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])
    """The rollout service's changes that were asked for: the method and its request."""

    requests: list[Request] = field(default_factory=list[Request])
    messages: list[int] = field(default_factory=list[int])
    """How many requests each PredictMany had."""
    knows_many: bool = True
    """Whether it has PredictMany; else it says what a server without it says."""
    streams: int = 0
    open_streams: int = 0
    healthy: bool = True

    def __post_init__(self) -> None:
        self._server: Any = None
        self._notices: list[asyncio.Queue[prediction_pb2.StreamNotice]] = []
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    async def start(self) -> None:
        """Starts to listen; after a ``kill``, again at the address it had."""
        self._server = cast("Any", grpc.aio).server(options=[*DEFAULT_OPTIONS, *self.options])
        self._server.add_generic_rpc_handlers(self._handlers())
        if self.credentials is None:
            port = self._server.add_insecure_port(self.address)
        else:
            port = self._server.add_secure_port(self.address, self.credentials)
        if not self.address.startswith("unix:"):
            self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def kill(self) -> None:
        """Stops at once, in the middle of everything."""
        self._notices.clear()
        await self._server.stop(0)

    async def stop(self, grace_s: float) -> None:
        """Stops to accept calls, and ends after the last one."""
        await self._server.stop(grace_s)

    def drain(self) -> None:
        """Tells every stream that the server is going to stop."""
        self._notify(prediction_pb2.StreamNotice.REASON_DRAINING)

    def retire(self, version: int, successor: int) -> None:
        """Takes a version out of service and tells its streams."""
        self.versions = (self.versions - {version}) | {successor}
        self.serving = successor
        self._notify(prediction_pb2.StreamNotice.REASON_VERSION_RETIRED)

    def publish(self, version: int) -> None:
        """Puts another version in charge; the ones before stay."""
        self.versions.add(version)
        self.serving = version

    async def seen(self, count: int) -> None:
        """Waits until ``count`` requests have come."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.requests) >= count)

    async def streams_ended(self) -> None:
        """Waits until no stream is open."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.open_streams == 0)

    async def model_changed(self) -> None:
        """Lets watchers see what was changed."""
        async with self._changed:
            self._changed.notify_all()

    def _notify(self, reason: prediction_pb2.StreamNotice.Reason.ValueType) -> None:
        for queue in self._notices:
            queue.put_nowait(prediction_pb2.StreamNotice(reason=reason, message="said the test"))

    def _handlers(self) -> Any:
        raw = cast("Any", grpc)  # the handlers get and give bytes, which its stubs know nothing of
        prediction = {
            "Predict": raw.unary_unary_rpc_method_handler(self._predict),
            "PredictStream": raw.stream_stream_rpc_method_handler(self._predict_stream),
            "PredictMany": raw.unary_stream_rpc_method_handler(self._predict_many),
        }
        models = {
            "GetModel": raw.unary_unary_rpc_method_handler(self._get_model),
            "ListModels": raw.unary_unary_rpc_method_handler(self._list_models),
            "WatchModels": raw.unary_stream_rpc_method_handler(self._watch_models),
        }
        health = {
            "Check": raw.unary_unary_rpc_method_handler(self._check),
            "Watch": raw.unary_stream_rpc_method_handler(self._watch_health),
        }
        return (
            raw.method_handlers_generic_handler("modelport.v1.PredictionService", prediction),
            raw.method_handlers_generic_handler("modelport.v1.ModelService", models),
            raw.method_handlers_generic_handler("modelport.v1.RolloutService", self._rollout_handlers()),
            raw.method_handlers_generic_handler("grpc.health.v1.Health", health),
        )

    def _rollout_handlers(self) -> dict[str, Any]:
        raw = cast("Any", grpc)
        service = rollout_pb2.DESCRIPTOR.services_by_name["RolloutService"]
        handlers = {
            name: raw.unary_unary_rpc_method_handler(self._changing(name))
            for name in service.methods_by_name
            if name.startswith(("Start", "Pause", "Resume", "Promote", "Rollback", "Approve", "Pin", "Unpin", "Set"))
        }
        return handlers | {
            "GetRollout": raw.unary_unary_rpc_method_handler(self._get_rollout),
            "WatchRollout": raw.unary_stream_rpc_method_handler(self._watch_rollout),
            "GetPolicy": raw.unary_unary_rpc_method_handler(self._get_policy),
            "ReadJournal": raw.unary_unary_rpc_method_handler(self._read_journal),
        }

    def _changing(self, method: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def change(message: bytes, context: Context) -> bytes:
            request = getattr(rollout_pb2, f"{method}Request").FromString(message)
            await self._check_model(request.model, context)
            self.changes.append((method, request))
            candidate = getattr(request, "version", 0)
            state = rollout_pb2.DesiredState(
                generation=len(self.changes),
                stable_version=self.serving,
                candidate_version=candidate,
                phase=rollout_pb2.PHASE_GATES if candidate else rollout_pb2.PHASE_UNSPECIFIED,
            )
            answer: bytes = getattr(rollout_pb2, f"{method}Response")(state=state).SerializeToString()
            return answer

        return change

    async def _get_rollout(self, message: bytes, context: Context) -> bytes:
        await self._check_model(rollout_pb2.GetRolloutRequest.FromString(message).model, context)
        return rollout_pb2.GetRolloutResponse(status=self._rollout_status()).SerializeToString()

    async def _watch_rollout(self, message: bytes, context: Context) -> AsyncIterator[bytes]:
        await self._check_model(rollout_pb2.WatchRolloutRequest.FromString(message).model, context)
        while True:
            told = self._rollout_status()
            yield rollout_pb2.WatchRolloutResponse(status=told).SerializeToString()
            async with self._changed:
                await self._changed.wait_for(lambda told=told: self._rollout_status() != told)  # type: ignore[misc]

    async def _get_policy(self, message: bytes, context: Context) -> bytes:
        await self._check_model(rollout_pb2.GetPolicyRequest.FromString(message).model, context)
        return rollout_pb2.GetPolicyResponse(policy=self.policy).SerializeToString()

    async def _read_journal(self, message: bytes, context: Context) -> bytes:
        entries = [
            rollout_pb2.JournalEntry(action=method, actor="somebody", reason=getattr(request, "reason", ""))
            for method, request in reversed(self.changes)
        ]
        return rollout_pb2.ReadJournalResponse(entries=entries).SerializeToString()

    async def _check_model(self, model: str, context: Context) -> None:
        if model != self.name:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no model {model!r}")

    def _rollout_status(self) -> rollout_pb2.RolloutStatus:
        return self.rollout or rollout_pb2.RolloutStatus(model=self.name, stable_version=self.serving)

    async def _predict(self, message: bytes, context: Context) -> bytes:
        request = Request.FromString(message)
        try:
            version = self.resolve(request, None)
            return (await self.answer(request, version)).response.SerializeToString()
        except RefusalError as refusal:
            if refusal.retry_after_ms is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(refusal.retry_after_ms)),))
            await context.abort(refusal.code, refusal.text)
            raise

    async def _predict_many(self, message: bytes, context: Context) -> AsyncIterator[bytes]:
        many = prediction_pb2.PredictManyRequest.FromString(message)
        self.messages.append(len(many.requests))
        if not self.knows_many:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        tasks = [asyncio.create_task(self._result(n, joined)) for n, joined in enumerate(many.requests)]
        try:
            for ended in asyncio.as_completed(tasks):
                yield prediction_pb2.PredictManyResponse(results=[await ended]).SerializeToString()
        finally:
            for task in tasks:
                task.cancel()

    async def _result(self, index: int, joined: prediction_pb2.JoinedRequest) -> prediction_pb2.JoinedResult:
        request = joined.request
        try:
            async with asyncio.timeout(joined.timeout_us / 1e6 or None):
                response = (await self.answer(request, self.resolve(request, None))).response
            return prediction_pb2.JoinedResult(index=index, response=response)
        except TimeoutError:
            refused = RefusalError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        except RefusalError as refusal:
            refused = refusal
        return prediction_pb2.JoinedResult(index=index, error=error(request.sequence, refused).error)

    async def _predict_stream(self, messages: AsyncIterator[bytes], context: Context) -> None:
        self.streams += 1
        self.open_streams += 1
        notices: asyncio.Queue[prediction_pb2.StreamNotice] = asyncio.Queue()
        self._notices.append(notices)
        stream = _Stream(self, context, notices)
        try:
            if self.on_open:
                await self.on_open(context)
            await stream.run(messages)
        finally:
            self.open_streams -= 1
            if notices in self._notices:
                self._notices.remove(notices)
            async with self._changed:
                self._changed.notify_all()

    def resolve(self, request: Request, pinned: int | None) -> int:
        """Returns the version that answers."""
        if pinned is not None:
            return pinned
        choice = request.WhichOneof("version_choice")
        if choice == "version":
            version = request.version
        elif choice == "alias":
            version = self.aliases.get(request.alias, 0)
        else:
            version = self.serving
        if version not in self.versions:
            raise RefusalError(grpc.StatusCode.NOT_FOUND, f"{self.name} has no version {version}")
        return version

    async def answer(self, request: Request, version: int) -> StreamResponse:
        """Returns what the script says, or the model."""
        self.requests.append(request)
        async with self._changed:
            self._changed.notify_all()
        scripted = await self.on_request(request) if self.on_request else None
        if scripted is not None:
            return scripted
        outputs = self.run({t.name: tensors.decode(t) for t in request.inputs}, version)
        wanted = list(request.outputs) or list(outputs)
        response = prediction_pb2.PredictResponse(
            model=self.name,
            version=version,
            sequence=request.sequence,
            outputs=[tensors.encode(name, outputs[name]) for name in wanted],
            queue_time_us=1500,
            engine_time_us=2500,
        )
        return StreamResponse(response=response)

    def model(self) -> model_pb2.Model:
        """Returns the model as ModelService describes it."""
        available = model_pb2.ModelVersion.STATE_AVAILABLE
        versions = [
            model_pb2.ModelVersion(version=v, state=available, signatures=[self.sign], metrics={"accuracy": 0.5})
            for v in sorted(self.versions, reverse=True)
        ]
        return model_pb2.Model(name=self.name, serving_version=self.serving, aliases=self.aliases, versions=versions)

    async def _get_model(self, message: bytes, context: Context) -> bytes:
        request = model_pb2.GetModelRequest.FromString(message)
        if request.model != self.name:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no model {request.model!r}")
        return model_pb2.GetModelResponse(model=self.model()).SerializeToString()

    async def _list_models(self, message: bytes, context: Context) -> bytes:
        return model_pb2.ListModelsResponse(models=[self.model()]).SerializeToString()

    async def _watch_models(self, message: bytes, context: Context) -> AsyncIterator[bytes]:
        while True:
            told = self.serving  # not after it was told: it may have changed by then, unseen
            yield model_pb2.WatchModelsResponse(model=self.model()).SerializeToString()
            await self._serves_other_than(told)

    async def _serves_other_than(self, version: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.serving != version)

    async def _check(self, message: bytes, context: Context) -> bytes:
        return b"\x08\x01" if self.healthy else b"\x08\x02"

    async def _watch_health(self, message: bytes, context: Context) -> AsyncIterator[bytes]:
        yield await self._check(message, context)
        await asyncio.Event().wait()


class _Stream:
    """One PredictStream call at the fake server."""

    def __init__(
        self, server: FakeServer, context: Context, notices: asyncio.Queue[prediction_pb2.StreamNotice]
    ) -> None:
        self._server = server
        self._context = context
        self._notices = notices
        self._first: StreamRequest | None = None
        self._pinned: int | None = None
        self._writing = asyncio.Lock()

    async def run(self, messages: AsyncIterator[bytes]) -> None:
        """Answers until the client has half-closed or the version is retired."""
        notifier = asyncio.create_task(self._notify())
        answering = asyncio.create_task(self._answer_all(messages))
        try:
            await asyncio.wait({notifier, answering}, return_when=asyncio.FIRST_COMPLETED)
            for task in (notifier, answering):
                if task.done():
                    task.result()
        finally:
            for task in (notifier, answering):
                task.cancel()
            await asyncio.gather(notifier, answering, return_exceptions=True)

    async def _notify(self) -> None:
        """Passes notices on; ends when the stream has to."""
        while True:
            notice = await self._notices.get()
            await self._write(StreamResponse(notice=notice))
            if notice.reason == prediction_pb2.StreamNotice.REASON_VERSION_RETIRED:
                return

    async def _answer_all(self, messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            response = await self._answer(StreamRequest.FromString(message))
            await self._write(response)

    async def _write(self, response: StreamResponse) -> None:
        async with self._writing:
            await self._context.write(response.SerializeToString())

    async def _answer(self, message: StreamRequest) -> StreamResponse:
        request = message.request
        if self._first is None:
            self._first = message
        first = self._first.request
        if first.HasField("version") and not request.WhichOneof("version_choice"):
            request.version = first.version
        if first.HasField("alias") and not request.WhichOneof("version_choice"):
            request.alias = first.alias
        try:
            version = self._server.resolve(request, self._pinned)
            if not self._first.follow:
                self._pinned = version
            return await self._server.answer(request, version)
        except RefusalError as refusal:
            return error(request.sequence, refusal)


def error(sequence: int, refusal: RefusalError) -> StreamResponse:
    """Returns an in-band error."""
    return StreamResponse(
        error=prediction_pb2.StreamError(
            sequence=sequence,
            code=refusal.code.value[0],
            message=refusal.text,
            retry_after_ms=refusal.retry_after_ms or 0,
        )
    )


class Proxy:
    """Passes bytes between clients and a server; cuts connections when told. Use it as ``async with``."""

    def __init__(self, upstream: Callable[[], str]) -> None:
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = itertools.count()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        """Where the proxy listens."""
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Breaks every connection, without a goodbye."""
        for link in self._links:
            link.transport.abort()
        self._links.clear()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._upstream().rpartition(":")
        try:
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._links |= {writer, up_writer}
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.transport.abort()
