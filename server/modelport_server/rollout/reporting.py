"""What people and callers are told of a model's versions and of its rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from modelport_registry import Phase
from modelport_registry import State as Desired
from modelport_registry.transitions import STABLE
from modelport_server.rollout.bake import Bake
from modelport_server.rollout.lifecycle import State
from modelport_server.rollout.policy import in_charge
from modelport_server.rollout.status import (
    ModelStatus,
    RolloutStatus,
    RolloutVersion,
    SignatureStatus,
    StepStatus,
    VersionStatus,
)
from modelport_server.rollout.tracking import Tracked
from modelport_server.signatures import is_batchable

Versions = Mapping[int, Tracked]


def state_text(tracked: Tracked) -> str:
    """Returns a version's state with its reason, for messages."""
    return f"{tracked.state.value} ({tracked.reason})" if tracked.reason else tracked.state.value


def progress_text(desired: Desired) -> str:
    """Returns where the rollout is, or how the last one ended, to follow a model's name; empty if there was none."""
    rollout, last = desired.rollout, desired.last
    if rollout is None:
        return "" if last is None else f"@{last.version}: {last.outcome}{f': {last.reason}' if last.reason else ''}"
    step = rollout.current
    where = {Phase.GATES: "candidate, in the gates", Phase.WATCH: "in charge, and watched"}.get(rollout.phase, "")
    if step is not None:
        where = f"step {rollout.step + 1} of {len(rollout.steps)}, {step.kind.value} of {100 * step.share:.4g}%"
    return f"@{rollout.version}: {where}{', paused' if rollout.paused else ''}"


def explain_idle(name: str, versions: Versions, desired: Desired) -> None:
    """Says of a version that is not being loaded why it is not."""
    wanted = in_charge(desired)
    if wanted is None:
        return
    why = f"version {wanted} is pinned" if desired.pin == wanted else f"version {wanted} is in charge"
    if desired.pin not in (None, wanted):
        why += f", and version {desired.pin}, which is pinned, was rejected"
    if desired.pin is None and desired.policy.manual:
        why += f"; start it with: modelport rollout start {name} VERSION"
    candidate = desired.rollout.version if desired.rollout is not None else None
    for number, tracked in versions.items():
        part = number in (wanted, candidate, *desired.aliases.values())
        if tracked.state is State.DISCOVERED and not part:
            tracked.reason = f"not loaded: {why}"


def model_status(name: str, versions: Versions, desired: Desired, serving: int | None) -> ModelStatus:
    """Returns what ``ModelService`` tells of a model."""
    return ModelStatus(
        name=name,
        serving=serving,
        aliases=desired.aliases,
        versions=tuple(_version_status(versions[number]) for number in sorted(versions, reverse=True)),
    )


def _version_status(tracked: Tracked) -> VersionStatus:
    servable, manifest = tracked.servable, tracked.manifest
    signatures: tuple[SignatureStatus, ...] = ()
    if servable is not None and servable.signatures:
        served = [servable.signatures[name] for name in sorted(servable.signatures)]
        signatures = tuple(SignatureStatus(signature.spec, signature.batched) for signature in served)
    elif manifest is not None:
        specs = [manifest.signatures[name] for name in sorted(manifest.signatures)]
        signatures = tuple(SignatureStatus(spec, is_batchable(spec)) for spec in specs)
    return VersionStatus(
        version=tracked.version,
        state=tracked.state,
        reason=tracked.reason,
        since=tracked.since,
        engine=servable.engine_name if servable is not None else "",
        engines=servable.attempts if servable is not None else (),
        parallelism=servable.parallelism if servable is not None and servable.engine_name else None,
        max_batch_size=servable.batch_size if servable is not None and servable.engine_name else 0,
        golden_examples=servable.golden_examples if servable is not None else 0,
        signatures=signatures,
        metrics=dict(manifest.metrics) if manifest is not None else {},
    )


def rollout_status(name: str, versions: Versions, desired: Desired, bake: Bake, share: float) -> RolloutStatus:
    """Returns what ``RolloutService`` tells of a model.

    Args:
        name: the model.
        versions: what is known of its versions.
        desired: what the registry asks for.
        bake: the comparison, if one is made.
        share: the share of the calls that a canary has, 0 to 1.
    """
    rollout, last, verdict = desired.rollout, desired.last, bake.verdict(desired)
    shown = RolloutStatus(
        model=name,
        generation=desired.generation,
        stable=desired.aliases.get(STABLE),
        pin=desired.pin,
        considered=desired.considered,
        last_version=last.version if last is not None else None,
        last_outcome=last.outcome if last is not None else "",
        last_reason=last.reason if last is not None else "",
        rejected={n: f"{one.gate}: {one.reason}" for n, one in desired.rejected.items()},
        verdict=verdict.reason if verdict is not None else "",
        figures=verdict.figures if verdict is not None else {},
        versions=tuple(_parts(versions, desired, bake, share)),
    )
    if rollout is None:
        return shown
    return replace(
        shown,
        id=rollout.id,
        phase=rollout.phase.value,
        version=rollout.version,
        previous=rollout.previous,
        steps=tuple(StepStatus(kind=s.kind.value, share=s.share, bake_s=s.bake_s) for s in rollout.steps),
        step=rollout.step,
        paused=rollout.paused,
        phase_age_s=bake.age_s,
        bake_s=rollout.current.bake_s if rollout.current is not None else desired.policy.watch_s,
    )


def _parts(versions: Versions, desired: Desired, bake: Bake, share: float) -> Iterator[RolloutVersion]:
    rollout = desired.rollout
    places = {in_charge(desired): "stable"}
    if rollout is not None:
        watched = rollout.phase is Phase.WATCH
        places.setdefault(rollout.previous if watched else rollout.version, "previous" if watched else "candidate")
    shares = {"stable": 1.0 - share, "candidate": share, "previous": 0.0}
    for number, place in places.items():
        if number is not None and number in versions:
            yield RolloutVersion(
                version=number,
                place=place,
                state=versions[number].state,
                share=shares[place],
                gates=versions[number].gates,
                traffic=bake.traffic(number),
            )
