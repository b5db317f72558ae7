"""What a server says about rollouts, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TypeVar, cast

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from modelport._models import VersionState, version_state
from modelport.exceptions import InputError
from modelport.v1 import rollout_pb2 as pb

T = TypeVar("T")
Figures = Mapping[str, Any]
"""Numbers and texts, nested as in JSON."""


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """One step of a rollout's plan."""

    kind: str
    """``shadow`` or ``canary``."""
    share: float
    """Of the calls that name no version, above 0 and at most 1."""
    bake_s: float
    """How long it lasts at least, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A rollout under way."""

    id: str
    """Its own name, the same on every server."""
    version: int
    """The candidate."""
    previous: int | None
    """The version in charge when it began; None if there was none."""
    steps: tuple[RolloutStep, ...]
    """Its plan."""
    phase: str
    """``gates``, ``step`` or ``watch``."""
    step: int
    """The index into ``steps`` while the phase is ``step``."""
    paused: bool
    """Whether it stays where it is until it is resumed."""
    phase_age_s: float
    """How long the server has seen the present phase or step, in seconds."""
    bake_s: float
    """How long the present step, or the watch, lasts at least, in seconds."""

    @property
    def current(self) -> RolloutStep | None:
        """The present step; None in other phases."""
        return self.steps[self.step] if self.phase == "step" and self.step < len(self.steps) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GateInfo:
    """How a gate ended."""

    gate: str
    """Its name, such as ``golden``."""
    outcome: str
    """``passed``, ``failed`` or ``skipped``."""
    duration_s: float
    """How long it took, in seconds."""
    figures: Figures
    """What was measured."""
    reason: str
    """Why it failed or was skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a version answered since the present step of its rollout began."""

    calls: int
    """Calls that it answered or failed."""
    errors: int
    """Those that it failed."""
    calls_per_s: float
    """Over the last seconds."""
    p50_ms: float
    """The median from a call's arrival to its answer, in milliseconds."""
    p99_ms: float
    """The time within which 99 of 100 were answered, in milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutVersion:
    """A version's part in a rollout."""

    version: int
    """Its number."""
    place: str
    """``stable``, ``candidate`` or ``previous``."""
    state: VersionState
    """Where it stands in its life, on this server."""
    share: float
    """Of the calls that name no version, 0 to 1."""
    gates: tuple[GateInfo, ...]
    """Those that have ended, in their order."""
    traffic: Traffic | None
    """None while nothing is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRollout:
    """How a rollout ended."""

    version: int
    """What was the candidate."""
    outcome: str
    """``promoted``, ``rejected``, ``rolled back`` or ``replaced``."""
    reason: str
    """Why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why a version is not tried again."""

    gate: str
    """The gate that it failed; ``bake`` or ``rollback`` for what came after them, ``crash`` for a failing engine."""
    reason: str
    """What was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutInfo:
    """A model's rollout as one server sees it."""

    model: str
    """The model's name."""
    generation: int
    """Of the registry's state; grows with every change."""
    stable: int | None
    """The version in charge; None before the first."""
    pinned: int | None
    """The pinned version; None if none is."""
    rollout: Rollout | None
    """The rollout under way."""
    versions: tuple[RolloutVersion, ...]
    """Those that have a part in it, the one in charge first."""
    verdict: str
    """What the comparison says for now, in one line."""
    figures: Figures
    """The numbers behind the verdict."""
    last: EndedRollout | None
    """How the last rollout ended."""
    rejected: Mapping[int, Rejection]
    """The versions that are not tried again unless they are approved."""
    considered: int | None = None
    """The highest version that ever was a candidate; by itself only a higher one becomes one."""

    @property
    def candidate(self) -> RolloutVersion | None:
        """The candidate's part; None if no rollout is under way."""
        wanted = None if self.rollout is None else self.rollout.version
        return next((version for version in self.versions if version.version == wanted), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutState:
    """What the registry asks of every server."""

    generation: int
    """Grows with every change."""
    stable: int | None
    """The version in charge; None before the first."""
    pinned: int | None
    """The pinned version; None if none is."""
    candidate: int | None
    """The candidate; None if no rollout is under way."""
    phase: str
    """``gates``, ``step`` or ``watch``; empty if no rollout is under way."""
    step: int
    """The index of the step while the phase is ``step``."""
    paused: bool
    """Whether the rollout under way is paused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPolicy:
    """How a model's versions come into service; what is None is as the server's defaults say."""

    strategy: tuple[str, ...] = ()
    """``immediate``, ``canary``, ``shadow``, ``manual`` in their order; none for the default."""
    canary_steps: tuple[RolloutStep, ...] = ()
    """The steps of ``canary``; none for the default."""
    shadow_share: float | None = None
    """Of the calls, copied to a shadow."""
    shadow_bake_s: float | None = None
    """How long, in seconds."""
    watch_s: float | None = None
    """How long a promoted version is compared with what the one before it did, in seconds."""
    keep_warm_s: float | None = None
    """How long the one before it stays loaded after that, in seconds."""
    min_calls: int | None = None
    """The candidate's calls that a step needs before it may pass."""
    max_error_increase: float | None = None
    """By how much its rate of errors may be higher, as a difference."""
    max_latency_ratio: float | None = None
    """How many times the latency of the version in charge its own may be."""
    max_speed_ratio: float | None = None
    """The same for the gate that measures both side by side, per row."""
    min_agreement: float | None = None
    """The least share of rows on which a shadow's answers agree, per output."""
    allow_ops: tuple[str, ...] = ()
    """Operations beyond the usual ones that a graph may have."""
    allow_signature_changes: bool | None = None
    """Let a version lack, or change, what callers of the present one rely on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRecord:
    """One line of a model's journal."""

    time: datetime
    """In UTC, by the writer's clock."""
    action: str
    """What was done, for example ``publish``."""
    version: int | None
    """The version that it was done to, if to one."""
    actor: str
    """Who did it."""
    reason: str
    """Why, in words; may be empty."""
    details: Figures = field(default_factory=dict[str, Any])
    """The numbers that it was based on."""


_POLICY_NUMBERS = tuple(field.name for field in pb.RolloutPolicy.DESCRIPTOR.fields if field.has_presence)
"""The fields of a policy that are single numbers; the others are lists."""


def rollout_info(message: pb.RolloutStatus) -> RolloutInfo:
    """Returns a rollout's status from its message."""
    rejected = {r.version: Rejection(gate=r.gate, reason=r.reason) for r in message.rejected}
    return RolloutInfo(
        model=message.model,
        generation=message.generation,
        stable=message.stable_version or None,
        pinned=message.pinned_version or None,
        rollout=_rollout(message.rollout) if message.HasField("rollout") else None,
        versions=tuple(map(_version, message.versions)),
        verdict=message.verdict,
        figures=_figures(message.figures),
        last=_ended(message.last) if message.HasField("last") else None,
        rejected=MappingProxyType(rejected),
        considered=message.considered_version or None,
    )


def rollout_state(message: pb.DesiredState) -> RolloutState:
    """Returns the registry's state from its message."""
    return RolloutState(
        generation=message.generation,
        stable=message.stable_version or None,
        pinned=message.pinned_version or None,
        candidate=message.candidate_version or None,
        phase=_name(pb.Phase.Name, message.phase, "PHASE"),
        step=message.step,
        paused=message.paused,
    )


def rollout_policy(message: pb.RolloutPolicy) -> RolloutPolicy:
    """Returns a policy from its message."""
    numbers = {name: getattr(message, name) for name in _POLICY_NUMBERS if message.HasField(cast("Any", name))}
    return RolloutPolicy(
        strategy=tuple(_name(pb.Strategy.Name, number, "STRATEGY") for number in message.strategy),
        canary_steps=tuple(map(_step, message.canary_steps)),
        allow_ops=tuple(message.allow_ops),
        **numbers,
    )


def policy_message(policy: RolloutPolicy) -> pb.RolloutPolicy:
    """Returns the message of a policy.

    Raises:
        InputError: if a strategy, a kind or a number can't be what it is.
    """
    numbers = {name: getattr(policy, name) for name in _POLICY_NUMBERS if getattr(policy, name) is not None}
    try:
        return pb.RolloutPolicy(
            strategy=strategy_numbers(policy.strategy),
            canary_steps=[_step_message(step) for step in policy.canary_steps],
            allow_ops=policy.allow_ops,
            **numbers,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"the policy can't be sent: {error}") from error


def strategy_numbers(strategy: str | Sequence[str] | None) -> list[pb.Strategy.ValueType]:
    """Returns the numbers of strategies, which are given as names or joined as in ``shadow+canary``.

    Raises:
        InputError: if there is no such strategy.
    """
    names = strategy.split("+") if isinstance(strategy, str) else strategy or ()
    return [_strategy_number(name) for name in names]


def journal_record(message: pb.JournalEntry) -> JournalRecord:
    """Returns a line of the journal from its message."""
    return JournalRecord(
        time=message.time.ToDatetime(UTC),
        action=message.action,
        version=message.version or None,
        actor=message.actor,
        reason=message.reason,
        details=_figures(message.details),
    )


def _strategy_number(name: str) -> pb.Strategy.ValueType:
    wanted = f"STRATEGY_{name.strip().upper()}"
    if wanted not in pb.Strategy.keys() or wanted == "STRATEGY_UNSPECIFIED":  # noqa: SIM118 - no dict
        raise InputError(
            f"there is no strategy {name!r}: it is immediate, canary, shadow, manual or, say, shadow+canary"
        )
    return pb.Strategy.Value(wanted)


def _rollout(message: pb.Rollout) -> Rollout:
    return Rollout(
        id=message.id,
        version=message.version,
        previous=message.previous_version or None,
        steps=tuple(map(_step, message.steps)),
        phase=_name(pb.Phase.Name, message.phase, "PHASE"),
        step=message.step,
        paused=message.paused,
        phase_age_s=message.phase_age_s,
        bake_s=message.bake_s,
    )


def _step(message: pb.RolloutStep) -> RolloutStep:
    return RolloutStep(_name(pb.StepKind.Name, message.kind, "STEP_KIND"), message.share, message.bake_s)


def _step_message(step: RolloutStep) -> pb.RolloutStep:
    kind = pb.StepKind.Value(f"STEP_KIND_{step.kind.upper()}")
    return pb.RolloutStep(kind=kind, share=step.share, bake_s=step.bake_s)


def _version(message: pb.RolloutVersion) -> RolloutVersion:
    return RolloutVersion(
        version=message.version,
        place=_name(pb.RolloutPlace.Name, message.place, "ROLLOUT_PLACE"),
        state=version_state(message.state),
        share=message.share,
        gates=tuple(map(_gate, message.gates)),
        traffic=_traffic(message.traffic) if message.HasField("traffic") else None,
    )


def _gate(message: pb.GateResult) -> GateInfo:
    return GateInfo(
        gate=message.gate,
        outcome=_name(pb.GateOutcome.Name, message.outcome, "GATE_OUTCOME"),
        duration_s=message.duration_s,
        figures=_figures(message.figures),
        reason=message.reason,
    )


def _traffic(message: pb.Traffic) -> Traffic:
    return Traffic(
        calls=message.calls,
        errors=message.errors,
        calls_per_s=message.calls_per_s,
        p50_ms=message.p50_ms,
        p99_ms=message.p99_ms,
    )


def _ended(message: pb.EndedRollout) -> EndedRollout:
    outcome = _name(pb.RolloutOutcome.Name, message.outcome, "ROLLOUT_OUTCOME")
    return EndedRollout(version=message.version, outcome=outcome, reason=message.reason)


def _name(names: Any, number: int, prefix: str) -> str:
    """Returns an enum's value in words; empty for an unspecified one, ``unknown`` from a newer server."""
    try:
        text: str = names(number)
    except ValueError:
        return "unknown"
    return text.removeprefix(f"{prefix}_").lower().replace("_", " ") if number else ""


def _figures(message: Struct) -> Figures:
    return MappingProxyType(_whole(MessageToDict(cast("Message", message))))


def _whole(value: Any) -> Any:
    """Gives back the whole numbers that a Struct made floats, and an order, of which it has none."""
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in sorted(cast("dict[str, Any]", value).items())}
    if isinstance(value, list):
        return [_whole(item) for item in cast("Iterable[Any]", value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value
