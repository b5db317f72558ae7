"""Rollouts as messages."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from google.protobuf.struct_pb2 import Struct

from modelport.v1 import model_pb2
from modelport.v1 import rollout_pb2 as pb
from modelport_registry import (
    JSON,
    JournalEntry,
    RolloutPolicy,
    State,
    Step,
    StepKind,
    Strategy,
)
from modelport_registry.transitions import STABLE
from modelport_server.errors import InvalidCallError
from modelport_server.gates.result import GateResult
from modelport_server.rollout.status import RolloutStatus, RolloutVersion, StepStatus, Traffic

_Member = TypeVar("_Member", bound=enum.StrEnum)
_EXACT_INTEGERS = 2**53
_POLICY_NUMBERS = tuple(field.name for field in pb.RolloutPolicy.DESCRIPTOR.fields if field.has_presence)
"""The fields of a policy that are single numbers; the others are lists."""


def status_message(status: RolloutStatus) -> pb.RolloutStatus:
    """Returns the message of a rollout's status."""
    message = pb.RolloutStatus(
        model=status.model,
        generation=status.generation,
        stable_version=status.stable or 0,
        pinned_version=status.pin or 0,
        versions=[_version(version) for version in status.versions],
        verdict=status.verdict,
        figures=struct(status.figures),
        rejected=[_rejected(*item) for item in sorted(status.rejected.items())],
        considered_version=status.considered,
    )
    if status.id:
        message.rollout.CopyFrom(_rollout(status))
    if status.last_version is not None:
        outcome = _number(pb.RolloutOutcome, "ROLLOUT_OUTCOME", status.last_outcome)
        message.last.CopyFrom(pb.EndedRollout(version=status.last_version, outcome=outcome, reason=status.last_reason))
    return message


def state_message(state: State) -> pb.DesiredState:
    """Returns the message of what the registry asks for."""
    message = pb.DesiredState(
        generation=state.generation,
        stable_version=state.aliases.get(STABLE, 0),
        pinned_version=state.pin or 0,
    )
    if (rollout := state.rollout) is not None:
        message.candidate_version = rollout.version
        message.phase = _number(pb.Phase, "PHASE", rollout.phase.value)
        message.step = rollout.step
        message.paused = rollout.paused
    return message


def policy_message(policy: RolloutPolicy) -> pb.RolloutPolicy:
    """Returns the message of a policy, with every field set."""
    return pb.RolloutPolicy(
        strategy=[_number(pb.Strategy, "STRATEGY", strategy.value) for strategy in policy.strategy],
        canary_steps=[_step(step.kind.value, step.share, step.bake_s) for step in policy.canary_steps],
        allow_ops=policy.allow_ops,
        **{name: getattr(policy, name) for name in _POLICY_NUMBERS},
    )


def policy_of(message: pb.RolloutPolicy) -> RolloutPolicy:
    """Returns the policy that a message asks for; what is not set is as by default.

    Raises:
        InvalidCallError: if a strategy or a kind of step is not known.
        RegistryError: if a value is out of range.
    """
    fields: dict[str, Any] = {n: getattr(message, n) for n in _POLICY_NUMBERS if message.HasField(cast("Any", n))}
    if message.strategy:
        fields["strategy"] = strategies_of(message.strategy)
    if message.canary_steps:
        fields["canary_steps"] = tuple(map(_step_of, message.canary_steps))
    return RolloutPolicy(allow_ops=tuple(message.allow_ops), **fields)


def strategies_of(numbers: Sequence[int]) -> tuple[Strategy, ...]:
    """Returns the strategies that numbers stand for.

    Raises:
        InvalidCallError: if one is not known.
    """
    return tuple(_member(Strategy, pb.Strategy, "STRATEGY", number) for number in numbers)


def entry_message(entry: JournalEntry) -> pb.JournalEntry:
    """Returns the message of a line of the journal."""
    message = pb.JournalEntry(
        action=entry.action,
        version=entry.version or 0,
        actor=entry.actor,
        reason=entry.reason,
        details=struct(entry.details),
    )
    message.time.FromDatetime(entry.time)
    return message


def struct(values: Mapping[str, JSON]) -> Struct:
    """Returns JSON values as a message; integers that a double would round become text."""
    message = Struct()
    message.update({name: _exact(value) for name, value in values.items()})
    return message


def _exact(value: JSON) -> Any:
    if isinstance(value, Mapping):
        return {name: _exact(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_exact(item) for item in value]
    inexact = isinstance(value, int) and abs(value) > _EXACT_INTEGERS
    unreadable = isinstance(value, float) and not math.isfinite(value)  # JSON has none, so clients may stumble
    return str(value) if inexact or unreadable else value


def _rollout(status: RolloutStatus) -> pb.Rollout:
    return pb.Rollout(
        id=status.id,
        version=status.version or 0,
        previous_version=status.previous or 0,
        steps=[_step_status(step) for step in status.steps],
        phase=_number(pb.Phase, "PHASE", status.phase),
        step=status.step,
        paused=status.paused,
        phase_age_s=status.phase_age_s,
        bake_s=status.bake_s,
    )


def _step_status(step: StepStatus) -> pb.RolloutStep:
    return _step(step.kind, step.share, step.bake_s)


def _step(kind: str, share: float, bake_s: float) -> pb.RolloutStep:
    return pb.RolloutStep(kind=_number(pb.StepKind, "STEP_KIND", kind), share=share, bake_s=bake_s)


def _step_of(message: pb.RolloutStep) -> Step:
    return Step(_member(StepKind, pb.StepKind, "STEP_KIND", message.kind), message.share, message.bake_s)


def _version(version: RolloutVersion) -> pb.RolloutVersion:
    return pb.RolloutVersion(
        version=version.version,
        place=_number(pb.RolloutPlace, "ROLLOUT_PLACE", version.place),
        state=model_pb2.ModelVersion.State.Value(f"STATE_{version.state.name}"),
        share=version.share,
        gates=[_gate(result) for result in version.gates],
        traffic=None if version.traffic is None else _traffic(version.traffic),
    )


def _gate(result: GateResult) -> pb.GateResult:
    return pb.GateResult(
        gate=result.gate,
        outcome=_number(pb.GateOutcome, "GATE_OUTCOME", result.outcome.value),
        duration_s=result.seconds,
        figures=struct(result.figures),
        reason=result.reason,
    )


def _traffic(traffic: Traffic) -> pb.Traffic:
    return pb.Traffic(
        calls=traffic.calls,
        errors=traffic.errors,
        calls_per_s=traffic.calls_per_s,
        p50_ms=traffic.p50_ms,
        p99_ms=traffic.p99_ms,
    )


def _rejected(version: int, text: str) -> pb.RejectedVersion:
    gate, _, reason = text.partition(": ")
    return pb.RejectedVersion(version=version, gate=gate, reason=reason)


def _number(wrapper: Any, prefix: str, text: str) -> Any:
    """Returns the number of an enum's value that is given in words; 0 for none."""
    return wrapper.Value(f"{prefix}_{text.upper().replace(' ', '_')}") if text else 0


def _member(kind: type[_Member], wrapper: Any, prefix: str, number: int) -> _Member:
    try:
        name: str = wrapper.Name(number)
        return kind(name.removeprefix(f"{prefix}_").lower())
    except ValueError:
        raise InvalidCallError(f"{number} is not a known {wrapper.DESCRIPTOR.full_name}") from None
