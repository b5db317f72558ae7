"""``modelport.v1.RolloutService``: what the status board knows of rollouts, and what the registry is asked for."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from modelport.v1 import rollout_pb2 as pb
from modelport_registry import Registry, State
from modelport_server.errors import NotAllowedError, UnknownNameError
from modelport_server.once import Signal
from modelport_server.rollout.status import RolloutStatus, StatusBoard
from modelport_server.rpc._grpc import Context, generic_handler
from modelport_server.rpc._requests import check_name, first_of, parse
from modelport_server.rpc._rollout_messages import (
    entry_message,
    policy_message,
    policy_of,
    state_message,
    status_message,
    strategies_of,
)
from modelport_server.rpc.status import abort, guarded

SERVICE = "modelport.v1.RolloutService"

_TELL_S = 1.0
"""How often a watch is told the figures, whatever happens."""
_LOOK_S = 0.1
"""How often it is looked whether something has changed that the board does not announce."""
_JOURNAL_ENTRIES = 100
_MOST_JOURNAL_ENTRIES = 1000


class RolloutService:
    """Answers from the status board, and passes changes on to the registry.

    Args:
        board: what there is to know.
        registry: where changes are made.
        allow_changes: whether callers may change anything.
    """

    def __init__(self, board: StatusBoard, registry: Registry, *, allow_changes: bool) -> None:
        self._board = board
        self._registry = registry
        self._allow_changes = allow_changes
        self._drain = Signal()

    def handlers(self) -> Any:
        """Returns the service's methods for ``GrpcServer.add_generic_rpc_handlers``."""
        unary: dict[str, Any] = {change.method: self._changing(change) for change in _CHANGES}
        unary |= {"GetRollout": self._get_rollout, "GetPolicy": self._get_policy, "ReadJournal": self._read_journal}
        return generic_handler(SERVICE, unary=unary, answer_streams={"WatchRollout": self._watch_rollout})

    def drain(self) -> None:
        """Ends every watch."""
        self._drain.set()

    async def _get_rollout(self, raw: bytes, context: Context) -> bytes | None:
        async def work() -> bytes:
            status = self._find(parse(pb.GetRolloutRequest, raw).model)
            return pb.GetRolloutResponse(status=status_message(status)).SerializeToString()

        return await guarded(context, work())

    async def _watch_rollout(self, raw: bytes, context: Context) -> AsyncIterator[bytes]:
        drained = asyncio.Event()
        unsubscribe = self._drain.subscribe(drained.set)
        try:
            model = parse(pb.WatchRolloutRequest, raw).model
            async for status in self._news(model, drained):
                yield pb.WatchRolloutResponse(status=status_message(status)).SerializeToString()
        except Exception as error:  # status_of logs what it does not know
            await abort(context, error)
        finally:
            unsubscribe()

    async def _news(self, model: str, drained: asyncio.Event) -> AsyncIterator[RolloutStatus]:
        told: RolloutStatus | None = None
        told_at = 0.0
        while not drained.is_set():
            edition = self._board.edition
            status = self._find(model)
            outline = _outline(status)
            if outline != told or monotonic() >= told_at + _TELL_S:
                told, told_at = outline, monotonic()
                yield status
            await first_of(drained.wait(), self._board.wait(edition), timeout_s=_LOOK_S)

    async def _get_policy(self, raw: bytes, context: Context) -> bytes | None:
        async def work() -> bytes:
            model = parse(pb.GetPolicyRequest, raw).model
            state = await self._in_registry(model, lambda: self._registry.state(model))
            policy = policy_message(state.policy)
            return pb.GetPolicyResponse(policy=policy, state=state_message(state)).SerializeToString()

        return await guarded(context, work())

    async def _read_journal(self, raw: bytes, context: Context) -> bytes | None:
        async def work() -> bytes:
            request = parse(pb.ReadJournalRequest, raw)
            limit = min(request.limit or _JOURNAL_ENTRIES, _MOST_JOURNAL_ENTRIES)
            entries = await self._in_registry(request.model, lambda: self._registry.journal(request.model))
            newest = [entry_message(entry) for entry in entries[: -limit - 1 : -1]]
            return pb.ReadJournalResponse(entries=newest).SerializeToString()

        return await guarded(context, work())

    def _changing(self, change: _Change) -> Callable[[bytes, Context], Any]:
        async def handler(raw: bytes, context: Context) -> bytes | None:
            async def work() -> bytes:
                self._check_allowed()
                request = parse(change.request, raw)
                options = {"reason": request.reason, "actor": f"grpc:{context.peer()}"}
                if request.HasField("expected_generation"):
                    options["expected_generation"] = request.expected_generation
                state = await self._in_registry(request.model, lambda: change.make(self._registry, request, options))
                answer: bytes = change.response(state=state_message(state)).SerializeToString()
                return answer

            return await guarded(context, work())

        return handler

    async def _in_registry(self, model: str, work: Callable[[], Any]) -> Any:
        """Returns what ``work`` does, done in a thread: the disk may be slow."""
        check_name(model)

        def checked() -> Any:
            if not self._registry.versions(model):
                raise UnknownNameError(f"there is no model {model!r}")
            return work()

        return await asyncio.to_thread(checked)

    def _check_allowed(self) -> None:
        if not self._allow_changes:
            raise NotAllowedError(
                "this server listens beyond its own machine and lets nobody change rollouts; "
                "start it with --allow-control, or change the registry itself: "
                "modelport rollout COMMAND MODEL --registry DIR"
            )

    def _find(self, model: str) -> RolloutStatus:
        status = self._board.rollout(model)
        if status is None:
            check_name(model)
            raise UnknownNameError.of_model(model, self._board.rollouts)
        return status


