"""Garbage collection: what publishers that died left behind, and old versions by policy."""

from __future__ import annotations

import contextlib
import os
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelport_registry import transitions
from modelport_registry._files import try_lock
from modelport_registry._folder import Change, ModelFolder
from modelport_registry._types import State


@dataclass(frozen=True, slots=True)
class Collected:
    """What was, or would be, removed of one model."""

    removed: tuple[int, ...]
    """Versions."""
    leased: tuple[int, ...]
    """Versions spared because someone holds them."""
    leftovers: int
    """Staging folders of publishers that died."""
    freed_bytes: int
    """The size of all of it."""


def collect(folder: ModelFolder, *, keep: int, dry_run: bool, staging_age_s: float) -> Collected:
    """Removes leftovers, and versions that are neither among the ``keep`` highest, aliased nor leased.

    What is to go is first renamed into the staging folder under the model's lock, then deleted without it:
    a version is there whole or not at all, and a collector that dies leaves a leftover for the next.
    """
    with contextlib.ExitStack() as locks:
        with folder.lock():
            doomed = _leftovers(folder, locks, staging_age_s)
            leftovers = len(doomed)
            removed, leased = _choose(folder, keep, locks, dry_run=dry_run)
            freed = sum(map(_size_bytes, [*doomed, *map(folder.version, removed)]))
            if not dry_run:
                doomed += _set_aside(folder, removed, locks)
                _sweep_leases(folder)
        if not dry_run:
            for path in doomed:
                folder.remove_staging(path)
    return Collected(tuple(removed), tuple(leased), leftovers, freed)


def _leftovers(folder: ModelFolder, locks: contextlib.ExitStack, age_s: float) -> list[Path]:
    found: list[Path] = []
    for path in _entries(folder.staging):
        try:
            status = path.stat()
        except FileNotFoundError:  # its publisher has come to an end meanwhile
            continue
        if not stat.S_ISDIR(status.st_mode) or time.time() - status.st_mtime < age_s:
            continue
        descriptor = folder.take_leftover(path)
        if descriptor is not None:
            locks.callback(os.close, descriptor)
            found.append(path)
    return found


def _choose(
    folder: ModelFolder, keep: int, locks: contextlib.ExitStack, *, dry_run: bool
) -> tuple[list[int], list[int]]:
    wanted = _wanted(folder.state())
    removed: list[int] = []
    leased: list[int] = []
    for version in folder.versions()[:-keep]:
        if version in wanted:
            continue
        path = folder.leases / str(version)
        if dry_run and not path.exists():
            removed.append(version)
            continue
        path.parent.mkdir(exist_ok=True)
        descriptor = try_lock(path)
        if descriptor is None:
            leased.append(version)
        else:
            locks.callback(os.close, descriptor)
            removed.append(version)
    return removed, leased


def _wanted(state: State) -> set[int | None]:
    """Returns the versions that somebody needs, or may go back to."""
    wanted: set[int | None] = {state.pin, *state.aliases.values()}
    if state.rollout is not None:
        wanted |= {state.rollout.version, state.rollout.previous}
    if (stable := state.aliases.get(transitions.STABLE)) is not None:
        wanted.add(transitions.predecessor(state, stable))
    return wanted


def _set_aside(folder: ModelFolder, versions: list[int], locks: contextlib.ExitStack) -> list[Path]:
    if not versions:
        return []
    highest = versions[-1]
    state = folder.state()
    changed = transitions.forget(state, versions)
    if changed != state:
        folder.change(state, changed, Change(action="collect", version=highest))
    else:
        folder.record("collect", version=highest)
    staging = folder.staging / uuid.uuid4().hex
    locks.callback(os.close, folder.make_staging(staging))
    for version in reversed(versions):
        if version != highest:
            folder.record("collect", version=version)
        folder.version(version).rename(staging / str(version))
    folder.fsync()
    return [staging]


def _sweep_leases(folder: ModelFolder) -> None:
    versions = {str(version) for version in folder.taken()}
    for path in _entries(folder.leases):
        if path.name not in versions:
            path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size_bytes(path: Path) -> int:
    return sum(entry.lstat().st_size for entry in _tree(path))


def _tree(path: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(path):
        yield from (Path(parent, name) for name in names)
