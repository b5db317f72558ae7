"""Publishes a SavedModel folder as a new version.

``prepare`` finds every mistake of the publisher's before the registry is touched; ``store`` writes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from modelport.names import shown
from modelport.tensors import DTYPES
from modelport_registry import _golden, _journal, _saved_model, transitions
from modelport_registry._errors import AlreadyExistsError, InvalidModelError, RegistryError, storage_errors
from modelport_registry._files import (
    Found,
    copy_file,
    fsync_folder,
    open_lock,
    read_bounded,
    walk,
    write_file,
)
from modelport_registry._folder import Change, ModelFolder
from modelport_registry._json import JSON
from modelport_registry._manifest import (
    FORMAT,
    GOLDEN,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    REPORT,
    SAVED_MODEL,
    FileEntry,
    Lineage,
    Manifest,
)
from modelport_registry._names import MAX_VERSION, check_alias, check_version
from modelport_registry._types import Golden, Published

Progress = Callable[[int, int], None]
"""Called with the bytes copied and the bytes in all."""

_OURS = (MANIFEST, GOLDEN, REPORT)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a publisher hands in."""

    saved_model: Path
    """The folder that holds ``saved_model.pb``."""
    golden: Sequence[Golden]
    """Examples to check every server with."""
    metrics: Mapping[str, float]
    """Finite numbers."""
    lineage: Lineage
    """Where the model comes from."""
    tags: tuple[str, ...]
    """Words of the publisher's own."""
    report: Path | None
    """A folder to keep with the version."""
    version: int | None
    """The number to use; None for the next."""
    aliases: tuple[str, ...]
    """Aliases to point at the new version."""

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise RegistryError(f"the metric {shown(name)} is {value}: metrics are finite numbers")
        try:
            json.dumps(self.lineage.parameters, allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise RegistryError(f"the lineage's parameters must be JSON: {exc}") from exc
        if self.version is not None:
            check_version(self.version)
        for alias in self.aliases:
            check_alias(alias)


@dataclass(frozen=True, slots=True)
class Draft:
    """A request that was found good, and what was learnt from it."""

    request: Request
    """What was handed in."""
    info: _saved_model.SavedModelInfo
    """What the SavedModel says."""
    saved_model_sha256: str
    """The digest of the ``saved_model.pb`` that was looked at."""
    sources: Sequence[tuple[Path, Found]] = field(repr=False)
    """The files to copy, and what they are called in the version."""
    golden: bytes | None = field(repr=False)
    """The bytes of ``golden.npz``."""


def prepare(request: Request) -> Draft:
    """Returns what is to be written, checked; reads the source folders alone.

    Raises:
        InvalidModelError: if the folder or the examples are not usable.
        RegistryError: if the source cannot be read.
    """
    with storage_errors("can't read what is to be published"):
        sources = _saved_model_files(request.saved_model) + _report_files(request.report)
        data = read_bounded(request.saved_model / SAVED_MODEL, _saved_model.MAX_SAVED_MODEL_BYTES, InvalidModelError)
    info = _saved_model.read_saved_model(data)
    _golden.check_golden(request.golden, info.signatures)
    golden = _golden.dump_golden(request.golden) if request.golden else None
    return Draft(request, info, hashlib.sha256(data).hexdigest(), sources, golden)


def store(folder: ModelFolder, draft: Draft, on_progress: Progress | None) -> Published:
    """Writes the version; on failure nothing of it stays, and the registry is as it was.

    Raises:
        AlreadyExistsError: if the number that was asked for is not free.
        RegistryError: if it cannot be written.
    """
    what = f"can't publish {folder.model}"
    with storage_errors(what):
        folder.create()
        with folder.staged() as staging:
            built = staging / "version"
            built.mkdir()
            files = _fill(built, draft, on_progress)
            with folder.lock():
                manifest = _claim(folder, built, draft, files)
                _settle(folder, draft.request, manifest)
    path = folder.version(manifest.version)
    return Published(folder.model, manifest.version, path, manifest, _warnings(draft))


def _saved_model_files(folder: Path) -> list[tuple[Path, Found]]:
    if not folder.is_dir():
        raise InvalidModelError(f"{shown(str(folder))} is not a folder: give the SavedModel's folder")
    if not (folder / SAVED_MODEL).exists():  # looked for first: what lies in a wrong folder is no news
        raise InvalidModelError(f"{shown(str(folder))} holds no {SAVED_MODEL}: give the SavedModel's folder")
    found = [(folder / f.path, f) for f in walk(folder, InvalidModelError) if not f.is_folder]
    names = {f.path.split("/")[0] for _, f in found}
    if ours := [name for name in _OURS if name in names]:
        raise InvalidModelError(f"the folder holds {ours[0]}, which modelport writes itself: remove it")
    return found


def _report_files(folder: Path | None) -> list[tuple[Path, Found]]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise InvalidModelError(f"the report {shown(str(folder))} is not a folder")
    return [
        (folder / f.path, Found(f"{REPORT}/{f.path}", is_folder=False, size=f.size, links=f.links))
        for f in walk(folder, InvalidModelError)
        if not f.is_folder
    ]


def _fill(built: Path, draft: Draft, on_progress: Progress | None) -> tuple[FileEntry, ...]:
    total, done = sum(found.size for _, found in draft.sources), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if on_progress is not None:
            on_progress(done, max(total, done))

    folders = {built}
    entries: list[FileEntry] = []
    for source, found in draft.sources:
        target = built / found.path
        target.parent.mkdir(parents=True, exist_ok=True)
        folders.update(p for p in target.parents if p.is_relative_to(built))
        entries.append(copy_file(source, target, found.path, InvalidModelError, count))
    if draft.golden is not None:
        write_file(built / GOLDEN, draft.golden)
        digest = hashlib.sha256(draft.golden).hexdigest()
        entries.append(FileEntry(GOLDEN, len(draft.golden), digest))
    if not any(e.path == SAVED_MODEL and e.sha256 == draft.saved_model_sha256 for e in entries):
        raise InvalidModelError("saved_model.pb changed while it was copied: publish again when it is done")
    for path in sorted(folders - {built}):
        fsync_folder(path)
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _claim(folder: ModelFolder, built: Path, draft: Draft, files: tuple[FileEntry, ...]) -> Manifest:
    """Gives the version its number, manifest and place; the caller holds the model's lock.

    Other publishers wait for the lock, so the number is free unless someone made a folder by hand just
    now. A plain rename is enough: it fails on everything but an empty folder, which is no version.
    """
    while True:
        manifest = _manifest(folder, draft, files, _number(folder, draft.request.version))
        text = manifest.to_json().encode()
        if len(text) > MAX_MANIFEST_BYTES:
            raise InvalidModelError(f"the manifest would take more than {MAX_MANIFEST_BYTES >> 20} MiB")
        (built / MANIFEST).unlink(missing_ok=True)
        write_file(built / MANIFEST, text)
        fsync_folder(built)
        try:
            built.rename(folder.version(manifest.version))
        except OSError as exc:
            if exc.errno not in _TAKEN:
                raise
            continue
        return manifest


def _number(folder: ModelFolder, wanted: int | None) -> int:
    taken, collected = folder.taken(), folder.state().collected
    if wanted is None:
        number = max([0, collected, *taken]) + 1
        if number > MAX_VERSION:
            raise RegistryError(f"{folder.model} has no version number left: give one with version=")
        return number
    if wanted in taken:
        raise AlreadyExistsError(f"{folder.model} already has a version {wanted}: publish the next one")
    if wanted <= collected:
        raise AlreadyExistsError(
            f"{folder.model} version {wanted} may have been used before, and numbers are never used again: "
            f"use one above {collected}"
        )
    return wanted


def _manifest(folder: ModelFolder, draft: Draft, files: tuple[FileEntry, ...], number: int) -> Manifest:
    return Manifest(
        format=FORMAT,
        model=folder.model,
        version=number,
        created=datetime.now(UTC),
        publisher=_journal.actor(),
        framework=draft.info.framework,
        files=files,
        signatures=draft.info.signatures,
        golden=_golden.example_count(draft.request.golden, draft.info.signatures),
        metrics={name: float(value) for name, value in draft.request.metrics.items()},
        lineage=draft.request.lineage,
        tags=draft.request.tags,
    )


def _settle(folder: ModelFolder, request: Request, manifest: Manifest) -> None:
    number = manifest.version
    with storage_errors(f"{folder.model} version {number} is published, but not settled"):
        folder.fsync()
        os.close(open_lock(folder.leases / str(number)))  # for readers who may not make it themselves
        details = {"bytes": manifest.size_bytes, "manifest_sha256": folder.digest(number)}
        folder.record("publish", version=number, details=details)
        if request.aliases:
            _point(folder, request.aliases, number)


def _point(folder: ModelFolder, aliases: Sequence[str], number: int) -> None:
    """Points all aliases at once, in one change."""
    state = wanted = folder.state()
    for alias in aliases:
        wanted = transitions.point(wanted, alias, number, datetime.now(UTC))
    details: dict[str, JSON] = {"alias": aliases[0]} if len(aliases) == 1 else {"aliases": aliases}
    folder.change(state, wanted, Change(action="alias", version=number, details=details))


def _warnings(draft: Draft) -> tuple[str, ...]:
    lines: list[str] = []
    if not draft.request.golden:
        lines.append("no golden examples: a server cannot check its answers before this version takes traffic")
    for signature in draft.info.signatures.values():
        odd = [t for t in (*signature.inputs, *signature.outputs) if t.dtype not in DTYPES]
        if odd:
            lines.append(
                f"the signature {shown(signature.name)} cannot be served: {shown(odd[0].name)} is {odd[0].dtype}"
            )
    return tuple(lines)
