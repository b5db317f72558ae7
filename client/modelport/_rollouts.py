"""``client.rollouts``: how versions come into service, and how people steer that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar, Unpack

from modelport import progress
from modelport._models import VersionState
from modelport._rollout_types import (
    JournalRecord,
    Rollout,
    RolloutInfo,
    RolloutPolicy,
    RolloutState,
    journal_record,
    policy_message,
    rollout_info,
    rollout_policy,
    rollout_state,
    strategy_numbers,
)
from modelport._threads import LoopThread
from modelport.exceptions import NotFoundError, RolloutError, RolloutTimeoutError, VersionRejectedError
from modelport.v1 import rollout_pb2 as pb

if TYPE_CHECKING:
    from modelport.v1.rollout_pb2_grpc import RolloutServiceAsyncStub

T = TypeVar("T")
Progress = Callable[[str], None]
Strategy = str | Sequence[str] | None

_SEEN_WITHIN_S = 10.0
"""How long a server may take to see a model that was published just now."""
_NOT_SEEN_WAIT_S = 0.1


class ChangeOptions(TypedDict, total=False):
    """What every change takes besides, by name."""

    reason: str
    """Why, for the journal."""
    expected_generation: int | None
    """Change nothing unless the registry's state has this one."""
    timeout_s: float | None
    """How long the call may take, in seconds; None for the client's own."""


class Calls(Protocol):
    """What a client lends: calls with its deadlines and retries, and watches that outlive connections."""

    async def call(
        self, method: Callable[[RolloutServiceAsyncStub], Any], request: Any, timeout_s: float | None
    ) -> Any:
        """Makes a unary call."""
        ...

    def follow(self, method: Callable[[RolloutServiceAsyncStub], Any], request: Any) -> AsyncGenerator[Any, None]:
        """Yields the answers of a stream, which is opened again when its connection breaks."""
        ...


