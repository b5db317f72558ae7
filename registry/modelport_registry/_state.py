"""The desired state as ``state.json`` holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime

from modelport_registry._errors import IntegrityError, RegistryError
from modelport_registry._json import JSON, Fields
from modelport_registry._manifest import read_time
from modelport_registry._names import MAX_VERSION
from modelport_registry._policy import RolloutPolicy, Step, read_step
from modelport_registry._rollout import Ended, Phase, Rejection, Rollout
from modelport_registry._types import State

_KNOWN = {
    "format",
    "generation",
    "aliases",
    "collected",
    "pin",
    "rollout",
    "last",
    "rejected",
    "considered",
    "policy",
}


def read_state(fields: Fields) -> State:
    """Returns the state that a file holds.

    Raises:
        IntegrityError: if it is damaged or of a newer format.
    """
    if fields.integer("format", at_least=1) > 1:
        raise IntegrityError("the state has a newer format: upgrade modelport")
    aliases = fields.mapping("aliases", lambda child, name: child.integer(name, at_least=1))
    collected = fields.integer("collected")
    if max(collected, *aliases.values(), 0) > MAX_VERSION:
        raise fields.wrong("aliases")
    return State(
        generation=fields.integer("generation"),
        aliases=aliases,
        collected=collected,
        pin=fields.optional_integer("pin", at_least=1),
        rollout=_rollout(fields.child("rollout")) if fields.has("rollout") else None,
        last=_ended(fields.child("last")) if fields.has("last") else None,
        rejected=_rejected(fields),
        considered=fields.optional_integer("considered") or 0,
        policy=_policy(fields),
        other={name: fields.any(name) for name in fields.names() if name not in _KNOWN},
    )


def _rejected(fields: Fields) -> dict[int, Rejection]:
    if not fields.has("rejected"):
        return {}
    found = fields.mapping("rejected", lambda child, name: _rejection(child.child(name)))
    if not all(name.isascii() and name.isdigit() for name in found):
        raise fields.wrong("rejected")
    return {int(name): one for name, one in found.items()}


def _rejection(fields: Fields) -> Rejection:
    return Rejection(fields.text("gate"), fields.text("reason"), read_time(fields, "at"), fields.text("actor"))


def _policy(fields: Fields) -> RolloutPolicy:
    if not fields.has("policy"):
        return RolloutPolicy()
    child = fields.child("policy")
    try:
        return RolloutPolicy.from_json({name: child.any(name) for name in child.names()})
    except RegistryError as exc:
        raise IntegrityError(f"the state is damaged: {exc}") from exc


def _rollout(fields: Fields) -> Rollout:
    try:
        phase = Phase(fields.text("phase"))
        steps = tuple(_step(item) for item in fields.items("steps"))
    except (ValueError, RegistryError) as exc:
        raise fields.wrong("rollout") from exc
    step = fields.integer("step")
    if phase is Phase.STEP and step >= len(steps):
        raise fields.wrong("step")
    return Rollout(
        id=fields.text("id"),
        version=fields.integer("version", at_least=1),
        previous=fields.optional_integer("previous", at_least=1),
        steps=steps,
        phase=phase,
        step=step,
        paused=fields.any("paused") is True,
        started=read_time(fields, "started"),
        actor=fields.text("actor"),
        reason=fields.text("reason"),
    )


def _step(item: object) -> Step:
    return read_step(item)  # type: ignore[arg-type]


def _ended(fields: Fields) -> Ended:
    return Ended(
        fields.integer("version", at_least=1),
        fields.optional_integer("previous", at_least=1),
        fields.text("outcome"),
        fields.text("reason"),
        read_time(fields, "at"),
    )


def state_json(state: State) -> bytes:
    """Returns what a file holds for ``state``."""
    document: dict[str, JSON] = {
        **state.other,
        "format": 1,
        "generation": state.generation,
        "aliases": dict(sorted(state.aliases.items())),
        "collected": state.collected,
        "pin": state.pin,
        "rollout": _rollout_json(state.rollout) if state.rollout is not None else None,
        "last": _ended_json(state.last) if state.last is not None else None,
        "rejected": {str(number): _rejection_json(one) for number, one in sorted(state.rejected.items())},
        "considered": state.considered,
        "policy": state.policy.to_json(),
    }
    return json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"


def _rollout_json(rollout: Rollout) -> Mapping[str, JSON]:
    return {
        "id": rollout.id,
        "version": rollout.version,
        "previous": rollout.previous,
        "steps": [step.to_json() for step in rollout.steps],
        "phase": rollout.phase.value,
        "step": rollout.step,
        "paused": rollout.paused,
        "started": _time(rollout.started),
        "actor": rollout.actor,
        "reason": rollout.reason,
    }


def _ended_json(ended: Ended) -> Mapping[str, JSON]:
    return {
        "version": ended.version,
        "previous": ended.previous,
        "outcome": ended.outcome,
        "reason": ended.reason,
        "at": _time(ended.at),
    }


def _rejection_json(one: Rejection) -> Mapping[str, JSON]:
    return {"gate": one.gate, "reason": one.reason, "at": _time(one.at), "actor": one.actor}


def _time(moment: datetime) -> str:
    return moment.isoformat()
