"""``modelport.v1.ModelService``: what the status board knows, as messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from modelport.tensors import DTYPES
from modelport.v1 import model_pb2, tensor_pb2
from modelport_registry import TensorSpec
from modelport_server.engines.choice import Attempt
from modelport_server.errors import UnknownNameError
from modelport_server.once import Signal
from modelport_server.rollout.status import ModelStatus, SignatureStatus, StatusBoard, VersionStatus
from modelport_server.rpc._grpc import Context, generic_handler
from modelport_server.rpc._requests import check_name, first_of, parse
from modelport_server.rpc.status import abort, guarded

SERVICE = "modelport.v1.ModelService"


class ModelService:
    """Answers from the status board.

    Args:
        board: what there is to know.
    """

    def __init__(self, board: StatusBoard) -> None:
        self._board = board
        self._drain = Signal()

    def handlers(self) -> Any:
        """Returns the service's methods for ``GrpcServer.add_generic_rpc_handlers``."""
        unary = {"ListModels": self._list_models, "GetModel": self._get_model}
        return generic_handler(SERVICE, unary=unary, answer_streams={"WatchModels": self._watch_models})

    def drain(self) -> None:
        """Ends every watch."""
        self._drain.set()

    async def _list_models(self, raw: bytes, context: Context) -> bytes | None:
        async def work() -> bytes:
            parse(model_pb2.ListModelsRequest, raw)
            models = [_model(status) for status in self._board.models()]
            return model_pb2.ListModelsResponse(models=models).SerializeToString()

        return await guarded(context, work())

    async def _get_model(self, raw: bytes, context: Context) -> bytes | None:
        async def work() -> bytes:
            request = parse(model_pb2.GetModelRequest, raw)
            return model_pb2.GetModelResponse(model=_model(self._find(request.model))).SerializeToString()

        return await guarded(context, work())

    async def _watch_models(self, raw: bytes, context: Context) -> AsyncIterator[bytes]:
        drained = asyncio.Event()
        unsubscribe = self._drain.subscribe(drained.set)
        try:
            wanted = parse(model_pb2.WatchModelsRequest, raw).model
            if wanted:
                check_name(wanted)
            async for name, status in self._news(wanted, drained):
                yield _watch_response(name, status).SerializeToString()
        except Exception as error:  # status_of logs what it does not know
            await abort(context, error)
        finally:
            unsubscribe()

    async def _news(self, wanted: str, drained: asyncio.Event) -> AsyncIterator[tuple[str, ModelStatus | None]]:
        edition, told = 0, False
        while not drained.is_set():
            news = self._board.since(edition)
            edition = self._board.edition
            for name, status in news:
                if wanted in ("", name) and (status is not None or told):
                    yield name, status
            told = True
            await first_of(drained.wait(), self._board.wait(edition))

    def _find(self, name: str) -> ModelStatus:
        status = self._board.model(name)
        if status is None:
            check_name(name)
            raise UnknownNameError.of_model(name, (model.name for model in self._board.models()))
        return status


def _watch_response(name: str, status: ModelStatus | None) -> model_pb2.WatchModelsResponse:
    if status is None:
        return model_pb2.WatchModelsResponse(model=model_pb2.Model(name=name), removed=True)
    return model_pb2.WatchModelsResponse(model=_model(status))


def _model(status: ModelStatus) -> model_pb2.Model:
    return model_pb2.Model(
        name=status.name,
        serving_version=status.serving or 0,
        aliases=status.aliases,
        versions=[_version(version) for version in status.versions],
    )


def _version(status: VersionStatus) -> model_pb2.ModelVersion:
    message = model_pb2.ModelVersion(
        version=status.version,
        state=model_pb2.ModelVersion.State.Value(f"STATE_{status.state.name}"),
        reason=status.reason,
        engine=status.engine,
        engines=[_attempt(attempt) for attempt in status.engines],
        instances=status.parallelism.instances if status.parallelism is not None else 0,
        threads=status.parallelism.threads if status.parallelism is not None else 0,
        max_batch_size=status.max_batch_size,
        golden_examples=status.golden_examples,
        signatures=[_signature(signature) for signature in status.signatures],
        metrics=status.metrics,
    )
    message.since.FromDatetime(status.since)
    return message


def _attempt(attempt: Attempt) -> model_pb2.EngineAttempt:
    return model_pb2.EngineAttempt(engine=attempt.engine, reason=attempt.reason, row_ms=attempt.row_ms)


def _signature(status: SignatureStatus) -> model_pb2.Signature:
    return model_pb2.Signature(
        name=status.spec.name,
        inputs=[_tensor(spec) for spec in status.spec.inputs],
        outputs=[_tensor(spec) for spec in status.spec.outputs],
        batched=status.batched,
    )


def _tensor(spec: TensorSpec) -> model_pb2.TensorSpec:
    number = DTYPES[spec.dtype].number if spec.dtype in DTYPES else 0
    return model_pb2.TensorSpec(
        name=spec.name,
        dtype=tensor_pb2.DataType.Name(number),  # type: ignore[arg-type]
        shape=[-1 if size is None else size for size in spec.shape or ()],
        unknown_rank=spec.shape is None,
    )
