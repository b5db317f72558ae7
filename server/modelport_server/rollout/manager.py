"""Keeps every model's rollout going: looks at the registry and passes on what it sees."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from time import monotonic

from modelport.exceptions import ModelportError
from modelport_registry import Manifest, Registry
from modelport_registry import State as Desired
from modelport_server.engines.ahead import Ahead
from modelport_server.engines.cores import CoreSharing
from modelport_server.engines.spawner import Spawner
from modelport_server.options import ServerOptions
from modelport_server.rollout.model import ModelRollout, ModelView
from modelport_server.rollout.status import StatusBoard
from modelport_server.routing import Router
from modelport_server.servable import Servable

_log = logging.getLogger(__name__)

_LOOK_S = 0.25


class RolloutManager:
    """All models: polls the registry and keeps each model's rollout going.

    Args:
        options: the server's options.
        router: told which versions answer.
        board: told what there is to know.
        ahead: processes for engines that have been begun already.
    """

    def __init__(self, options: ServerOptions, router: Router, board: StatusBoard, ahead: Ahead | None = None) -> None:
        self._options = options
        self._registry = Registry(options.registry)
        self._router = router
        self._board = board
        self._models: dict[str, ModelRollout] = {}
        self._loads = asyncio.Semaphore(options.engine.max_concurrent_loads)
        self._spawner = Spawner(ahead)
        self._forks = options.forks
        self._cores = CoreSharing(lambda: sum(rollout.calls for rollout in self._models.values()))
        self._wake = asyncio.Event()
        self._unreadable: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self._waiting_for: set[str] = set()
        self._manifests: dict[str, dict[int, Manifest | None]] = {}

    async def run(self) -> None:
        """Works until it is cancelled."""
        if self._forks:
            self._spawner.start()
        while True:
            view = await asyncio.to_thread(self._look)
            if view is not None:
                self._observe(view)
            self._advance()
            self._wake.clear()
            await self._act_on_news(self._options.rollout.poll_interval_s)

    def _advance(self) -> None:
        """Has every model do what there is to do; one that fails does not stop the others, nor the server."""
        for name, rollout in self._models.items():
            try:
                rollout.advance()
            except Exception as error:
                if self._failed.get(name) != repr(error):
                    _log.exception("%s: its rollout failed; what is loaded serves on", name)
                self._failed[name] = repr(error)
            else:
                self._failed.pop(name, None)
        if not any(rollout.loading for rollout in self._models.values()):
            self._spawner.end_ahead()  # what is loaded later can wait for an import, or is forked
        self._cores.copy_to({rollout.copied_to for rollout in self._models.values()} - {0})

    async def _act_on_news(self, duration_s: float) -> None:
        """Acts between two looks at the registry: on finished steps at once, on evidence a few times a second."""
        until_s = monotonic() + duration_s
        while (left_s := until_s - monotonic()) > 0:
            baking = any(rollout.baking for rollout in self._models.values())
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it loses a cancellation that comes as its future is done.
                async with asyncio.timeout(min(left_s, _LOOK_S) if baking else left_s):
                    await self._wake.wait()
            if not self._wake.is_set() and monotonic() >= until_s:
                return  # every look ends with it
            self._wake.clear()
            self._advance()

    def _look(self) -> dict[str, ModelView | None] | None:
        """Reads the registry; None if it can't be read, or for a model that can't: then nothing changes."""
        try:
            if not self._options.registry.is_dir():
                raise FileNotFoundError(f"there is no folder {self._options.registry}: is --registry right?")
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
        looked_at_s = monotonic()
        desired = self._registry.state(name)  # before the versions, so that those it names are among them
        numbers = self._registry.versions(name)
        if not numbers:
            return ModelView({}, Desired(), looked_at_s)
        known = self._manifests.get(name, {})
        # A manifest never changes, so that it is read once.
        versions = {number: known.get(number) or self._manifest(name, number) for number in numbers}
        self._manifests[name] = versions
        return ModelView(versions, desired, looked_at_s)

    def _has_callers(self) -> bool:
        return any(rollout.has_callers for rollout in self._models.values())

    def _manifest(self, name: str, number: int) -> Manifest | None:
        try:
            return self._registry.manifest(name, number)
        except (OSError, ModelportError):
            return None  # loading it says what is wrong with it

    def _observe(self, view: Mapping[str, ModelView | None]) -> None:
        self._tell_of_nothing(view)
        for name in sorted(view.keys() - self._models.keys()):
            self._models[name] = ModelRollout(
                name,
                self._options,
                self._router,
                self._board,
                self._loads,
                self._wake.set,
                self._spawner,
                self._cores,
                self._has_callers,
            )
        for name, rollout in list(self._models.items()):
            if (seen := view.get(name, ModelView({}, Desired(), monotonic()))) is not None:
                rollout.observe(seen)
            if name not in view and rollout.empty:
                del self._models[name]
                self._router.remove(name)
                self._board.post(name, None)
                self._board.rollouts.pop(name, None)

    def _tell_of_nothing(self, view: Mapping[str, ModelView | None]) -> None:
        """Says once which models have no version yet, so that a mistyped name or folder shows."""
        if not view and not self._waiting_for:
            _log.warning("%s has no model yet; waiting for one. Is it the right --registry?", self._options.registry)
            self._waiting_for.add("")
        missing = {name for name, model in view.items() if model is not None and not model.versions}
        for name in sorted((missing | (self._options.engines.keys() - view.keys() - {""})) - self._waiting_for):
            _log.warning("%s: the registry has no such model yet; waiting for it", name)
            self._waiting_for.add(name)

    @property
    def servables(self) -> list[Servable]:
        """Those of all models that are loaded."""
        return [servable for rollout in list(self._models.values()) for servable in rollout.servables]

    @property
    def desired(self) -> dict[str, Desired]:
        """What the registry asks of each model, as far as is known."""
        return {name: rollout.desired for name, rollout in list(self._models.items())}

    async def stop(self) -> None:
        """Ends every engine, and what engines are forked from; a model that fails to end keeps no other from it."""
        try:
            ends = await asyncio.gather(*(one.stop() for one in self._models.values()), return_exceptions=True)
            for name, error in zip(self._models, ends, strict=True):
                if error is not None:
                    _log.error("%s: its engines could not be ended", name, exc_info=error)
        finally:
            await self._cores.stop()
            await self._spawner.stop()
