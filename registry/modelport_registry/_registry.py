"""The registry: a folder of models, each a folder of versions."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from modelport.names import is_valid_name, shown
from modelport_registry import _collect, _journal, _lease, _verify, transitions
from modelport_registry._errors import IntegrityError, NotFoundError, RegistryError, storage_errors
from modelport_registry._files import read_bounded
from modelport_registry._folder import Change, ModelFolder
from modelport_registry._json import JSON
from modelport_registry._manifest import GOLDEN, Lineage, Manifest
from modelport_registry._names import check_alias, check_version
from modelport_registry._policy import RolloutPolicy, Strategy
from modelport_registry._types import GarbageReport, Golden, JournalEntry, Published, State
from modelport_registry.transitions import STABLE

if TYPE_CHECKING:
    from modelport_registry._publish import Progress


class Registry:
    """Reads and writes a registry folder; any number of processes may at the same time.

    Every method raises ``RegistryError`` where the storage fails or a name is not legal.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def models(self) -> list[str]:
        """Returns the names of the models that have a version, sorted."""
        with storage_errors("can't read the registry"):
            try:
                names = sorted(entry.name for entry in self.root.iterdir())
            except FileNotFoundError:
                return []
        return [name for name in names if self.exists(name)]

    def versions(self, model: str) -> list[int]:
        """Returns the numbers of a model's versions, ascending; none where there is no such model."""
        with storage_errors(f"can't read {model}"):
            return self._folder(model).versions()

    def exists(self, model: str) -> bool:
        """Returns whether the model has a version; no for a name that is not legal."""
        if not is_valid_name(model):
            return False
        with storage_errors(f"can't read {model}"):
            folder = self._folder(model)
            return any(map(folder.has, folder.taken()))

    def path(self, model: str, version: int) -> Path:
        """Returns the folder of a version.

        Raises:
            NotFoundError: if there is no such version.
        """
        return self._folder(model).version(self.resolve(model, version=version))

    def manifest(self, model: str, version: int) -> Manifest:
        """Returns a version's manifest, checked for itself; the other files are not looked at.

        Raises:
            NotFoundError: if there is no such version.
            IntegrityError: if the manifest is damaged.
        """
        folder = self._found(model, version)
        with storage_errors(f"can't read {model} version {version}"), _named(model, version):
            return _verify.read_manifest(folder, version)

    def golden(self, model: str, version: int) -> list[Golden]:
        """Returns a version's golden examples; the arrays are read-only, strings are objects of ``bytes``.

        Raises:
            NotFoundError: if there is no such version.
            IntegrityError: if they are damaged.
        """
        from modelport_registry._golden import MAX_GOLDEN_BYTES, load_golden

        folder = self._found(model, version)
        with storage_errors(f"can't read {model} version {version}"), _named(model, version):
            try:
                data = read_bounded(folder.version(version) / GOLDEN, MAX_GOLDEN_BYTES, IntegrityError)
            except FileNotFoundError:
                return []
            return load_golden(data)

    def state(self, model: str) -> State:
        """Returns a model's desired state; generation 0 where nobody wished anything yet.

        Raises:
            IntegrityError: if it is damaged.
        """
        with storage_errors(f"can't read {model}"):
            return self._folder(model).state()

    def resolve(self, model: str, *, version: int | None = None, alias: str | None = None) -> int:
        """Returns the version that is meant: the one named, or else ``stable``, or else the highest not rejected.

        Where every version was rejected it is the highest: there is a model, though nothing of it should serve.

        Raises:
            NotFoundError: if there is none.
            RegistryError: if both a version and an alias are given.
        """
        if version is not None and alias is not None:
            raise RegistryError("give a version or an alias, not both")
        folder = self._folder(model)
        with storage_errors(f"can't read {model}"):
            if version is None:
                version = self._by_alias(folder, alias)
            if not folder.has(version):
                raise self._missing(folder, version)
        return version

    def find(self, model: str, name: str) -> int:
        """Returns the version that a name means: a number, or an alias, which never is one.

        Raises:
            NotFoundError: if there is none.
        """
        if name.isascii() and name.isdigit():
            return self.resolve(model, version=int(name))
        return self.resolve(model, alias=name)

    def publish(
        self,
        model: str,
        saved_model: str | Path,
        *,
        golden: Sequence[Golden] = (),
        metrics: Mapping[str, float] | None = None,
        lineage: Lineage | None = None,
        tags: Sequence[str] = (),
        report: str | Path | None = None,
        version: int | None = None,
        aliases: Sequence[str] = (),
        on_progress: Progress | None = None,
    ) -> Published:
        """Copies a SavedModel folder into the registry as a new version, whole or not at all.

        Args:
            model: the model's name; a new one is made.
            saved_model: the folder that holds ``saved_model.pb``; it is only read.
            golden: examples that every server reproduces before the version takes traffic.
            metrics: finite numbers, such as accuracy.
            lineage: where the model comes from.
            tags: words of your own.
            report: a folder to keep with the version.
            version: the number to use; the next free one by default.
            aliases: aliases to point at the new version.
            on_progress: called with the bytes copied and the bytes in all.

        Raises:
            InvalidModelError: if the folder is no SavedModel, or the examples do not fit it.
            AlreadyExistsError: if ``version`` is taken or was once.
            RegistryError: if it cannot be written.
        """
        from modelport_registry import _publish

        folder = self._folder(model)
        request = _publish.Request(
            saved_model=Path(saved_model),
            golden=golden,
            metrics=metrics or {},
            lineage=lineage or Lineage(),
            tags=tuple(tags),
            report=None if report is None else Path(report),
            version=version,
            aliases=tuple(aliases),
        )
        return _publish.store(folder, _publish.prepare(request), on_progress)

    def verify(self, model: str, version: int) -> Manifest:
        """Returns a version's manifest after checking every byte of the version against it.

        Raises:
            NotFoundError: if there is no such version.
            IntegrityError: if anything was changed, added, removed or linked.
        """
        folder = self._found(model, version)
        with storage_errors(f"can't read {model} version {version}"), _named(model, version):
            return _verify.verify(folder, version)

    def change(
        self,
        model: str,
        transition: Callable[[State], State],
        *,
        action: str,
        version: int | None = None,
        reason: str = "",
        details: Mapping[str, JSON] | None = None,
        expected_generation: int | None = None,
        actor: str | None = None,
    ) -> State:
        """Changes a model's desired state under its lock and says so in the journal; returns the state after it.

        Where ``transition`` changes nothing, nothing is written.

        Args:
            model: the model's name.
            transition: returns the state that should follow; one of ``modelport_registry.transitions``.
            action: what the journal calls it.
            version: the version that it is about; the journal says its manifest's SHA-256, too.
            reason: why, for the journal.
            details: the numbers that it was based on, for the journal.
            expected_generation: the generation that the caller has seen.
            actor: who changes it; user and machine by default.

        Raises:
            ConflictError: if the state is not of the expected generation.
            NotFoundError: if there is no such model.
            RegistryError: if ``transition`` refuses.
        """
        change = Change(action=action, version=version, reason=reason, details=details or {}, actor=actor)
        return self._change(model, transition, lambda _: change, expected_generation)

    def _change(
        self,
        model: str,
        transition: Callable[[State], State],
        change: Callable[[State], Change],
        expected_generation: int | None,
    ) -> State:
        folder = self._folder(model)
        with storage_errors(f"can't change {model}"), folder.lock():
            state = folder.state()
            folder.expect(state, expected_generation)
            wanted = transition(state)
            return state if wanted == state else folder.change(state, wanted, change(state))

    def set_alias(
        self,
        model: str,
        alias: str,
        version: int,
        *,
        reason: str = "",
        actor: str | None = None,
        expected_generation: int | None = None,
    ) -> State:
        """Points an alias at a version, and returns the state after it; ``stable`` pins the version.

        Raises:
            NotFoundError: if there is no such version.
            ConflictError: if the state is not of the expected generation.
        """
        check_alias(alias)
        return self.change(
            model,
            lambda state: transitions.point(self._present(state, model, version), alias, version, _now()),
            action="alias",
            version=version,
            reason=reason,
            details={"alias": alias},
            expected_generation=expected_generation,
            actor=actor,
        )

    def remove_alias(
        self,
        model: str,
        alias: str,
        *,
        reason: str = "",
        actor: str | None = None,
        expected_generation: int | None = None,
    ) -> State:
        """Removes an alias, and returns the state after it; ``stable`` takes the pin with it.

        Raises:
            NotFoundError: if there is no such alias.
            ConflictError: if the state is not of the expected generation.
        """
        check_alias(alias)

        def remove(state: State) -> State:
            if alias not in state.aliases:
                raise _no_alias(self._folder(model), alias, state)
            return transitions.unpoint(state, alias, _now())

        def change(state: State) -> Change:
            version = state.aliases[alias]
            return Change(action="unalias", version=version, reason=reason, details={"alias": alias}, actor=actor)

        return self._change(model, remove, change, expected_generation)

    def start_rollout(
        self,
        model: str,
        version: int,
        *,
        strategy: Sequence[Strategy] | None = None,
        reason: str = "",
        actor: str | None = None,
        expected_generation: int | None = None,
    ) -> State:
        """Makes a version the candidate, by the policy's strategy or another.

        Raises:
            NotFoundError: if there is no such version.
            ConflictError: if the state is not of the expected generation.
            RegistryError: if it was rejected, is in charge, or another one is being rolled out.
        """
        return self.change(
            model,
            lambda state: transitions.start(
                self._present(state, model, version),
                version,
                strategy=strategy,
                rollout_id=uuid.uuid4().hex,
                now=_now(),
                actor=actor or _journal.actor(),
                reason=reason,
            ),
            action="rollout started",
            version=version,
            reason=reason,
            expected_generation=expected_generation,
            actor=actor,
        )

    def approve(
        self,
        model: str,
        version: int,
        *,
        strategy: Sequence[Strategy] | None = None,
        reason: str = "",
        actor: str | None = None,
        expected_generation: int | None = None,
    ) -> State:
        """Forgets that a version was rejected and makes it the candidate.

        Raises:
            NotFoundError: if there is no such version.
            ConflictError: if the state is not of the expected generation.
            RegistryError: if it was not rejected, or another one is being rolled out.
        """
        return self.change(
            model,
            lambda state: transitions.approve(
                self._present(state, model, version),
                version,
                strategy=strategy,
                rollout_id=uuid.uuid4().hex,
                now=_now(),
                actor=actor or _journal.actor(),
                reason=reason,
            ),
            action="approved",
            version=version,
            reason=reason,
            expected_generation=expected_generation,
            actor=actor,
        )

    def pause_rollout(
        self, model: str, *, reason: str = "", actor: str | None = None, expected_generation: int | None = None
    ) -> State:
        """Keeps the rollout under way in its step; it is still rolled back by itself.

        Raises:
            ConflictError: if the state is not of the expected generation.
            RegistryError: if none is under way.
        """
        return self._steer(model, transitions.pause, "paused", reason, actor, expected_generation)

    def resume_rollout(
        self, model: str, *, reason: str = "", actor: str | None = None, expected_generation: int | None = None
    ) -> State:
        """Lets a rollout that was paused go on.

        Raises:
            ConflictError: if the state is not of the expected generation.
            RegistryError: if none is under way.
        """
        return self._steer(model, transitions.resume, "resumed", reason, actor, expected_generation)

    def promote(
        self, model: str, *, reason: str = "", actor: str | None = None, expected_generation: int | None = None
    ) -> State:
        """Has the candidate take over without the steps that are left, once it has passed the gates.

        Raises:
            ConflictError: if the state is not of the expected generation.
            RegistryError: if none is under way.
        """
        return self._steer(model, transitions.promote, "promoted", reason, actor, expected_generation)

    def rollback(
        self, model: str, *, reason: str = "", actor: str | None = None, expected_generation: int | None = None
    ) -> State:
        """Rejects the candidate, or without one the version in charge, and goes back to the one before.

        Raises:
            ConflictError: if the state is not of the expected generation.
            RegistryError: if it is not known what to go back to.
        """
        who = actor or _journal.actor()
        return self._steer(
            model,
            lambda state: transitions.rollback(state, reason, _now(), who),
            "rolled back",
            reason,
            actor,
            expected_generation,
        )

    def pin(
        self,
        model: str,
        version: int | None = None,
        *,
        reason: str = "",
        actor: str | None = None,
        expected_generation: int | None = None,
    ) -> State:
        """Puts a version in charge, by default the one that is, and rolls nothing out until the pin is off.

        Raises:
            NotFoundError: if there is no such version.
            ConflictError: if the state is not of the expected generation.
            RegistryError: if it was rejected, or no version is in charge.
        """

        def pin(state: State) -> State:
            return transitions.pin(self._present(state, model, version), version, _now())

        def change(state: State) -> Change:
            number = state.aliases.get(STABLE) if version is None else version
            return Change(action="pinned", version=number, reason=reason, actor=actor)

        return self._change(model, pin, change, expected_generation)

    def unpin(
        self, model: str, *, reason: str = "", actor: str | None = None, expected_generation: int | None = None
    ) -> State:
        """Takes the pin off.

        Raises:
            ConflictError: if the state is not of the expected generation.
        """

        def change(state: State) -> Change:
            return Change(action="unpinned", version=state.pin, reason=reason, actor=actor)

        return self._change(model, transitions.unpin, change, expected_generation)

    def set_policy(
        self,
        model: str,
        policy: RolloutPolicy,
        *,
        reason: str = "",
        actor: str | None = None,
        expected_generation: int | None = None,
    ) -> State:
        """Changes the rules of a model's rollouts; one under way keeps its plan.

        Raises:
            NotFoundError: if there is no such model.
            ConflictError: if the state is not of the expected generation.
        """
        return self.change(
            model,
            lambda state: transitions.set_policy(state, policy),
            action="policy",
            reason=reason,
            details={"policy": policy.to_json()},
            expected_generation=expected_generation,
            actor=actor,
        )

    def _steer(
        self,
        model: str,
        transition: Callable[[State], State],
        action: str,
        reason: str,
        actor: str | None,
        expected_generation: int | None,
    ) -> State:
        """Changes what becomes of the rollout under way, or of the last one."""

        def change(state: State) -> Change:
            version = state.rollout.version if state.rollout is not None else state.aliases.get(STABLE)
            return Change(action=action, version=version, reason=reason, actor=actor)

        return self._change(model, transition, change, expected_generation)

    def _present(self, state: State, model: str, version: int | None) -> State:
        """Returns ``state`` if there is such a version; under the lock, so that it is not collected meanwhile."""
        folder = self._folder(model)
        if version is not None:
            check_version(version)
            if not folder.has(version):
                raise self._missing(folder, version)
        return state

    def journal(self, model: str) -> list[JournalEntry]:
        """Returns what was done to a model, oldest first; changes that came to nothing are left out."""
        folder = self._folder(model)
        with storage_errors(f"can't read the journal of {model}"):
            entries = _journal.read(folder.journal)
            try:
                return _journal.in_effect(entries, folder.state().generation)
            except IntegrityError:  # the journal may tell how the state came to be damaged
                return entries

    def record(
        self,
        model: str,
        action: str,
        *,
        version: int | None = None,
        reason: str = "",
        details: Mapping[str, JSON] | None = None,
        actor: str | None = None,
    ) -> None:
        """Adds a line to a model's journal.

        Raises:
            NotFoundError: if there is no such model.
        """
        folder = self._folder(model)
        with storage_errors(f"can't write the journal of {model}"):
            try:
                folder.record(action, version=version, reason=reason, details=details, actor=actor)
            except (FileNotFoundError, NotADirectoryError) as exc:
                raise self._missing(folder) from exc

    @contextlib.contextmanager
    def lease(self, model: str, version: int) -> Generator[None]:
        """Holds a version: while the context is open, garbage collection leaves it alone.

        Raises:
            NotFoundError: if there is no such version.
        """
        folder = self._found(model, version)
        with contextlib.ExitStack() as stack:
            with storage_errors(f"can't lease {model} version {version}"):
                stack.enter_context(_lease.lease(folder, version))
            yield

    def collect_garbage(
        self, model: str | None = None, *, keep: int = 3, dry_run: bool = False, staging_age_s: float = 3600.0
    ) -> GarbageReport:
        """Removes leftovers and old versions of one model or all; never an aliased or leased version.

        Args:
            model: one model; all by default.
            keep: how many of the highest versions stay in any case; at least 1.
            dry_run: only report.
            staging_age_s: spare leftovers that are younger.

        Raises:
            NotFoundError: if there is no such model.
        """
        if keep < 1:
            raise RegistryError(f"keep is {keep}: at least 1 version must stay")
        folders = self._folders() if model is None else [self._folder(model)]
        results: dict[str, _collect.Collected] = {}
        for folder in folders:
            with storage_errors(f"can't collect garbage of {folder.model}"):
                results[folder.model] = _collect.collect(
                    folder, keep=keep, dry_run=dry_run, staging_age_s=staging_age_s
                )
        return GarbageReport(
            removed={name: result.removed for name, result in results.items() if result.removed},
            leased={name: result.leased for name, result in results.items() if result.leased},
            leftovers=sum(result.leftovers for result in results.values()),
            freed_bytes=sum(result.freed_bytes for result in results.values()),
            dry_run=dry_run,
        )

    def _folder(self, model: str) -> ModelFolder:
        return ModelFolder(self.root, model)

    def _folders(self) -> list[ModelFolder]:
        with storage_errors("can't read the registry"):
            try:
                names = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
            except FileNotFoundError:
                return []
        folders = [self._folder(name) for name in names if is_valid_name(name)]
        return [folder for folder in folders if folder.staging.is_dir()]  # ours, whatever else lies there

    def _found(self, model: str, version: int) -> ModelFolder:
        check_version(version)
        self.resolve(model, version=version)
        return self._folder(model)

    def _by_alias(self, folder: ModelFolder, alias: str | None) -> int:
        state = folder.state()
        version = state.aliases.get(STABLE if alias is None else alias)
        if version is not None:
            return version
        versions = folder.versions()
        if not versions:
            raise self._missing(folder)
        if alias is not None:
            raise _no_alias(folder, alias, state)
        return max((number for number in versions if number not in state.rejected), default=versions[-1])

    def _missing(self, folder: ModelFolder, version: int | None = None) -> NotFoundError:
        versions = folder.versions()
        if not versions:
            return folder.missing()
        return NotFoundError(f"{folder.model} has no version {version}; the highest is {versions[-1]}")


def _now() -> datetime:
    return datetime.now(UTC)


def _no_alias(folder: ModelFolder, alias: str, state: State) -> NotFoundError:
    known = ", ".join(map(repr, state.aliases)) or "none"
    return NotFoundError(f"{folder.model} has no alias {shown(alias)}; it has: {known}")


@contextlib.contextmanager
def _named(model: str, version: int) -> Generator[None]:
    """Opens the text of an ``IntegrityError`` with the version it is about."""
    try:
        yield
    except IntegrityError as exc:
        raise IntegrityError(f"{model} version {version}: {exc}") from exc
