"""``modelport.v1.PredictionService``: decode, let the servable answer, encode.

The handlers take and give raw bytes and parse by themselves: in a stream, a message that can't be read is answered by
an error of its own, and does not end all of it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from modelport_server.batching.calls import Answer
from modelport_server.errors import CallerGoneError
from modelport_server.once import Signal
from modelport_server.options import RpcOptions
from modelport_server.routing import Router
from modelport_server.rpc._grpc import Context, deadline_of, generic_handler
from modelport_server.rpc.codec import Request, packed, parse_predict, to_request, to_response
from modelport_server.rpc.many import PredictMany
from modelport_server.rpc.status import fail, guarded
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
        """Returns the service's methods for ``GrpcServer.add_generic_rpc_handlers``."""
        streams = {"PredictStream": self._predict_stream}
        many = {"PredictMany": self._predict_many}
        return generic_handler(SERVICE, unary={"Predict": self._predict}, streams=streams, answer_streams=many)

    def drain(self) -> None:
        """Asks the callers of all streams to go elsewhere."""
        self._drain.set()

    def _predict(self, raw: bytes, context: Context) -> None:
        """Begins a call. No task is made for it: what ends its future ends it, and the other way round."""
        try:
            request = to_request(parse_predict(raw), len(raw))
            servable = self._router.resolve(
                request.model, version=request.version, alias=request.alias, key=request.routing_key
            )
            call = servable.prepare(request.signature, request.inputs, request.outputs, deadline_of(context))
        except Exception as error:  # status_of logs what it does not know
            fail(context, error)
            return
        call.movable = request.version is None and request.alias is None
        servable.acquire()
        call.future.add_done_callback(partial(self._on_answer, request, servable, context))
        context.add_done_callback(partial(_give_up, call.future))
        try:
            servable.submit(call)
        except Exception as error:
            call.fail(error)

    def _on_answer(
        self, request: Request, servable: Servable, context: Context, future: asyncio.Future[Answer]
    ) -> None:
        servable.release()
        if future.cancelled():
            fail(context, CallerGoneError("the call was given up"))
            return
        error = future.exception()
        if error is None:
            try:
                response = to_response(request.model, future.result(), request.outputs, request.sequence)
                message = packed(response, self._options.max_message_bytes)
            except Exception as failure:  # else its caller would never hear of it
                error = failure
            else:
                context.answer(message)
                return
        fail(context, error)

    async def _predict_stream(self, _: object, context: Context) -> None:
        await guarded(context, self._serve_stream(context))

    async def _serve_stream(self, context: Context) -> None:
        await PredictStream(self._router, self._options, self._drain, context).serve()

    async def _predict_many(self, raw: bytes, context: Context) -> None:
        await guarded(context, self._serve_many(raw, context))

    async def _serve_many(self, raw: bytes, context: Context) -> None:
        await PredictMany(self._router, self._options, context).serve(raw)


def _give_up(future: asyncio.Future[Answer], _: object) -> None:
    """Takes a call out of its queue whose caller is gone, or has its answer."""
    future.cancel()
