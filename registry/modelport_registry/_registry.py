"""The registry: a folder of models, each a folder of versions."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelport.names import is_valid_name, shown
from modelport_registry import _collect, _journal, _lease, _verify
from modelport_registry._errors import IntegrityError, NotFoundError, RegistryError, storage_errors
from modelport_registry._files import read_bounded
from modelport_registry._folder import ModelFolder
from modelport_registry._json import JSON
from modelport_registry._manifest import GOLDEN, Lineage, Manifest
from modelport_registry._names import check_alias, check_version
from modelport_registry._types import GarbageReport, Golden, JournalEntry, Published, State

if TYPE_CHECKING:
    from modelport_registry._publish import Progress

STABLE = "stable"
"""The alias that is served where a caller names nothing."""


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
        return [name for name in names if is_valid_name(name) and self.versions(name)]

    def versions(self, model: str) -> list[int]:
        """Returns the numbers of a model's versions, ascending; none where there is no such model."""
        with storage_errors(f"can't read {model}"):
            return self._folder(model).versions()

    def exists(self, model: str) -> bool:
        """Returns whether the model has a version; no for a name that is not legal."""
        return is_valid_name(model) and bool(self.versions(model))

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
        """Returns the version that is meant: the one named, or else ``stable``, or else the highest.

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

    def set_alias(self, model: str, alias: str, version: int, *, expected_generation: int | None = None) -> State:
        """Points an alias at a version, and returns the state after it.

        Raises:
            NotFoundError: if there is no such version.
            ConflictError: if the state is not of the expected generation.
        """
        check_alias(alias)
        folder = self._found(model, version)
        with storage_errors(f"can't change {model}"), folder.lock():
            if not folder.has(version):  # collected while we waited for the lock
                raise self._missing(folder, version)
            state = folder.state()
            changed = folder.write_state(
                state, aliases={**state.aliases, alias: version}, expected_generation=expected_generation
            )
            folder.record("alias", version=version, details={"alias": alias})
            return changed

    def remove_alias(self, model: str, alias: str, *, expected_generation: int | None = None) -> State:
        """Removes an alias, and returns the state after it.

        Raises:
            NotFoundError: if there is no such alias.
            ConflictError: if the state is not of the expected generation.
        """
        check_alias(alias)
        folder = self._folder(model)
        with storage_errors(f"can't change {model}"), folder.lock():
            state = folder.state()
            version = state.aliases.get(alias)
            if version is None:
                raise _no_alias(folder, alias, state)
            aliases = {name: number for name, number in state.aliases.items() if name != alias}
            changed = folder.write_state(state, aliases=aliases, expected_generation=expected_generation)
            folder.record("unalias", version=version, details={"alias": alias})
            return changed

    def journal(self, model: str) -> list[JournalEntry]:
        """Returns what was done to a model, oldest first."""
        with storage_errors(f"can't read the journal of {model}"):
            return _journal.read(self._folder(model).journal)

    def record(
        self,
        model: str,
        action: str,
        *,
        version: int | None = None,
        reason: str = "",
        details: Mapping[str, JSON] | None = None,
    ) -> None:
        """Adds a line to a model's journal.

        Raises:
            NotFoundError: if there is no such model.
        """
        folder = self._folder(model)
        with storage_errors(f"can't write the journal of {model}"):
            try:
                folder.record(action, version=version, reason=reason, details=details)
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
        return versions[-1]

    def _missing(self, folder: ModelFolder, version: int | None = None) -> NotFoundError:
        versions = folder.versions()
        if not versions:
            return NotFoundError(f"there is no model {folder.model!r}")
        return NotFoundError(f"{folder.model} has no version {version}; the highest is {versions[-1]}")


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