def _outline(status: RolloutStatus) -> RolloutStatus:
    """Returns a status without what changes with every call."""
    versions = tuple(dataclasses.replace(version, traffic=None) for version in status.versions)
    return dataclasses.replace(status, phase_age_s=0.0, verdict="", figures={}, versions=versions)


@dataclass(frozen=True, slots=True)
class _Change:
    """A method that changes what the registry asks for."""

    method: str
    request: Any
    response: Any
    make: Callable[[Registry, Any, dict[str, Any]], State]


def _start(registry: Registry, request: pb.StartRolloutRequest, options: dict[str, Any]) -> State:
    strategy = strategies_of(request.strategy) or None
    return registry.start_rollout(request.model, request.version, strategy=strategy, **options)


def _pause(registry: Registry, request: pb.PauseRolloutRequest, options: dict[str, Any]) -> State:
    return registry.pause_rollout(request.model, **options)


def _resume(registry: Registry, request: pb.ResumeRolloutRequest, options: dict[str, Any]) -> State:
    return registry.resume_rollout(request.model, **options)


def _promote(registry: Registry, request: pb.PromoteRolloutRequest, options: dict[str, Any]) -> State:
    return registry.promote(request.model, **options)


def _roll_back(registry: Registry, request: pb.RollbackRolloutRequest, options: dict[str, Any]) -> State:
    return registry.rollback(request.model, **options)


def _approve(registry: Registry, request: pb.ApproveVersionRequest, options: dict[str, Any]) -> State:
    return registry.approve(request.model, request.version, **options)


def _pin(registry: Registry, request: pb.PinVersionRequest, options: dict[str, Any]) -> State:
    return registry.pin(request.model, request.version or None, **options)


def _unpin(registry: Registry, request: pb.UnpinVersionRequest, options: dict[str, Any]) -> State:
    return registry.unpin(request.model, **options)


def _set_policy(registry: Registry, request: pb.SetPolicyRequest, options: dict[str, Any]) -> State:
    return registry.set_policy(request.model, policy_of(request.policy), **options)


_CHANGES = (
    _Change("StartRollout", pb.StartRolloutRequest, pb.StartRolloutResponse, _start),
    _Change("PauseRollout", pb.PauseRolloutRequest, pb.PauseRolloutResponse, _pause),
    _Change("ResumeRollout", pb.ResumeRolloutRequest, pb.ResumeRolloutResponse, _resume),
    _Change("PromoteRollout", pb.PromoteRolloutRequest, pb.PromoteRolloutResponse, _promote),
    _Change("RollbackRollout", pb.RollbackRolloutRequest, pb.RollbackRolloutResponse, _roll_back),
    _Change("ApproveVersion", pb.ApproveVersionRequest, pb.ApproveVersionResponse, _approve),
    _Change("PinVersion", pb.PinVersionRequest, pb.PinVersionResponse, _pin),
    _Change("UnpinVersion", pb.UnpinVersionRequest, pb.UnpinVersionResponse, _unpin),
    _Change("SetPolicy", pb.SetPolicyRequest, pb.SetPolicyResponse, _set_policy),
)
