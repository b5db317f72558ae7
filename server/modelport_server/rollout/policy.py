"""What to do next about one model: a pure function of what is.

It takes a snapshot and returns at most one action. Its caller carries the action out and asks again,
so that it needs no memory and may be asked at any time.

There are two kinds of action. Steps change what this server has loaded and which version answers.
Decisions change what the registry asks for, and so what every server does; the registry takes a
decision only if nobody has changed anything since the snapshot was taken.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from modelport_registry import Phase, Rollout, StepKind, transitions
from modelport_registry import State as Desired
from modelport_registry.transitions import STABLE, promotion
from modelport_server.rollout.comparison import Verdict, VerdictKind
from modelport_server.rollout.lifecycle import COMING, LOADED, State

STREAM_END_S = 5.0
"""How long streams that were told to end may take; one whose caller reads nothing never would."""
LONGEST_WATCH = 5.0
"""How many times as long a version is watched while it may be worse, and nothing tells for sure."""
LAST_CALLS_S = 5.0
"""How long a version that was rejected may go on with what it runs; then its callers are told to try again."""


class Verb(enum.Enum):
    """What can be done with a version."""

    LOAD = "load"
    ABANDON = "abandon"
    """End a loading that nobody wants any more."""
    SERVE = "serve"
    DRAIN = "drain"
    REVIVE = "revive"
    END_STREAMS = "end streams"
    RETIRE = "retire"
    COMPARE = "compare"
    """Put a candidate that was loaded before it was one through the gates that take the stable version."""
    START = "start"
    """Decide: the version becomes the candidate."""
    ADVANCE = "advance"
    """Decide: the candidate goes on to the next step, or takes over after the last."""
    COMPLETE = "complete"
    """Decide: the rollout is over, the version stays."""
    ROLL_BACK = "roll back"
    """Decide: the candidate is worse than the version before it."""


DECISIONS = frozenset({Verb.START, Verb.ADVANCE, Verb.COMPLETE, Verb.ROLL_BACK})


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
    compared: str = ""
    """The rollout in which it was compared with the stable version, in its signatures and in speed."""
    comparing: bool = False
    """Whether that is under way apart from loading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSnapshot:
    """One model as it is."""

    versions: Mapping[int, VersionSnapshot]
    desired: Desired = field(default_factory=Desired)
    """What the registry asks for."""
    serving: int | None
    """The version that answers calls which name none, on this server."""
    max_beside_stable: int
    pinned_stream_limit_s: float
    phase_age_s: float = 0.0
    """How long this server has seen the rollout in its present phase and step, pauses left out, in seconds."""
    promoted_age_s: float = float("inf")
    """How long ago this server saw the rollout of the version in charge end, in seconds."""
    verdict: Verdict | None = None
    """How the candidate does beside the stable version; None where nothing is compared."""
    deciding: bool = False
    """Whether a decision is on its way to the registry."""
    listing_is_current: bool = True
    """Whether the versions were listed after the desired state was written."""


def in_charge(desired: Desired) -> int | None:
    """Returns the version that should answer calls which name none: the pinned one, or else ``stable``.

    A pin on a version that was rejected holds up rollouts, but not the traffic.
    """
    pinned = desired.pin is not None and desired.pin not in desired.rejected
    return desired.pin if pinned else desired.aliases.get(STABLE)


def charge(snapshot: ModelSnapshot) -> int | None:
    """Returns the version that should be in charge of a model."""
    return in_charge(snapshot.desired)


def share(snapshot: ModelSnapshot) -> tuple[int, StepKind, float] | None:
    """Returns the candidate, what it gets, and which share of the calls that name no version; None without one."""
    rollout = snapshot.desired.rollout
    step = rollout.current if rollout is not None else None
    if rollout is None or step is None or not _has_passed(snapshot, rollout):
        return None
    return rollout.version, step.kind, step.share


def next_action(snapshot: ModelSnapshot) -> Action | None:
    """Returns the next step towards what the registry asks for, or None if there is nothing to do."""
    wanted = charge(snapshot)
    if wanted is not None and wanted != snapshot.serving and _state(snapshot, wanted) is State.AVAILABLE:
        return Action(Verb.SERVE, wanted)
    if (comparison := _comparison(snapshot)) is not None:
        return comparison
    decision = None if snapshot.deciding else _decision(snapshot)
    return decision or _let_go(snapshot) or _bring_in(snapshot)


def _has_passed(snapshot: ModelSnapshot, rollout: Rollout) -> bool:
    """Returns whether the candidate has passed every gate here."""
    candidate = snapshot.versions.get(rollout.version)
    return candidate is not None and candidate.state is State.AVAILABLE and candidate.compared == rollout.id


def _comparison(snapshot: ModelSnapshot) -> Action | None:
    rollout = snapshot.desired.rollout
    if rollout is None or rollout.phase is Phase.WATCH:
        return None
    candidate = snapshot.versions.get(rollout.version)
    if candidate is None or candidate.state is not State.AVAILABLE or candidate.comparing:
        return None
    return None if candidate.compared == rollout.id else Action(Verb.COMPARE, rollout.version)


