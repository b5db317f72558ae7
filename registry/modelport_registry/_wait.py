"""Waiting for a version to come into service, by what the registry says; and whether a server could say it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from modelport import progress
from modelport.exceptions import NotFoundError, RolloutError, RolloutTimeoutError, VersionRejectedError
from modelport.names import shown
from modelport_registry._registry import Registry
from modelport_registry._rollout import Phase, Rollout
from modelport_registry._types import State
from modelport_registry.transitions import STABLE

_POLL_INTERVAL_S = 0.2
_ANSWER_WITHIN_S = 10.0
_SEEN_WITHIN_S = 3.0
"""How long a server may take to see what was published just now."""


def check_server(registry: Registry, model: str, server: str) -> None:
    """Makes sure, before a version is published, that a server will be able to tell how the version fares.

    Args:
        registry: where the version is going to be published.
        model: the model's name; the registry need not have it yet.
        server: the server's address.

    Raises:
        RpcError: if the server does not answer.
        RolloutError: if it does not serve the model as the registry has it.
    """
    from modelport import Client

    versions = registry.versions(model)
    deadline = time.monotonic() + _SEEN_WITHIN_S
    with Client(server, timeout_s=_ANSWER_WITHIN_S) as client:
        while True:
            try:
                known = [version.version for version in client.model(model).versions]
            except NotFoundError:
                if not versions:
                    return
                known = []
            if not versions or versions[-1] in known:
                return
            if time.monotonic() >= deadline:
                what = f"has no version {versions[-1]} of {model}" if known else f"does not serve {model}"
                where = shown(str(registry.root.absolute()))
                raise RolloutError(f"the server at {server} {what}, but {where} has: give the server on that registry")
            time.sleep(_POLL_INTERVAL_S)


def wait_until_stable(
    registry: Registry,
    model: str,
    version: int,
    *,
    timeout_s: float | None = None,
    on_progress: Callable[[str], None] | None = None,
    progress_every_s: float = progress.TELL_EVERY_S,
) -> State:
    """Returns as soon as a version is in charge; servers on the same registry bring it there.

    Args:
        registry: where the version was published.
        model: the model's name.
        version: the version to wait for.
        timeout_s: how long to wait, in seconds; None for as long as it takes.
        on_progress: called with a few words whenever the version has got further.
        progress_every_s: how often, in seconds, it is called within a phase, with how far that is.

    Returns:
        The model's desired state by then.

    Raises:
        NotFoundError: if there is no such version, or none any more.
        VersionRejectedError: if it is rejected or rolled back, with the gate and the reason.
        RolloutError: if it was replaced, or nothing will make it the candidate by itself.
        RolloutTimeoutError: if none of that has happened in time.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    teller = progress.Teller(on_progress, progress_every_s)
    while True:
        registry.resolve(model, version=version)
        state = registry.state(model)
        stable = is_stable(model, version, state, registry.versions(model))
        phase = phase_text(state, version)
        teller.tell(phase, figures_text(model, state, version, teller.phase_age_s(phase)))
        if stable:
            return state
        if deadline is not None and time.monotonic() >= deadline:
            raise RolloutTimeoutError(
                f"{model} version {version} was not in charge after {timeout_s:g} s: {teller.text}"
            )
        time.sleep(_POLL_INTERVAL_S)


def is_stable(model: str, version: int, state: State, versions: Sequence[int]) -> bool:
    """Returns whether a version is in charge; False while it may still come to be.

    Args:
        model: the model's name, for the errors.
        version: the version in question.
        state: what the registry asks for.
        versions: the versions that the registry has.

    Raises:
        VersionRejectedError: if it was rejected.
        RolloutError: if it will not come into service by itself, as things stand.
    """
    if state.aliases.get(STABLE) == version:
        return True
    if (rejection := state.rejected.get(version)) is not None:
        raise VersionRejectedError(model, version, gate=rejection.gate, reason=rejection.reason)
    if (reason := _hopeless(model, version, state, versions)) is not None:
        raise RolloutError(f"{model} version {version} {reason}")
    return False


def phase_text(state: State, version: int) -> str:
    """Returns in words where a version stands that is waited for."""
    rollout = state.rollout
    if state.aliases.get(STABLE) == version:
        return "it is in charge"
    if rollout is None:
        return "it waits for a server to take it up"
    if rollout.version != version:
        return progress.turn_text(rollout.version, watched=rollout.phase is Phase.WATCH)
    return _place_text(rollout)


def figures_text(model: str, state: State, version: int, age_s: float) -> str:
    """Returns in words how far the rollout under way is within its phase, as far as the registry knows it.

    Args:
        model: the model's name.
        state: what the registry asks for.
        version: the version that is waited for.
        age_s: how long it has been seen in this phase, in seconds.
    """
    rollout = state.rollout
    if rollout is None or rollout.phase is Phase.WATCH:
        return ""
    if rollout.version != version:
        return _place_text(rollout)
    if rollout.current is None or rollout.paused:
        return ""
    text = progress.time_text(age_s, rollout.current.bake_s)
    return (
        text if age_s < rollout.current.bake_s else f"{text}; for what it lacks, see: modelport rollout status {model}"
    )


def _place_text(rollout: Rollout) -> str:
    step, paused = rollout.current, ", paused" if rollout.paused else ""
    if step is None:
        return f"{rollout.phase.value}{paused}"
    return progress.step_text(rollout.step + 1, len(rollout.steps), step.kind.value, step.share) + paused


def _hopeless(model: str, version: int, state: State, versions: Sequence[int]) -> str | None:
    newer = [number for number in versions if number > version and number not in state.rejected]
    stable = state.aliases.get(STABLE)
    return progress.hopeless_text(
        model,
        version,
        under_way=None if state.rollout is None else state.rollout.version,
        last=None if state.last is None else (state.last.version, state.last.outcome),
        pinned=state.pin,
        manual=state.policy.manual,
        newer=newer[-1] if newer else None,
        tried=None if stable is None else max(stable, state.considered),
    )
