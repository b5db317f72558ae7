"""What may become of a model's desired state: pure functions from one state to the next.

Each raises ``RegistryError`` with one clear line where it makes no sense, and returns the state it was
given where there is nothing to change. ``Registry.change`` carries them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from modelport_registry._errors import RegistryError
from modelport_registry._policy import RolloutPolicy, Strategy
from modelport_registry._rollout import Ended, Phase, Rejection, Rollout
from modelport_registry._types import State

STABLE = "stable"
"""The alias of the version in charge."""

OUTCOMES = PROMOTED, REJECTED, ROLLED_BACK, REPLACED = "promoted", "rejected", "rolled back", "replaced"

_BY_HAND = "rollback"
_MOST_PROMOTIONS = 8
_MAX_REASON = 500
"""Characters of a reason that the state keeps."""


def candidate(state: State, versions: Iterable[int]) -> int | None:
    """Returns the version that should be rolled out by itself; None if there is none.

    It is the highest that was not rejected, if it is above the stable version and no version as high
    ever was a candidate. A watch does not hold it up unless it is paused. Without a stable version it is the
    highest that was not rejected.
    """
    under_way = state.rollout is not None and (state.rollout.phase is not Phase.WATCH or state.rollout.paused)
    if state.pin is not None or state.policy.manual or under_way:
        return None
    highest = max((number for number in versions if number not in state.rejected), default=None)
    stable = state.aliases.get(STABLE)
    if highest is None or (stable is not None and highest <= max(stable, state.considered)):
        return None
    return highest


def start(
    state: State,
    version: int,
    *,
    strategy: Sequence[Strategy] | None = None,
    rollout_id: str,
    now: datetime,
    actor: str,
    reason: str = "",
) -> State:
    """Makes a version the candidate; one that is only being watched ends its rollout for it."""
    stable = state.aliases.get(STABLE)
    if version in state.rejected:
        one = state.rejected[version]
        raise RegistryError(
            f"version {version} was rejected ({one.gate}: {one.reason}): approve it first, with "
            "modelport rollout approve"
        )
    if version == stable:
        raise RegistryError(f"version {version} is in charge already")
    if state.pin is not None:
        raise RegistryError(f"version {state.pin} is pinned: take the pin off first, with modelport pin --remove")
    if state.rollout is not None and state.rollout.phase is not Phase.WATCH:
        raise RegistryError(
            f"version {state.rollout.version} is being rolled out: wait for its end, or roll it back first"
        )
    if state.rollout is not None and state.rollout.paused:
        raise RegistryError(
            f"the watch of version {state.rollout.version} is paused: let it go on first, with modelport rollout resume"
        )
    if state.rollout is not None:
        state = complete(state, now)
    rollout = Rollout(
        id=rollout_id,
        version=version,
        previous=stable,
        steps=state.policy.plan(strategy) if stable is not None else (),
        started=now,
        actor=actor,
        reason=_cut(reason),
    )
    return replace(state, rollout=rollout, considered=max(state.considered, version))


def advance(state: State, baseline: Mapping[str, int] | None = None) -> State:
    """Takes the rollout to its next step, or makes the candidate stable after the last.

    Args:
        state: the state as it is.
        baseline: what the version before did in the phase or step that ends, as counts; added up over the rollout, so
            that a promoted candidate can be compared with it.
    """
    rollout = _under_way(state)
    if rollout.phase is Phase.WATCH:
        raise RegistryError(f"version {rollout.version} is in charge already")
    step = rollout.step + 1 if rollout.phase is Phase.STEP else 0
    rollout = replace(rollout, baseline=dict(Counter(rollout.baseline) + Counter(baseline or {})))
    if step < len(rollout.steps):
        return replace(state, rollout=replace(rollout, phase=Phase.STEP, step=step))
    return _promoted(state, rollout)


def _promoted(state: State, rollout: Rollout) -> State:
    aliases = {**state.aliases, STABLE: rollout.version}
    return replace(state, aliases=aliases, rollout=replace(rollout, phase=Phase.WATCH, step=0, paused=False))


def promote(state: State) -> State:
    """Drops the steps that are left: the candidate takes over once it has passed the gates."""
    rollout = _under_way(state)
    if rollout.phase is Phase.WATCH:
        raise RegistryError(f"version {rollout.version} is in charge already")
    if rollout.phase is Phase.STEP:
        return _promoted(state, rollout)
    return replace(state, rollout=replace(rollout, steps=(), paused=False))


def complete(state: State, now: datetime) -> State:
    """Ends the rollout of a version that is in charge."""
    rollout = _under_way(state)
    if rollout.phase is not Phase.WATCH:
        raise RegistryError(f"version {rollout.version} is not in charge yet")
    ended = Ended(rollout.version, rollout.previous, PROMOTED, "", now)
    return replace(state, rollout=None, last=ended, promotions=_with(state, ended))


def _with(state: State, ended: Ended) -> tuple[Ended, ...]:
    return (*state.promotions, ended)[-_MOST_PROMOTIONS:]


def promotion(state: State) -> Ended | None:
    """Returns how the version in charge came to be that; None if nobody knows."""
    return _promotion(state, state.aliases.get(STABLE))


def _promotion(state: State, version: int | None) -> Ended | None:
    return next((ended for ended in reversed(state.promotions) if ended.version == version), None)


def reject(state: State, version: int, gate: str, reason: str, now: datetime, actor: str) -> State:
    """Remembers that a version must not serve, ends its rollout, and puts its predecessor in charge again.

    A pin on it stays. Where nothing is left to go back to, another version that is being rolled out needs no steps.
    """
    if version in state.rejected:
        return state
    reason = _cut(reason)
    rejected = {**state.rejected, version: Rejection(gate, reason, now, actor)}
    changed = replace(state, rejected=rejected)
    mine = state.rollout if state.rollout is not None and state.rollout.version == version else None
    in_charge = state.aliases.get(STABLE) == version
    if mine is None and not in_charge:
        return changed
    outcome = REJECTED if mine is not None and mine.phase is Phase.GATES else ROLLED_BACK
    previous = predecessor(state, version)
    why = reason if gate == _BY_HAND else _cut(f"{gate}: {reason}")
    ended = Ended(version, previous, outcome, why, now)
    changed = replace(changed, rollout=None if mine is not None else state.rollout, last=ended)
    return _put_back(changed, version, previous) if in_charge else changed


def _put_back(state: State, version: int, previous: int | None) -> State:
    """Returns the state with ``previous`` in charge in place of ``version``; nothing if it must not serve either."""
    aliases = {name: number for name, number in state.aliases.items() if name != STABLE}
    if previous is None or previous in state.rejected:
        return _without_rival(replace(state, aliases=aliases))
    changed = replace(state, aliases={**aliases, STABLE: previous})
    if state.rollout is None or state.rollout.previous != version:
        return changed
    return replace(changed, rollout=replace(state.rollout, previous=previous, baseline={}))


def _without_rival(state: State) -> State:
    """Returns the state with a rollout that has nothing left to be compared with."""
    rollout = state.rollout
    if rollout is None or rollout.phase is Phase.WATCH:
        return state
    alone = replace(rollout, steps=(), previous=None, baseline={})
    return _promoted(state, alone) if rollout.phase is Phase.STEP else replace(state, rollout=alone)


def predecessor(state: State, version: int) -> int | None:
    """Returns the version that was in charge before ``version`` came, or before that one if it was rejected."""
    mine = state.rollout is not None and state.rollout.version == version
    first = state.rollout.previous if state.rollout is not None and mine else _before(state, version)
    passed: set[int] = {version}
    number = first
    while number is not None and number in state.rejected and number not in passed:
        passed.add(number)
        number = _before(state, number)
    return first if number is None or number in passed else number


def _before(state: State, version: int) -> int | None:
    promoted = next((ended for ended in reversed(state.promotions) if ended.version == version), None)
    return promoted.previous if promoted is not None else None


def forget(state: State, versions: Collection[int]) -> State:
    """Drops what is known of versions that are gone: the way back leads past them."""
    promotions: list[Ended] = []
    for place, ended in enumerate(state.promotions):
        previous = _still_there(state.promotions[:place], ended.previous, versions)
        leads = previous is not None or ended.previous is None
        if ended.version not in versions and leads and previous != ended.version:
            promotions.append(replace(ended, previous=previous))
    return replace(
        state,
        collected=max(state.collected, max(versions, default=0)),
        rejected={number: one for number, one in state.rejected.items() if number not in versions},
        promotions=tuple(promotions),
    )


def _still_there(older: Sequence[Ended], version: int | None, gone: Collection[int]) -> int | None:
    """Returns ``version``, or the one that was in charge before it and is not gone; None if there is none."""
    for ended in reversed(older):
        if version in gone and ended.version == version:
            version = ended.previous
    return None if version in gone else version


def _cut(reason: str) -> str:
    """Returns as much of a reason as the state keeps; the journal has all of it."""
    return reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 1]}…"


def rollback(state: State, reason: str, now: datetime, actor: str) -> State:
    """Ends the rollout under way and rejects its candidate; without one, puts the stable version's predecessor back."""
    reason = reason or f"{actor} asked for it"
    if state.rollout is not None and state.rollout.phase is Phase.WATCH and state.rollout.previous is None:
        raise RegistryError(
            f"version {state.rollout.version} is the first in charge: there is none to go back to; publish another"
        )
    if state.rollout is not None:
        return reject(state, state.rollout.version, _BY_HAND, reason, now, actor)
    if state.pin is not None:
        raise RegistryError(f"version {state.pin} is pinned: pin another one instead, with modelport pin")
    stable = state.aliases.get(STABLE)
    previous = predecessor(state, stable) if stable is not None else None
    if stable is None or previous is None:
        raise RegistryError(
            "nothing is being rolled out, and there is no version to go back to that was in charge and was not "
            "rejected: choose one with modelport pin"
        )
    if previous in state.rejected:
        raise RegistryError(
            f"version {previous}, which was in charge before, was rejected: choose another with modelport pin"
        )
    return reject(state, stable, _BY_HAND, reason, now, actor)


