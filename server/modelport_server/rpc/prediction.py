"""``modelport.v1.PredictionService``: decode, let the servable answer, encode.

The handlers take and give raw bytes and parse by themselves: gRPC answers UNKNOWN when a deserialiser
of its own fails, and in a stream it would end all of it.
"""

from __future__ import annotations

from typing import Any

from modelport_server.batching.calls import Answer, Call
from modelport_server.once import Signal
from modelport_server.options import RpcOptions
from modelport_server.routing import Router
from modelport_server.rpc._grpc import Context, deadline_of, generic_handler
from modelport_server.rpc.codec import Request, packed, parse_predict, to_request, to_response
from modelport_server.rpc.many import PredictMany
from modelport_server.rpc.status import guarded
from modelport_server.rpc.streams import PredictStream
from modelport_server.servable import Servable

SERVICE = "modelport.v1.PredictionService"


class PredictionService:
    """Answers Predict, PredictStream and PredictMany.

    Args:
        router: finds the servable.
        options: bounds of streams.
    """

    def __init__(self, router: Router, options: RpcOptions) -> None:
        self._router = router
        self._options = options
        self._drain = Signal()

    def handlers(self) -> Any:
        """Returns the service's methods for ``grpc.aio.Server.add_generic_rpc_handlers``."""
        streams = {"PredictStream": self._predict_stream}
        many = {"PredictMany": self._predict_many}
        return generic_handler(SERVICE, unary={"Predict": self._predict}, streams=streams, answer_streams=many)

    def drain(self) -> None:
        """Asks the callers of all streams to go elsewhere."""
        self._drain.set()

    async def _predict(self, raw: bytes, context: Context) -> bytes | None:
        return await guarded(context, self._answer(raw, context))

    async def _answer(self, raw: bytes, context: Context) -> bytes:
        request = to_request(parse_predict(raw), len(raw))
        servable = self._router.resolve(
            request.model, version=request.version, alias=request.alias, key=request.routing_key
        )
        answer = await _run(servable, request, deadline_of(context))
        response = to_response(request.model, answer, request.outputs, request.sequence)
        return packed(response, self._options.max_message_bytes)

    async def _predict_stream(self, _: object, context: Context) -> None:
        await guarded(context, self._serve_stream(context))

    async def _serve_stream(self, context: Context) -> None:
        await PredictStream(self._router, self._options, self._drain, context).serve()

    async def _predict_many(self, raw: bytes, context: Context) -> None:
        await guarded(context, self._serve_many(raw, context))

    async def _serve_many(self, raw: bytes, context: Context) -> None:
        await PredictMany(self._router, self._options, context).serve(raw)


async def _run(servable: Servable, request: Request, deadline: float) -> Answer:
    """Runs a call and returns its answer; cancelling it takes it out of the queue."""
    servable.acquire()
    try:
        call: Call = servable.prepare(request.signature, request.inputs, request.outputs, deadline)
        call.movable = request.version is None and request.alias is None
        servable.submit(call)
        return await call.future
    finally:
        servable.release()
