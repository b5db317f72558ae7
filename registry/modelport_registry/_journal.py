"""A model's journal: one JSON object a line, append only."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from modelport_registry._errors import IntegrityError, RegistryError
from modelport_registry._files import read_tail
from modelport_registry._json import JSON, Fields, parse
from modelport_registry._manifest import read_time
from modelport_registry._types import JournalEntry

MAX_LINE_BYTES = 64 << 10
GENERATION = "new_generation"
"""The detail that announces a change of the desired state: the generation that it makes."""
_MAX_DETAILS_BYTES = 48 << 10
_MAX_REASON = 1000
"""Characters of a reason where a line has to fit: each may take 6 bytes, or 12."""
_MAX_ACTOR = 200
"""Characters of who did it, there."""
MAX_READ_BYTES = 64 << 20
"""A longer journal is read from its end."""


def actor() -> str:
    """Returns who is doing this: user and machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{os.uname().nodename}"


def append(
    path: Path,
    action: str,
    *,
    version: int | None,
    reason: str,
    details: Mapping[str, JSON] | None,
    actor: str | None = None,
    fit: bool = False,
) -> None:
    """Adds one line, through to the disk.

    Args:
        path: the journal.
        action: what is done.
        version: what it is done to.
        reason: why.
        details: anything else.
        actor: who does it; user and machine by default.
        fit: leave out the largest details of a line that is too long, and the ends of long texts.

    Raises:
        RegistryError: if the line is too long, or holds something that JSON has not.
    """
    if fit:
        reason, details = _fitting(reason, details or {})
        actor = actor and actor[:_MAX_ACTOR]
    line = _line(action, version, reason, details or {}, actor)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        # A writer that died may have left half a line: it must not swallow this one.
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = b"\n" + line if torn else line
        written = os.write(descriptor, data)
        if written != len(data):
            raise RegistryError(f"{path.name}: the disk took {written} of a line's {len(data)} bytes")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[JournalEntry]:
    """Returns the entries, oldest first; lines that were torn are left out.

    There may be changes among them that were never made; ``in_effect`` leaves them out.
    """
    entries: list[JournalEntry] = []
    for line in read_tail(path, MAX_READ_BYTES, IntegrityError).splitlines():
        try:
            entries.append(_entry(parse(line, "the journal")))
        except IntegrityError:
            continue
    return entries


def in_effect(entries: list[JournalEntry], generation: int) -> list[JournalEntry]:
    """Returns the entries without those whose writer died, or failed, between the journal and the state.

    Such a change was to make a generation that the next change made instead, or that is still to come.

    Args:
        entries: what was read, oldest first.
        generation: that of the state; read after them.
    """
    kept: list[JournalEntry] = []
    following: JSON = generation + 1
    for entry in reversed(entries):
        makes = entry.details.get(GENERATION)
        if makes is None or makes != following:
            kept.append(entry)
        following = following if makes is None else makes
    return kept[::-1]


def _fitting(reason: str, details: Mapping[str, JSON]) -> tuple[str, Mapping[str, JSON]]:
    """Returns as much as a line has room for: a decision must not fail because there is too much to say of it."""
    kept = dict(details)
    size = len(_dumped(kept))
    if size > _MAX_DETAILS_BYTES:
        sizes = {name: len(_dumped(value)) for name, value in kept.items() if name != GENERATION}
        for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
            kept[name] = None
            size -= sizes[name] - len(_dumped(None))
            if size <= _MAX_DETAILS_BYTES:
                break
        else:  # their names alone are too long
            kept = {name: value for name, value in kept.items() if name == GENERATION}
    return reason[:_MAX_REASON], kept


def _dumped(value: JSON) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError) as exc:
        raise RegistryError(f"the journal's details must be JSON: {exc}") from exc


def _line(action: str, version: int | None, reason: str, details: Mapping[str, JSON], who: str | None) -> bytes:
    document: dict[str, JSON] = {
        "time": datetime.now(UTC).isoformat(),
        "action": action,
        "version": version,
        "actor": who or actor(),
        "reason": reason,
        "details": dict(details),
    }
    line = _dumped(document) + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise RegistryError(f"a journal line takes at most {MAX_LINE_BYTES} bytes, this has {len(line)}")
    return line


def _entry(fields: Fields) -> JournalEntry:
    return JournalEntry(
        time=read_time(fields, "time"),
        action=fields.text("action"),
        version=fields.optional_integer("version", at_least=1),
        actor=fields.text("actor"),
        reason=fields.text("reason"),
        details=fields.mapping("details", Fields.any),
    )