def pause(state: State) -> State:
    """Keeps the rollout in its step; it still rolls back by itself."""
    return replace(state, rollout=replace(_under_way(state), paused=True))


def resume(state: State) -> State:
    """Lets a rollout go on."""
    return replace(state, rollout=replace(_under_way(state), paused=False))


def approve(
    state: State,
    version: int,
    *,
    strategy: Sequence[Strategy] | None = None,
    rollout_id: str,
    now: datetime,
    actor: str,
    reason: str = "",
) -> State:
    """Forgets that a version was rejected and starts a rollout of it; one that is pinned is in charge at once."""
    if version not in state.rejected and not state.policy.manual:
        raise RegistryError(f"version {version} is not rejected: there is nothing to approve")
    rejected = {number: one for number, one in state.rejected.items() if number != version}
    approved = replace(state, rejected=rejected)
    if version == state.pin:
        return replace(approved, aliases={**state.aliases, STABLE: version})
    if version == state.aliases.get(STABLE):
        return approved
    return start(approved, version, strategy=strategy, rollout_id=rollout_id, now=now, actor=actor, reason=reason)


def pin(state: State, version: int | None, now: datetime) -> State:
    """Puts a version in charge, the present one by default, and has nothing rolled out until the pin is off."""
    number = state.aliases.get(STABLE) if version is None else version
    if number is None:
        raise RegistryError("no version is in charge yet: name the one to pin")
    if number in state.rejected:
        one = state.rejected[number]
        raise RegistryError(f"version {number} was rejected ({one.gate}: {one.reason}): approve it first")
    changed = replace(state, pin=number, aliases={**state.aliases, STABLE: number})
    rollout = state.rollout
    if rollout is None:
        return changed
    outcome = PROMOTED if rollout.phase is Phase.WATCH and rollout.version == number else REPLACED
    ended = Ended(rollout.version, rollout.previous, outcome, f"version {number} was pinned", now)
    promotions = _with(state, ended) if outcome == PROMOTED else state.promotions
    return replace(changed, rollout=None, last=ended, promotions=promotions)