def _decision(snapshot: ModelSnapshot) -> Action | None:
    rollout = snapshot.desired.rollout
    if rollout is not None and (action := _judged(snapshot, rollout)) is not None:
        return action
    known = [number for number, version in snapshot.versions.items() if version.in_registry]
    candidate = transitions.candidate(snapshot.desired, known)
    return Action(Verb.START, candidate) if candidate is not None else None


def _judged(snapshot: ModelSnapshot, rollout: Rollout) -> Action | None:
    """Returns what the rollout's evidence asks for."""
    verdict = snapshot.verdict.kind if snapshot.verdict is not None else None
    if verdict is VerdictKind.WORSE and rollout.phase is not Phase.GATES:
        return Action(Verb.ROLL_BACK, rollout.version)
    if rollout.version not in snapshot.versions:  # its folder is gone and it is not loaded, or it is not listed yet
        return Action(Verb.ROLL_BACK, rollout.version) if snapshot.listing_is_current else None
    if rollout.paused:
        return None
    if rollout.phase is Phase.WATCH:
        watch_s = snapshot.desired.policy.watch_s * (LONGEST_WATCH if verdict is VerdictKind.DOUBTFUL else 1.0)
        return Action(Verb.COMPLETE, rollout.version) if snapshot.phase_age_s >= watch_s else None
    if not _has_passed(snapshot, rollout):
        return None
    if rollout.phase is Phase.GATES or (
        rollout.current is not None
        and snapshot.phase_age_s >= rollout.current.bake_s
        and verdict is VerdictKind.FINE
    ):  # fmt: skip
        return Action(Verb.ADVANCE, rollout.version)
    return None


def _state(snapshot: ModelSnapshot, number: int) -> State | None:
    return snapshot.versions[number].state if number in snapshot.versions else None


def aspired(snapshot: ModelSnapshot) -> list[int]:
    """Returns the versions that should be loaded, the most important first."""
    desired, rollout = snapshot.desired, snapshot.desired.rollout
    order = [charge(snapshot)]
    if rollout is not None:
        order.append(rollout.version)
        if rollout.phase is Phase.WATCH:
            order.append(rollout.previous)
    order += sorted(desired.aliases.values(), reverse=True)
    return list(dict.fromkeys(number for number in order if number is not None and number not in desired.rejected))


def _kept_warm(snapshot: ModelSnapshot) -> int | None:
    """Returns the version that stays loaded for a while after its successor has proved itself."""
    desired, promoted = snapshot.desired, promotion(snapshot.desired)
    if promoted is None or promoted.previous in desired.rejected:
        return None
    if snapshot.promoted_age_s >= desired.policy.keep_warm_s:
        return None
    return promoted.previous


def _let_go(snapshot: ModelSnapshot) -> Action | None:
    wanted = aspired(snapshot)
    for number, version in sorted(snapshot.versions.items()):
        if number in wanted:
            if version.state is State.DRAINING and not version.streams_ended:
                return Action(Verb.REVIVE, number)
        elif version.state in COMING:
            return Action(Verb.ABANDON, number)
        elif version.state is State.AVAILABLE and number not in (snapshot.serving, _kept_warm(snapshot)):
            return Action(Verb.DRAIN, number)
        if version.state is State.DRAINING and (action := _drained(snapshot, number, version)) is not None:
            return action
    return None


def _drained(snapshot: ModelSnapshot, number: int, version: VersionSnapshot) -> Action | None:
    if version.leases == 0 and (version.streams == 0 or version.streams_ended_s > STREAM_END_S):
        return Action(Verb.RETIRE, number)
    rejected = number in snapshot.desired.rejected  # nobody should get another answer of it
    if rejected and version.age_s > LAST_CALLS_S and (version.streams == 0 or version.streams_ended):
        return Action(Verb.RETIRE, number)
    overdue = version.age_s > snapshot.pinned_stream_limit_s
    return Action(Verb.END_STREAMS, number) if (rejected or overdue) and not version.streams_ended else None


def _bring_in(snapshot: ModelSnapshot) -> Action | None:
    versions = snapshot.versions
    if any(version.state in COMING for version in versions.values()):
        return None
    number = next((number for number in aspired(snapshot) if _may_load(versions.get(number))), None)
    if number is None:
        return None
    kept = {snapshot.serving, charge(snapshot), *snapshot.desired.aliases.values()}
    beside = [other for other, version in versions.items() if version.state in LOADED and other not in kept]
    if number in kept or len(beside) < snapshot.max_beside_stable:
        return Action(Verb.LOAD, number)
    warm = _kept_warm(snapshot)
    if warm in beside and versions[warm].state is State.AVAILABLE:
        return Action(Verb.DRAIN, warm)
    draining = [n for n in beside if versions[n].state is State.DRAINING]
    if not draining or any(versions[n].streams_ended or not versions[n].streams for n in draining):
        return None  # there will be room soon
    return Action(Verb.END_STREAMS, max(draining, key=lambda n: versions[n].age_s))


def _may_load(version: VersionSnapshot | None) -> bool:
    loadable = version is not None and version.state in (State.DISCOVERED, State.RETIRED)
    return version is not None and loadable and version.in_registry and not version.put_off
