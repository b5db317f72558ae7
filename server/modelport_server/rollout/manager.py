"""Carries out the rollout: looks at the registry, asks the policy, and does what it says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from modelport.exceptions import ModelportError
from modelport_registry import IntegrityError, InvalidModelError, Manifest, Registry
from modelport_server.engines.process import LoadOrder, RejectedError
from modelport_server.options import ServerOptions
from modelport_server.rollout.policy import (
    COMING,
    STABLE,
    Action,
    ModelSnapshot,
    State,
    Verb,
    VersionSnapshot,
    charge,
    next_action,
)
from modelport_server.rollout.status import ModelStatus, SignatureStatus, StatusBoard, VersionStatus
from modelport_server.routing import Router
from modelport_server.servable import Servable
from modelport_server.signatures import is_batchable

_log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.5
_LONGEST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class ModelView:
    """What the registry holds of one model."""

    versions: Mapping[int, Manifest | None]
    """Every version with its manifest; None for one that can't be read."""
    aliases: Mapping[str, int]


@dataclass(eq=False, slots=True)
class Tracked:
    """One version and what has become of it."""

    version: int
    state: State = State.DISCOVERED
    reason: str = ""
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    since_s: float = field(default_factory=monotonic)
    in_registry: bool = True
    servable: Servable | None = None
    manifest: Manifest | None = None
    failures: int = 0
    """How often it could not be read."""
    retry_at_s: float = 0.0
    """When it may be tried again, on the monotonic clock."""
    hold: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Keeps the version's folder from being collected while it is loaded."""

    def become(self, state: State, reason: str = "") -> None:
        """Changes the state."""
        self.state, self.reason = state, reason
        self.since, self.since_s = datetime.now(UTC), monotonic()