def point(state: State, alias: str, version: int, now: datetime) -> State:
    """Points an alias at a version; ``stable`` pins it, since who moves it by hand does not want to see it moved."""
    if alias == STABLE:
        return pin(state, version, now)
    return replace(state, aliases={**state.aliases, alias: version})


def unpoint(state: State, alias: str, now: datetime) -> State:
    """Removes an alias; without ``stable`` there is no pin either, and no version that is watched."""
    aliases = {name: number for name, number in state.aliases.items() if name != alias}
    changed = replace(state, aliases=aliases)
    if alias != STABLE:
        return changed
    changed = replace(changed, pin=None)
    rollout = state.rollout
    if rollout is None or rollout.phase is not Phase.WATCH:
        return _without_rival(changed)
    ended = Ended(rollout.version, rollout.previous, REPLACED, "the alias stable was removed", now)
    return replace(changed, rollout=None, last=ended)


def unpin(state: State) -> State:
    """Takes the pin off: versions are rolled out by themselves again."""
    return replace(state, pin=None)


def set_policy(state: State, policy: RolloutPolicy) -> State:
    """Changes the rules; the plan of a rollout under way stays as it is."""
    shares = [step.share for step in policy.canary_steps]
    if shares != sorted(shares):
        raise RegistryError("a canary's shares must not fall from step to step")
    return replace(state, policy=policy)


def _under_way(state: State) -> Rollout:
    if state.rollout is None:
        raise RegistryError("no rollout is under way")
    return state.rollout