class AsyncRollouts:
    """Rollouts as a server sees them, from asyncio; an ``AsyncClient`` has it as ``rollouts``.

    What should be so is kept in the registry, so that a change holds for all of its servers. Every
    change takes ``ChangeOptions``; with ``expected_generation`` it is refused with AbortedError if the
    registry's state has another one by now. All methods raise RpcError where the server refuses:
    NotFoundError for an unknown model or version, FailedPreconditionError for what makes no sense now,
    PermissionDeniedError where the server lets nobody change anything.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def get(self, model: str, *, timeout_s: float | None = None) -> RolloutInfo:
        """Returns how a model's rollout stands."""
        request = pb.GetRolloutRequest(model=model)
        response = await self._calls.call(lambda stub: stub.GetRollout, request, timeout_s)
        return rollout_info(response.status)

    async def watch(self, model: str) -> AsyncGenerator[RolloutInfo, None]:
        """Yields a model's rollout at once, whenever it has changed, and about every second.

        Goes on over broken connections, and does not end by itself.
        """
        answers = self._calls.follow(lambda stub: stub.WatchRollout, pb.WatchRolloutRequest(model=model))
        async with aclosing(answers):
            async for answer in answers:
                yield rollout_info(answer.status)

    async def start(
        self, model: str, version: int, *, strategy: Strategy = None, **options: Unpack[ChangeOptions]
    ) -> RolloutState:
        """Makes a version the candidate, whatever the model's policy says.

        Args:
            model: the model's name.
            version: the candidate; one that was rejected has to be approved instead.
            strategy: names such as ``canary``, or joined as in ``shadow+canary``; None for the policy's.
            options: see ``ChangeOptions``.

        Raises:
            InputError: if there is no such strategy.
        """
        numbers = strategy_numbers(strategy)
        request = pb.StartRolloutRequest(model=model, version=version, strategy=numbers, **_common(options))
        return await self._change(lambda stub: stub.StartRollout, request, options)

    async def pause(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Keeps a rollout at its present step; evidence against it still counts."""
        request = pb.PauseRolloutRequest(model=model, **_common(options))
        return await self._change(lambda stub: stub.PauseRollout, request, options)

    async def resume(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Lets a paused rollout go on."""
        request = pb.ResumeRolloutRequest(model=model, **_common(options))
        return await self._change(lambda stub: stub.ResumeRollout, request, options)

    async def promote(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Drops the steps that remain; a candidate that is still in the gates has to pass them."""
        request = pb.PromoteRolloutRequest(model=model, **_common(options))
        return await self._change(lambda stub: stub.PromoteRollout, request, options)

    async def rollback(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Rejects the candidate, or with no rollout under way the version in charge: the one before takes over."""
        request = pb.RollbackRolloutRequest(model=model, **_common(options))
        return await self._change(lambda stub: stub.RollbackRollout, request, options)

    async def approve(self, model: str, version: int, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Forgets that a version was rejected, and makes it the candidate."""
        request = pb.ApproveVersionRequest(model=model, version=version, **_common(options))
        return await self._change(lambda stub: stub.ApproveVersion, request, options)

    async def pin(self, model: str, version: int | None = None, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Puts a version in charge, None for the present one, and lets nothing be rolled out by itself."""
        request = pb.PinVersionRequest(model=model, version=version or 0, **_common(options))
        return await self._change(lambda stub: stub.PinVersion, request, options)

    async def unpin(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Lets newer versions be rolled out again."""
        request = pb.UnpinVersionRequest(model=model, **_common(options))
        return await self._change(lambda stub: stub.UnpinVersion, request, options)

    async def policy(self, model: str, *, timeout_s: float | None = None) -> RolloutPolicy:
        """Returns a model's policy, with every field set."""
        response = await self._calls.call(lambda stub: stub.GetPolicy, pb.GetPolicyRequest(model=model), timeout_s)
        return rollout_policy(response.policy)

    async def state(self, model: str, *, timeout_s: float | None = None) -> RolloutState:
        """Returns what the registry has at this moment; ``get`` says what the server last saw, and what it does."""
        response = await self._calls.call(lambda stub: stub.GetPolicy, pb.GetPolicyRequest(model=model), timeout_s)
        return rollout_state(response.state)

    async def set_policy(self, model: str, policy: RolloutPolicy, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Replaces a model's policy; what is None in it gets its default.

        Raises:
            InputError: if the policy can't be sent.
        """
        request = pb.SetPolicyRequest(model=model, policy=policy_message(policy), **_common(options))
        return await self._change(lambda stub: stub.SetPolicy, request, options)

    async def journal(self, model: str, *, limit: int = 100, timeout_s: float | None = None) -> list[JournalRecord]:
        """Returns what was done to a model, newest first; at most 1000 entries."""
        request = pb.ReadJournalRequest(model=model, limit=limit)
        response = await self._calls.call(lambda stub: stub.ReadJournal, request, timeout_s)
        return [journal_record(entry) for entry in response.entries]

    async def wait_for_version(
        self,
        model: str,
        version: int,
        *,
        timeout_s: float | None = None,
        on_progress: Progress | None = None,
        progress_every_s: float = progress.TELL_EVERY_S,
    ) -> RolloutInfo:
        """Returns as soon as a version is in charge.

        Args:
            model: the model's name; it may have been published this moment.
            version: the version to wait for.
            timeout_s: how long to wait, in seconds; None for as long as it takes.
            on_progress: called with a few words whenever the version has got further.
            progress_every_s: how often, in seconds, it is called within a phase, with how far that is.

        Raises:
            VersionRejectedError: if it is rejected or rolled back, with the gate and the reason.
            RolloutError: if it was replaced, or nothing will make it the candidate by itself.
            RolloutTimeoutError: if none of that has happened in time.
            RpcError: if the server refuses, or can't be reached for as long as retries last.
        """
        teller = progress.Teller(on_progress, progress_every_s)
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                return await self._in_charge(model, version, teller)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise RolloutTimeoutError(
                f"{model} version {version} was not in charge after {timeout_s:g} s: {teller.text}"
            ) from error

    async def _in_charge(self, model: str, version: int, teller: progress.Teller) -> RolloutInfo:
        policy = await self.policy(model)
        async with aclosing(self._soon_known(model)) as statuses:
            async for status in statuses:
                in_charge = is_in_charge(status, version, manual="manual" in policy.strategy)
                teller.tell(phase_text(status, version), figures_text(status, version, policy.min_calls))
                if in_charge:
                    return status
        raise AssertionError("a watch does not end by itself")

    async def _soon_known(self, model: str) -> AsyncGenerator[RolloutInfo, None]:
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while True:
            try:
                async with aclosing(self.watch(model)) as statuses:
                    async for status in statuses:
                        deadline = 0.0
                        yield status
            except NotFoundError:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_NOT_SEEN_WAIT_S)

    async def _change(
        self, method: Callable[[RolloutServiceAsyncStub], Any], request: Any, options: ChangeOptions
    ) -> RolloutState:
        response = await self._calls.call(method, request, options.get("timeout_s"))
        return rollout_state(response.state)


def _common(options: ChangeOptions) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "timeout_s"}


def is_in_charge(status: RolloutInfo, version: int, *, manual: bool) -> bool:
    """Returns whether a version is in charge; False while it may still come to be.

    Raises:
        VersionRejectedError: if it was rejected.
        RolloutError: if it will not come into service by itself, as things stand.
    """
    if status.stable == version:
        return True
    if (rejection := status.rejected.get(version)) is not None:
        raise VersionRejectedError(status.model, version, gate=rejection.gate, reason=rejection.reason)
    if (reason := _hopeless(status, version, manual=manual)) is not None:
        raise RolloutError(f"{status.model} version {version} {reason}")
    return False


def _hopeless(status: RolloutInfo, version: int, *, manual: bool) -> str | None:
    under_way = None if status.rollout is None else status.rollout.version
    return progress.hopeless_text(
        status.model,
        version,
        under_way=under_way,
        last=None if status.last is None else (status.last.version, status.last.outcome),
        pinned=status.pinned,
        manual=manual,
        newer=under_way if under_way is not None and under_way > version else None,  # others are not known here
        tried=None if status.stable is None else max(status.stable, status.considered or 0),
    )


def phase_text(status: RolloutInfo, version: int) -> str:
    """Returns in words where a version stands that is waited for."""
    rollout = status.rollout
    if status.stable == version:
        return "it is in charge"
    if rollout is None:
        return "it waits for a server to take it up"
    if rollout.version != version:
        return progress.turn_text(rollout.version, watched=rollout.phase == "watch")
    return f"{_place_text(rollout)}{', paused' if rollout.paused else ''}"


def figures_text(status: RolloutInfo, version: int, min_calls: int | None) -> str:
    """Returns in words how far the rollout under way is within its phase; empty if that is all there is to say.

    Args:
        status: what a server says.
        version: the version that is waited for.
        min_calls: the calls that a step needs; None if that is not known.
    """
    rollout, candidate = status.rollout, status.candidate
    if rollout is None or status.stable == version or (rollout.version == version and rollout.paused):
        return ""
    place = [] if rollout.version == version else [f"{_place_text(rollout)}{', paused' if rollout.paused else ''}"]
    if rollout.phase == "gates" and candidate is not None and candidate.state is not VersionState.AVAILABLE:
        place.append(candidate.state.value)
    if rollout.current is None:
        return ", ".join(place) if rollout.phase == "gates" else ""
    calls = candidate.traffic.calls if candidate is not None and candidate.traffic is not None else None
    counted = [] if calls is None else [progress.calls_text(calls, min_calls or 0)]
    text = ", ".join([*place, *counted, progress.time_text(rollout.phase_age_s, rollout.bake_s)])
    enough = rollout.phase_age_s >= rollout.bake_s and (calls or 0) >= (min_calls or 0)
    return f"{text}; {status.verdict}" if enough and status.verdict else text


def _place_text(rollout: Rollout) -> str:
    step = rollout.current
    if step is None:
        return rollout.phase
    return progress.step_text(rollout.step + 1, len(rollout.steps), step.kind, step.share)


class Rollouts:
    """Rollouts as a server sees them; a ``Client`` has it as ``rollouts``.

    Arguments and errors are those of ``AsyncRollouts``, which does the work.
    """

    def __init__(self, rollouts: AsyncRollouts, loop: LoopThread) -> None:
        self._rollouts = rollouts
        self._loop = loop

    def get(self, model: str, *, timeout_s: float | None = None) -> RolloutInfo:
        """Returns how a model's rollout stands."""
        return self._run(self._rollouts.get(model, timeout_s=timeout_s))

    def watch(self, model: str) -> Generator[RolloutInfo, None, None]:
        """Yields a model's rollout at once, whenever it has changed, and about every second."""
        return self._loop.iterate(self._rollouts.watch(model))

    def start(
        self, model: str, version: int, *, strategy: Strategy = None, **options: Unpack[ChangeOptions]
    ) -> RolloutState:
        """Makes a version the candidate; see ``AsyncRollouts.start``."""
        return self._run(self._rollouts.start(model, version, strategy=strategy, **options))

    def pause(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Keeps a rollout at its present step; evidence against it still counts."""
        return self._run(self._rollouts.pause(model, **options))

    def resume(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Lets a paused rollout go on."""
        return self._run(self._rollouts.resume(model, **options))

    def promote(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Drops the steps that remain; see ``AsyncRollouts.promote``."""
        return self._run(self._rollouts.promote(model, **options))

    def rollback(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Rejects the candidate, or the version in charge; see ``AsyncRollouts.rollback``."""
        return self._run(self._rollouts.rollback(model, **options))

    def approve(self, model: str, version: int, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Forgets that a version was rejected, and makes it the candidate."""
        return self._run(self._rollouts.approve(model, version, **options))

    def pin(self, model: str, version: int | None = None, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Puts a version in charge, None for the present one, and lets nothing be rolled out by itself."""
        return self._run(self._rollouts.pin(model, version, **options))

    def unpin(self, model: str, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Lets newer versions be rolled out again."""
        return self._run(self._rollouts.unpin(model, **options))

    def policy(self, model: str, *, timeout_s: float | None = None) -> RolloutPolicy:
        """Returns a model's policy, with every field set."""
        return self._run(self._rollouts.policy(model, timeout_s=timeout_s))

    def state(self, model: str, *, timeout_s: float | None = None) -> RolloutState:
        """Returns what the registry has at this moment; ``get`` says what the server last saw, and what it does."""
        return self._run(self._rollouts.state(model, timeout_s=timeout_s))

    def set_policy(self, model: str, policy: RolloutPolicy, **options: Unpack[ChangeOptions]) -> RolloutState:
        """Replaces a model's policy; what is None in it gets its default."""
        return self._run(self._rollouts.set_policy(model, policy, **options))

    def journal(self, model: str, *, limit: int = 100, timeout_s: float | None = None) -> list[JournalRecord]:
        """Returns what was done to a model, newest first; at most 1000 entries."""
        return self._run(self._rollouts.journal(model, limit=limit, timeout_s=timeout_s))

    def wait_for_version(
        self,
        model: str,
        version: int,
        *,
        timeout_s: float | None = None,
        on_progress: Progress | None = None,
        progress_every_s: float = progress.TELL_EVERY_S,
    ) -> RolloutInfo:
        """Returns as soon as a version is in charge; see ``AsyncRollouts.wait_for_version``."""
        return self._run(
            self._rollouts.wait_for_version(
                model, version, timeout_s=timeout_s, on_progress=on_progress, progress_every_s=progress_every_s
            )
        )

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(coroutine)
