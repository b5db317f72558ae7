"""One model's folder: where everything lies, its lock, its state, and the place where versions are made.

Everything that changes what others see happens under the lock; nothing slow does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelport_registry import _journal
from modelport_registry._errors import ConflictError, IntegrityError, NotFoundError, RegistryError
from modelport_registry._files import (
    fsync_folder,
    locked,
    make_folders,
    open_lock,
    read_bounded,
    replace_file,
    try_lock,
)
from modelport_registry._json import JSON, parse
from modelport_registry._manifest import MANIFEST, MAX_MANIFEST_BYTES
from modelport_registry._names import check_model, parse_version
from modelport_registry._state import read_state, state_json
from modelport_registry._types import State
from modelport_registry.transitions import STABLE

MAX_STATE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the journal says of a change of the desired state."""

    action: str
    """What is done."""
    version: int | None
    """What it is done to."""
    reason: str = ""
    """Why."""
    details: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    """The numbers that it rests on."""
    actor: str | None = None
    """Who does it; user and machine by default."""


class ModelFolder:
    """Everything below ``<root>/<model>``. The lock is held for changes, never while files are copied."""

    def __init__(self, root: Path, model: str) -> None:
        check_model(model)
        self.model = model
        self.path = root / model
        self.staging = self.path / ".staging"
        self.leases = self.path / ".leases"
        self.journal = self.path / "journal.jsonl"
        self._state = self.path / "state.json"
        self._lock = self.path / ".lock"

    def version(self, number: int) -> Path:
        """Returns the folder of version ``number``."""
        return self.path / str(number)

    def versions(self) -> list[int]:
        """Returns the numbers of the versions, ascending: folders so named that have a manifest."""
        return [number for number in self.taken() if self.has(number)]

    def has(self, number: int) -> bool:
        """Returns whether there is a version ``number``."""
        folder = os.fspath(self.version(number))
        try:
            return stat.S_ISDIR(os.lstat(folder).st_mode) and stat.S_ISREG(os.lstat(f"{folder}/{MANIFEST}").st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def taken(self) -> list[int]:
        """Returns the numbers that anything at all is named after, ascending."""
        try:
            with os.scandir(self.path) as entries:
                names = [entry.name for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(number for name in names if (number := parse_version(name)) is not None)

    def create(self) -> None:
        """Makes the folder, if it is not there."""
        make_folders(self.staging)
        make_folders(self.leases)

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Holds the model's lock; waits for it.

        Raises:
            NotFoundError: if there is no such model.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self._lock))
            except (FileNotFoundError, NotADirectoryError) as exc:
                raise self.missing() from exc
            yield

    def missing(self) -> NotFoundError:
        """Returns what to say where there is no such model."""
        return NotFoundError(f"there is no model {self.model!r} in {self.path.parent.absolute()}")

    @contextlib.contextmanager
    def staged(self) -> Generator[Path]:
        """Yields an empty staging folder, which is removed at the end, whatever is left in it.

        It is made under the model's lock and locked before that is let go, so nobody ever sees one
        that lives and is not locked. The caller must not hold the model's lock.
        """
        folder = self.staging / uuid.uuid4().hex
        with self.lock():
            lock = self.make_staging(folder)
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):  # what stays is collected later
                self.remove_staging(folder)
            os.close(lock)

    def make_staging(self, folder: Path) -> int:
        """Makes the staging folder ``folder`` and returns the descriptor that locks it."""
        folder.mkdir(parents=True)
        try:
            lock = open_lock(folder / "lock")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(lock)
                raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return lock

    def take_leftover(self, folder: Path) -> int | None:
        """Returns the descriptor that locks a dead publisher's staging folder; None if it lives or is gone."""
        try:
            return try_lock(folder / "lock")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove_staging(self, folder: Path) -> None:
        """Removes a staging folder, which the caller has locked.

        Its lock goes last: who finds none may make one and take the folder over, and there is nothing in it then.
        """
        lock = folder / "lock"
        with contextlib.suppress(FileNotFoundError):
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != lock:
                    entry.unlink()
        lock.unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise

    def state(self) -> State:
        """Returns the desired state.

        Raises:
            IntegrityError: if the file is damaged or of a newer format.
        """
        try:
            data = read_bounded(self._state, MAX_STATE_BYTES, IntegrityError)
        except (FileNotFoundError, NotADirectoryError):
            return State()
        return read_state(parse(data, f"the state of {self.model}"))

    def write_state(self, state: State, changed: State) -> State:
        """Writes ``changed`` as the generation that follows ``state``, which the caller read under the lock."""
        changed = replace(changed, generation=state.generation + 1, aliases=dict(sorted(changed.aliases.items())))
        text = state_json(changed)
        if len(text) > MAX_STATE_BYTES:
            raise RegistryError(
                f"the state of {self.model} would take more than {MAX_STATE_BYTES >> 20} MiB: "
                "remove old versions with modelport gc"
            )
        replace_file(self._state, self.path / ".state.json.tmp", text)
        return changed

    def expect(self, state: State, generation: int | None) -> None:
        """Checks that nobody has changed the state since it had ``generation``; None is any.

        Raises:
            ConflictError: if somebody has.
        """
        if generation is not None and state.generation != generation:
            raise ConflictError(
                f"the state of {self.model} has generation {state.generation}, not {generation}: "
                "someone changed it; look again"
            )

    def record(
        self,
        action: str,
        *,
        version: int | None,
        reason: str = "",
        details: Mapping[str, JSON] | None = None,
        actor: str | None = None,
    ) -> None:
        """Adds a line to the journal."""
        _journal.append(self.journal, action, version=version, reason=reason, details=details, actor=actor)

    def change(self, state: State, wanted: State, change: Change) -> State:
        """Says in the journal what is done and writes ``wanted``; the caller read ``state`` under the lock.

        The journal comes first: no change goes unsaid, and what was said in vain is left out when it is read.
        """
        details: dict[str, JSON] = {_journal.GENERATION: state.generation + 1}
        if change.version is not None and (digest := self.digest(change.version)) is not None:
            details["manifest_sha256"] = digest
        before, after = state.aliases.get(STABLE), wanted.aliases.get(STABLE)
        if before != after:
            details["stable"] = {"before": before, "after": after}
        _journal.append(
            self.journal,
            change.action,
            version=change.version,
            reason=change.reason,
            details={**change.details, **details},
            actor=change.actor,
            fit=True,
        )
        return self.write_state(state, wanted)

    def digest(self, version: int) -> str | None:
        """Returns the SHA-256 of a version's manifest, which has that of every file; None if there is none."""
        try:
            data = read_bounded(self.version(version) / MANIFEST, MAX_MANIFEST_BYTES, IntegrityError)
        except (FileNotFoundError, NotADirectoryError, IntegrityError):
            return None
        return hashlib.sha256(data).hexdigest()

    def fsync(self) -> None:
        """Makes the names in the folder durable."""
        fsync_folder(self.path)