class ModelRollout:
    """One model's versions.

    Args:
        name: the model.
        options: the server's options.
        router: told which version answers.
        board: told what there is to know.
        loads: bounds how many versions load at once, over all models.
        changed: called when the policy should be asked again.
    """

    def __init__(
        self,
        name: str,
        options: ServerOptions,
        router: Router,
        board: StatusBoard,
        loads: asyncio.Semaphore,
        changed: Callable[[], None],
    ) -> None:
        self._name = name
        self._options = options
        self._registry = Registry(options.registry)
        self._route = router.route(name)
        self._board = board
        self._loads = loads
        self._changed = changed
        self._versions: dict[int, Tracked] = {}
        self._aliases: Mapping[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading: set[asyncio.Task[None]] = set()
        self._warned: set[str] = set()

    @property
    def empty(self) -> bool:
        """Whether nothing is left of it, in the registry or in memory."""
        return not self._versions and not self._tasks

    @property
    def serving(self) -> int | None:
        """The version in charge."""
        return self._route.serving.version if self._route.serving is not None else None

    def observe(self, view: ModelView) -> None:
        """Takes in what the registry holds now."""
        self._aliases = dict(view.aliases)
        self._route.aliases = self._aliases
        for number, manifest in view.versions.items():
            self._versions.setdefault(number, Tracked(number, manifest=manifest))
        for number, tracked in list(self._versions.items()):
            tracked.in_registry = number in view.versions
            if not tracked.in_registry and tracked.state in (State.DISCOVERED, State.RETIRED, State.REJECTED):
                del self._versions[number]

    def advance(self) -> None:
        """Does whatever there is to do."""
        previous: Action | None = None
        while (action := next_action(self._snapshot())) is not None:
            if action == previous:  # it would go on for ever, and take all memory with it
                raise RuntimeError(f"{self._name}: {action} changed nothing")
            self._carry_out(action)
            previous = action
        self._warn_of_missing_stable()
        self.publish_status()

    def _snapshot(self) -> ModelSnapshot:
        now = monotonic()
        return ModelSnapshot(
            versions={n: _version_snapshot(tracked, now) for n, tracked in self._versions.items()},
            aliases=self._aliases,
            serving=self.serving,
            max_beside_stable=self._options.rollout.max_beside_stable,
            pinned_stream_limit_s=self._options.rollout.pinned_stream_limit_s,
        )

    def _carry_out(self, action: Action) -> None:
        tracked = self._versions[action.version]
        _log.debug("%s@%d: %s", self._name, action.version, action.verb.value)
        if action.verb is Verb.LOAD:
            tracked.become(State.VERIFYING)
            self._loading.add(self._spawn(self._load(tracked)))
        elif action.verb is Verb.SERVE:
            self._serve(tracked)
        elif action.verb is Verb.DRAIN:
            tracked.become(State.DRAINING, "another version has taken over")
            self._route.available.pop(action.version, None)
        elif action.verb is Verb.REVIVE:
            self._make_available(tracked)
        elif action.verb is Verb.END_STREAMS:
            _servable(tracked).retire_streams.set()
        elif action.verb is Verb.RETIRE:
            self._retire(tracked)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._loading.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: a step of the rollout failed", self._name, exc_info=error)
        self._changed()

    async def _load(self, tracked: Tracked) -> None:
        number = tracked.version
        try:
            async with self._loads:
                _log.info("%s@%d: loading", self._name, number)
                started = monotonic()
                servable = await self._new_servable(tracked)
                await servable.start()
        except RejectedError as error:
            self._reject(tracked, error.gate, str(error))
            return
        except (IntegrityError, InvalidModelError) as error:
            self._reject(tracked, "integrity", str(error))
            return
        except (ModelportError, OSError) as error:
            self._put_off(tracked, error)
            return
        except Exception:  # else the version would be on its way for ever
            _log.exception("%s@%d: loading failed", self._name, number)
            self._reject(tracked, "load", "the server failed to load it; its log says more")
            return
        except BaseException:
            tracked.hold.close()
            raise
        tracked.servable = servable
        self._make_available(tracked)
        if not servable.golden_examples:
            tracked.reason = "published without golden examples: its answers were not checked"
            _log.warning("%s@%d: %s", self._name, number, tracked.reason)
        _log.info(
            "%s@%d: available after %.1f s, %d golden examples reproduced on %s",
            self._name, number, monotonic() - started, servable.golden_examples, servable.engine_name,
        )  # fmt: skip

    async def _new_servable(self, tracked: Tracked) -> Servable:
        number = tracked.version
        await asyncio.to_thread(tracked.hold.enter_context, self._registry.lease(self._name, number))
        manifest = tracked.manifest
        if manifest is None:
            manifest = tracked.manifest = await asyncio.to_thread(self._registry.manifest, self._name, number)
        limits = self._options.batch
        return Servable(
            LoadOrder(self._options.registry, self._name, number, limits.max_batch_size),
            manifest,
            limits,
            self._options.engine,
            on_state=lambda state: self._on_engine_state(tracked, state),
            on_rejected=lambda gate, reason: self._spawn(self._lose(tracked, gate, reason)),
        )

    def _on_engine_state(self, tracked: Tracked, state: str) -> None:
        if tracked.state in (State.VERIFYING, State.LOADING, State.WARMING):
            tracked.become(State(state))
            self.publish_status()

    def _make_available(self, tracked: Tracked) -> None:
        tracked.become(State.AVAILABLE)
        self._route.available[tracked.version] = _servable(tracked)

    def _serve(self, tracked: Tracked) -> None:
        before = self.serving
        self._route.serving = _servable(tracked)
        _log.info("%s@%d: serving%s", self._name, tracked.version, f", was @{before}" if before else "")
        self._record("serving", tracked.version, details={"before": before, "engine": _servable(tracked).engine_name})

    def _put_off(self, tracked: Tracked, error: Exception) -> None:
        """Lets a version wait that could not be read: the fault is not the version's, and may pass."""
        wait_s = min(_FIRST_RETRY_S * 2**tracked.failures, _LONGEST_RETRY_S)
        tracked.failures += 1
        tracked.retry_at_s = monotonic() + wait_s
        tracked.hold.close()
        tracked.become(State.DISCOVERED, "it could not be read; the server tries again")
        _log.warning("%s@%d: can't be loaded now, next try in %g s: %s", self._name, tracked.version, wait_s, error)

    def _reject(self, tracked: Tracked, gate: str, reason: str) -> None:
        tracked.become(State.REJECTED, f"{gate}: {reason}")
        tracked.hold.close()
        _log.error("%s@%d: rejected: %s", self._name, tracked.version, tracked.reason)
        self._record("rejected", tracked.version, reason=tracked.reason)

    async def _lose(self, tracked: Tracked, gate: str, reason: str) -> None:
        """Takes a version that was available out of traffic, because its engine keeps failing."""
        servable = tracked.servable
        if servable is None:
            return  # retired meanwhile
        self._take_out(tracked)
        await servable.stop()
        tracked.servable = None
        self._reject(tracked, gate, reason)

    def _take_out(self, tracked: Tracked) -> None:
        self._route.available.pop(tracked.version, None)
        if self._route.serving is tracked.servable:
            self._route.serving = None
        tracked.become(State.REJECTED, "its engine keeps failing")

    def _retire(self, tracked: Tracked) -> None:
        """Lets a version go at once; its engine ends in its own time, and its folder is held until then."""
        servable, hold = _servable(tracked), tracked.hold
        tracked.servable, tracked.hold = None, contextlib.ExitStack()
        tracked.become(State.RETIRED)

        async def stop() -> None:
            with hold:
                await servable.stop()
            _log.info("%s@%d: retired", self._name, servable.version)

        self._spawn(stop())

    def _record(self, action: str, version: int, **more: Any) -> None:
        async def write() -> None:
            try:
                await asyncio.to_thread(self._registry.record, self._name, action, version=version, **more)
            except (OSError, ModelportError) as error:
                _log.warning("%s: the journal can't be written: %s", self._name, error)

        self._spawn(write())

    def _warn_of_missing_stable(self) -> None:
        wanted = charge(self._snapshot())
        tracked = self._versions.get(wanted) if wanted is not None else None
        if wanted is None or (tracked is not None and tracked.state is not State.REJECTED):
            return
        text = f"{self._name}: the alias 'stable' names version {wanted}, which " + (
            "does not exist" if tracked is None else "was rejected"
        )
        if text not in self._warned:
            self._warned.add(text)
            _log.error("%s; %s", text, f"version {self.serving} serves on" if self.serving else "nothing is served")

    def publish_status(self) -> None:
        """Posts what there is to know to the status board."""
        self._explain_idle()
        self._route.known = {n: _state_text(tracked) for n, tracked in self._versions.items()}
        self._route.coming = frozenset(
            n for n, tracked in self._versions.items() if tracked.state is State.DISCOVERED or tracked.state in COMING
        )
        self._board.post(
            self._name,
            ModelStatus(
                name=self._name,
                serving=self.serving,
                aliases=self._aliases,
                versions=tuple(_version_status(self._versions[n]) for n in sorted(self._versions, reverse=True)),
            ),
        )

    def _explain_idle(self) -> None:
        """Says of a version that is not being loaded why it is not."""
        wanted = charge(self._snapshot())
        if wanted is None:
            return
        why = f"the alias 'stable' names version {wanted}" if STABLE in self._aliases else f"version {wanted} is higher"
        for number, tracked in self._versions.items():
            if tracked.state is State.DISCOVERED and number != wanted and number not in self._aliases.values():
                tracked.reason = f"not loaded: {why}"

    async def stop(self) -> None:
        """Ends all its engines and tasks."""
        for task in self._loading:
            task.cancel()
        while self._tasks:  # what retires a version or writes to the journal comes to its end
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._route.serving = None
        self._route.available.clear()
        loaded = [tracked for tracked in self._versions.values() if tracked.servable is not None]
        await asyncio.gather(*(_servable(tracked).stop() for tracked in loaded), return_exceptions=True)
        for tracked in self._versions.values():
            tracked.hold.close()


def _servable(tracked: Tracked) -> Servable:
    assert tracked.servable is not None
    return tracked.servable


def _state_text(tracked: Tracked) -> str:
    return f"{tracked.state.value} ({tracked.reason})" if tracked.reason else tracked.state.value


def _version_snapshot(tracked: Tracked, now: float) -> VersionSnapshot:
    servable = tracked.servable
    return VersionSnapshot(
        state=tracked.state,
        leases=servable.leases if servable is not None else 0,
        streams=servable.streams if servable is not None else 0,
        age_s=now - tracked.since_s,
        in_registry=tracked.in_registry,
        put_off=now < tracked.retry_at_s,
        streams_ended=servable is not None and servable.retire_streams.is_set(),
        streams_ended_s=servable.retire_streams.age_s if servable is not None else 0.0,
    )


def _version_status(tracked: Tracked) -> VersionStatus:
    servable, manifest = tracked.servable, tracked.manifest
    signatures: tuple[SignatureStatus, ...] = ()
    if servable is not None and servable.signatures:
        served = [servable.signatures[name] for name in sorted(servable.signatures)]
        signatures = tuple(SignatureStatus(signature.spec, signature.batched) for signature in served)
    elif manifest is not None:
        specs = [manifest.signatures[name] for name in sorted(manifest.signatures)]
        signatures = tuple(SignatureStatus(spec, is_batchable(spec)) for spec in specs)
    return VersionStatus(
        version=tracked.version,
        state=tracked.state,
        reason=tracked.reason,
        since=tracked.since,
        engine=servable.engine_name if servable is not None else "",
        golden_examples=servable.golden_examples if servable is not None else 0,
        signatures=signatures,
        metrics=dict(manifest.metrics) if manifest is not None else {},
    )


class RolloutManager:
    """All models: polls the registry and keeps each model's rollout going.

    Args:
        options: the server's options.
        router: told which versions answer.
        board: told what there is to know.
    """

    def __init__(self, options: ServerOptions, router: Router, board: StatusBoard) -> None:
        self._options = options
        self._registry = Registry(options.registry)
        self._router = router
        self._board = board
        self._models: dict[str, ModelRollout] = {}
        self._loads = asyncio.Semaphore(options.engine.max_concurrent_loads)
        self._wake = asyncio.Event()
        self._unreadable: dict[str, str] = {}
        self._waiting_for: set[str] = set()
        self._manifests: dict[str, dict[int, Manifest | None]] = {}

    async def run(self) -> None:
        """Works until it is cancelled."""
        while True:
            view = await asyncio.to_thread(self._look)
            if view is not None:
                self._observe(view)
            for rollout in self._models.values():
                rollout.advance()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wait_for_news(), self._options.rollout.poll_interval_s)

    async def _wait_for_news(self) -> None:
        """Acts on finished steps at once, between two looks at the registry."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for rollout in self._models.values():
                rollout.advance()

    def _look(self) -> dict[str, ModelView | None] | None:
        """Reads the registry; None if it can't be read, or for a model that can't: then nothing changes."""
        try:
            if not self._options.registry.is_dir():
                raise FileNotFoundError(f"there is no folder {self._options.registry}")
            names = self._options.models or tuple(self._registry.models())
            view = {name: self._view_or_none(name) for name in names}
            had_versions = any(not rollout.empty for rollout in self._models.values())
            if had_versions and not any(model is None or model.versions for model in view.values()):
                raise FileNotFoundError("everything is gone from it")  # as when it is unmounted
        except (OSError, ModelportError) as error:
            self._warn_once("the registry", error)
            return None
        self._unreadable.pop("the registry", None)
        return view

    def _view_or_none(self, name: str) -> ModelView | None:
        try:
            view = self._view(name)
        except (OSError, ModelportError) as error:
            self._warn_once(name, error)
            return None
        self._unreadable.pop(name, None)
        return view

    def _warn_once(self, what: str, error: Exception) -> None:
        if self._unreadable.get(what) != str(error):
            _log.warning("%s can't be read, waiting for it; what is loaded serves on: %s", what, error)
        self._unreadable[what] = str(error)

    def _view(self, name: str) -> ModelView:
        if not self._registry.exists(name):
            return ModelView({}, {})
        known = self._manifests.get(name, {})
        numbers = self._registry.versions(name)
        # A manifest never changes, so that it is read once.
        versions = {number: known.get(number) or self._manifest(name, number) for number in numbers}
        self._manifests[name] = versions
        return ModelView(versions, self._registry.state(name).aliases)

    def _manifest(self, name: str, number: int) -> Manifest | None:
        try:
            return self._registry.manifest(name, number)
        except (OSError, ModelportError):
            return None  # loading it says what is wrong with it

    def _observe(self, view: Mapping[str, ModelView | None]) -> None:
        self._tell_of_nothing(view)
        for name in view.keys() - self._models.keys():
            self._models[name] = ModelRollout(
                name, self._options, self._router, self._board, self._loads, self._wake.set
            )
        for name, rollout in list(self._models.items()):
            if (seen := view.get(name, ModelView({}, {}))) is not None:
                rollout.observe(seen)
            if name not in view and rollout.empty:
                del self._models[name]
                self._router.remove(name)
                self._board.post(name, None)

    def _tell_of_nothing(self, view: Mapping[str, ModelView | None]) -> None:
        """Says once which models have no version yet, so that a mistyped name or folder shows."""
        if not view and not self._waiting_for:
            _log.warning("the registry has no model yet; waiting for one")
            self._waiting_for.add("")
        for name, model in view.items():
            if model is not None and not model.versions and name not in self._waiting_for:
                _log.warning("%s: the registry has no such model yet; waiting for it", name)
                self._waiting_for.add(name)

    async def stop(self) -> None:
        """Ends every engine."""
        await asyncio.gather(*(rollout.stop() for rollout in self._models.values()))
