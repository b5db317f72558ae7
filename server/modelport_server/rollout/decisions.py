"""Decisions about one model: written to the registry by compare-and-swap, and what came of them."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from modelport_registry import JSON, ConflictError, NotFoundError, Registry, RegistryError
from modelport_registry import State as Desired

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Decision:
    """A change of what the registry asks for."""

    transition: Callable[[Desired], Desired]
    action: str
    """What the journal calls it."""
    version: int
    reason: str = ""
    details: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    """The numbers that it rests on, for the journal."""


class Decisions:
    """What the registry asks of one model, and this server's part in deciding it.

    A server that may not write to the registry decides for itself alone.

    Args:
        registry: where the desired state lies.
        model: the model.
        changed: called when the desired state may have changed.
    """

    def __init__(self, registry: Registry, model: str, changed: Callable[[], None]) -> None:
        self.desired = Desired()
        self._registry = registry
        self._model = model
        self._changed = changed
        self._known_at_s = float("-inf")
        self._alone = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._deciding = False

    @property
    def deciding(self) -> bool:
        """Whether a decision is on its way."""
        return self._deciding

    @property
    def busy(self) -> bool:
        """Whether anything is being written."""
        return bool(self._tasks)

    def observe(self, desired: Desired, looked_at_s: float) -> None:
        """Takes in what was read, unless it was read before what is known.

        Args:
            desired: what the registry asks for.
            looked_at_s: when reading began, on the monotonic clock.
        """
        if looked_at_s < self._known_at_s or (self._alone and desired.generation == self.desired.generation):
            return
        self._alone = False
        self.desired = desired

    def decide(self, decision: Decision) -> None:
        """Writes a decision that rests on the desired state as it is known; one at a time.

        If somebody has changed the state meanwhile, nothing is written and the state is read again.
        """
        self._deciding = True
        self._spawn(self._decide(decision, self.desired.generation))

    def insist(self, decision: Decision) -> None:
        """Writes what is true whatever others decide, such as that a version failed here; until it is written."""
        self._spawn(self._insist(decision))

    def record(self, action: str, version: int, **more: Any) -> None:
        """Adds a line to the journal."""

        async def write() -> None:
            try:
                await asyncio.to_thread(self._registry.record, self._model, action, version=version, **more)
            except (OSError, RegistryError) as error:
                _log.warning("%s: the journal can't be written: %s", self._model, error)

        self._spawn(write())

    async def settle(self) -> None:
        """Returns when nothing is being written any more; what can't be written soon is given up."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=_RETRY_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: a decision failed", self._model, exc_info=error)
        self._changed()

    async def _decide(self, decision: Decision, generation: int) -> None:
        try:
            await self._write(decision, generation)
        except ConflictError:
            _log.debug("%s: somebody else decided while this server did", self._model)
            await self._read()
        except RegistryError as error:
            _log.warning("%s@%d: can't decide to %s: %s", self._model, decision.version, decision.action, error)
            await asyncio.sleep(_RETRY_S)  # else it would be asked again at once
            await self._read()
        finally:
            self._deciding = False

    async def _insist(self, decision: Decision) -> None:
        while True:
            try:
                await self._write(decision, None)
            except NotFoundError:
                return  # the model is gone, and there is nothing left to say of it
            except RegistryError as error:
                _log.warning("%s@%d: can't write %s: %s", self._model, decision.version, decision.action, error)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _write(self, decision: Decision, generation: int | None) -> None:
        try:
            desired = await asyncio.to_thread(
                self._registry.change,
                self._model,
                decision.transition,
                action=decision.action,
                version=decision.version,
                reason=decision.reason,
                details=decision.details,
                expected_generation=generation,
            )
        except RegistryError as error:
            if not _is_read_only(error):
                raise
            if not self._alone:
                _log.warning("%s: this server decides for itself alone: %s", self._model, error)
            self._alone = True
            self.desired = decision.transition(self.desired)
        else:
            self._know(desired)

    async def _read(self) -> None:
        try:
            self._know(await asyncio.to_thread(self._registry.state, self._model))
        except RegistryError as error:
            _log.debug("%s: the state can't be read: %s", self._model, error)

    def _know(self, desired: Desired) -> None:
        self._known_at_s = monotonic()
        self.desired = desired


def _is_read_only(error: RegistryError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _READ_ONLY
