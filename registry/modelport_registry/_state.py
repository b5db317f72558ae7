"""The desired state as ``state.json`` holds it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping
from datetime import datetime

from modelport_registry._errors import IntegrityError, RegistryError
from modelport_registry._json import JSON, Fields
from modelport_registry._manifest import read_time
from modelport_registry._names import is_version, parse_version
from modelport_registry._policy import RolloutPolicy, read_step
from modelport_registry._rollout import Ended, Phase, Rejection, Rollout
from modelport_registry._types import State
from modelport_registry.transitions import OUTCOMES, PROMOTED

_KNOWN = {
    "format",
    "generation",
    "aliases",
    "collected",
    "pin",
    "rollout",
    "last",
    "promotions",
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
    last = _ended(fields.child("last")) if fields.has("last") else None
    return State(
        generation=fields.integer("generation"),
        aliases=fields.mapping("aliases", _version),
        collected=fields.integer("collected"),
        pin=_optional_version(fields, "pin"),
        rollout=_rollout(fields.child("rollout")) if fields.has("rollout") else None,
        last=last,
        promotions=_promotions(fields, last),
        rejected=_rejected(fields),
        considered=fields.optional_integer("considered") or 0,
        policy=_policy(fields),
        other={name: fields.any(name) for name in fields.names() if name not in _KNOWN},
    )


def _rejected(fields: Fields) -> dict[int, Rejection]:
    if not fields.has("rejected"):
        return {}
    found: dict[int, Rejection] = {}
    for name, one in fields.mapping("rejected", lambda child, name: _rejection(child.child(name))).items():
        number = parse_version(name)
        if number is None:
            raise fields.wrong("rejected")
        found[number] = one
    return found


def _rejection(fields: Fields) -> Rejection:
    return Rejection(fields.text("gate"), fields.text("reason"), read_time(fields, "at"), fields.text("actor"))


def _policy(fields: Fields) -> RolloutPolicy:
    if not fields.has("policy"):
        return RolloutPolicy()
    child = fields.child("policy")
    with _damaged():
        return RolloutPolicy.from_json({name: child.any(name) for name in child.names()})


def _rollout(fields: Fields) -> Rollout:
    try:
        phase = Phase(fields.text("phase"))
    except ValueError as exc:
        raise fields.wrong("phase") from exc
    with _damaged():
        steps = tuple(map(read_step, fields.objects("steps")))
    step = fields.integer("step")
    if phase is Phase.STEP and step >= len(steps):
        raise fields.wrong("step")
    return Rollout(
        id=fields.text("id"),
        version=_version(fields, "version"),
        previous=_optional_version(fields, "previous"),
        steps=steps,
        phase=phase,
        step=step,
        paused=fields.flag("paused"),
        started=read_time(fields, "started"),
        actor=fields.text("actor"),
        reason=fields.text("reason"),
        baseline=fields.mapping("baseline", lambda child, name: child.integer(name)) if fields.has("baseline") else {},
    )


def _promotions(fields: Fields, last: Ended | None) -> tuple[Ended, ...]:
    if fields.has("promotions"):
        return tuple(map(_ended, fields.objects("promotions")))
    return (last,) if last is not None and last.outcome == PROMOTED else ()  # written before there was such a field


def _ended(fields: Fields) -> Ended:
    if fields.text("outcome") not in OUTCOMES:
        raise fields.wrong("outcome")
    return Ended(
        _version(fields, "version"),
        _optional_version(fields, "previous"),
        fields.text("outcome"),
        fields.text("reason"),
        read_time(fields, "at"),
    )


def _version(fields: Fields, key: str) -> int:
    number = fields.integer(key, at_least=1)
    if not is_version(number):
        raise fields.wrong(key)
    return number


def _optional_version(fields: Fields, key: str) -> int | None:
    return _version(fields, key) if fields.has(key) else None


@contextlib.contextmanager
def _damaged() -> Generator[None]:
    """Turns a value that is out of its range into what it means here: nobody could have written it."""
    try:
        yield
    except IntegrityError:
        raise
    except RegistryError as exc:
        raise IntegrityError(f"the state is damaged: {exc}") from exc


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
        "promotions": [_ended_json(one) for one in state.promotions],
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
        "baseline": dict(rollout.baseline),
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
