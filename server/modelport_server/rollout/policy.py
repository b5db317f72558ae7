"""What to do next about one model: a pure function of what is.

It takes a snapshot and returns at most one action. Its caller carries the action out and asks again,
so that it needs no memory and may be asked at any time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

STABLE = "stable"
STREAM_END_S = 5.0
"""How long streams that were told to end may take; one whose caller reads nothing never would."""


class State(enum.Enum):
    """Where a version is in its life."""

    DISCOVERED = "discovered"
    VERIFYING = "verifying"
    LOADING = "loading"
    WARMING = "warming"
    AVAILABLE = "available"
    DRAINING = "draining"
    RETIRED = "retired"
    REJECTED = "rejected"


COMING = frozenset({State.VERIFYING, State.LOADING, State.WARMING})
LOADED = COMING | {State.AVAILABLE, State.DRAINING}


class Verb(enum.Enum):
    """What can be done with a version."""

    LOAD = "load"
    SERVE = "serve"
    DRAIN = "drain"
    REVIVE = "revive"
    END_STREAMS = "end streams"
    RETIRE = "retire"


@dataclass(frozen=True, slots=True)
class Action:
    """One step."""

    verb: Verb
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSnapshot:
    """One version as it is."""

    state: State
    leases: int = 0
    """How many calls it has under way."""
    streams: int = 0
    """How many streams are pinned to it."""
    age_s: float = 0.0
    """How long it has been in its state, in seconds."""
    in_registry: bool = True
    streams_ended: bool = False
    """Whether its streams have been told to end."""
    streams_ended_s: float = 0.0
    """How long ago, in seconds."""
    put_off: bool = False
    """Whether it could not be read, and it is too early to try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSnapshot:
    """One model as it is."""

    versions: Mapping[int, VersionSnapshot]
    aliases: Mapping[str, int]
    serving: int | None
    max_beside_stable: int
    pinned_stream_limit_s: float


def charge(snapshot: ModelSnapshot) -> int | None:
    """Returns the version that should answer calls which name none.

    That is the one with the alias ``stable``, else the highest that has not been rejected. A version
    that serves goes on counting when its folder has been deleted.
    """
    if STABLE in snapshot.aliases:
        return snapshot.aliases[STABLE]
    candidates = [
        number
        for number, version in snapshot.versions.items()
        if version.state is not State.REJECTED and (version.in_registry or number == snapshot.serving)
    ]
    return max(candidates, default=None)


def next_action(snapshot: ModelSnapshot) -> Action | None:
    """Returns the next step towards what the registry asks for, or None if there is nothing to do."""
    wanted = charge(snapshot)
    aspired = {number for number in (wanted, *snapshot.aliases.values()) if number is not None}
    best = _best(snapshot, wanted)
    if best is not None and best != snapshot.serving:
        return Action(Verb.SERVE, best)
    return _let_go(snapshot, aspired) or _bring_in(snapshot, wanted, aspired)


def _best(snapshot: ModelSnapshot, wanted: int | None) -> int | None:
    """Returns the version that should answer from now on, of those that can.

    Without an alias a newer version than the present one is taken even while the newest is still
    loading, so that versions in quick succession do not keep each other from traffic.
    """
    available = [n for n, version in snapshot.versions.items() if version.state is State.AVAILABLE]
    if wanted in available:
        return wanted
    if STABLE in snapshot.aliases:
        return snapshot.serving
    newer = [n for n in available if n > (snapshot.serving or 0)]
    return max(newer, default=snapshot.serving)


def _state(versions: Mapping[int, VersionSnapshot], number: int) -> State | None:
    return versions[number].state if number in versions else None


def _may_load(version: VersionSnapshot) -> bool:
    return version.in_registry and not version.put_off


def _let_go(snapshot: ModelSnapshot, aspired: set[int]) -> Action | None:
    for number, version in sorted(snapshot.versions.items()):
        if version.state is State.AVAILABLE and number not in aspired and number != snapshot.serving:
            return Action(Verb.DRAIN, number)
        if version.state is State.DRAINING:
            if number in aspired and not version.streams_ended:
                return Action(Verb.REVIVE, number)
            if version.leases == 0 and (version.streams == 0 or version.streams_ended_s > STREAM_END_S):
                return Action(Verb.RETIRE, number)
            if version.age_s > snapshot.pinned_stream_limit_s and not version.streams_ended:
                return Action(Verb.END_STREAMS, number)
    return None


def _bring_in(snapshot: ModelSnapshot, wanted: int | None, aspired: set[int]) -> Action | None:
    versions = snapshot.versions
    if any(version.state in COMING for version in versions.values()):
        return None
    loadable = (State.DISCOVERED, State.RETIRED)
    order = sorted(aspired, key=lambda number: (number != wanted, -number))
    number = next((n for n in order if _state(versions, n) in loadable and _may_load(versions[n])), None)
    if number is None:
        return None
    beside = [n for n, v in versions.items() if v.state in LOADED and n != snapshot.serving and n not in aspired]
    if len(beside) < snapshot.max_beside_stable:
        return Action(Verb.LOAD, number)
    draining = [n for n in beside if versions[n].state is State.DRAINING and not versions[n].streams_ended]
    if draining and len(draining) == len(beside):
        return Action(Verb.END_STREAMS, max(draining, key=lambda n: versions[n].age_s))
    return None
