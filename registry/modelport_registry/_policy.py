"""How a model's versions come into service: the rules, and the defaults of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, cast

from modelport.names import shown
from modelport_registry._errors import RegistryError
from modelport_registry._json import JSON, Fields

_MAX_SECONDS = 30 * 86_400.0
_MAX_STEPS = 100
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


class StepKind(StrEnum):
    """What the candidate gets in a step."""

    SHADOW = "shadow"
    """Copies of real calls, whose answers nobody sees."""
    CANARY = "canary"
    """Real calls."""


class Strategy(StrEnum):
    """A way into service; several can follow each other."""

    IMMEDIATE = "immediate"
    """All traffic at once when the gates are passed."""
    CANARY = "canary"
    """A growing share of the traffic."""
    SHADOW = "shadow"
    """Copies of the traffic first."""
    MANUAL = "manual"
    """A version becomes a candidate only when somebody names it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a rollout's plan."""

    kind: StepKind
    share: float
    """Of the calls that name no version, above 0 and at most 1."""
    bake_s: float
    """How long it lasts at least, in seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RegistryError(f"a step's share must be above 0% and at most 100%, not {_percent(self.share)}")
        if not 0 <= self.bake_s <= _MAX_SECONDS:
            raise RegistryError(f"a step must last 0 s to 30 days, not {_shown_number(self.bake_s)} s")

    def to_json(self) -> dict[str, JSON]:
        """Returns it as it is written."""
        return {"kind": self.kind.value, "share": self.share, "bake_s": self.bake_s}


def _canary_steps() -> tuple[Step, ...]:
    return tuple(Step(StepKind.CANARY, share, 60.0) for share in (0.01, 0.1, 0.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPolicy:
    """The rules of one model's rollouts; here are the defaults of every model.

    Raises:
        RegistryError: if a value is out of its range.
    """

    strategy: tuple[Strategy, ...] = (Strategy.IMMEDIATE,)
    """What follows the gates, in this order. Default: all traffic at once."""
    canary_steps: tuple[Step, ...] = _canary_steps()
    """The shares of a canary and how long each is baked. Default 1%, 10%, 50%, 60 s each."""
    shadow_share: float = 1.0
    """The share of the calls that is copied in a shadow step. Default all."""
    shadow_bake_s: float = 60.0
    """How long a shadow step lasts, in seconds. Default 60."""
    watch_s: float = 60.0
    """How long a promoted version is compared with what its predecessor did, in seconds. Default 60."""
    keep_warm_s: float = 300.0
    """How long the predecessor stays loaded after that, in seconds. Default 300."""
    min_calls: int = 100
    """How many calls the candidate must have answered in a step before it goes on. Default 100."""
    max_error_increase: float = 0.002
    """How much larger the candidate's share of failed calls may be, absolute. Default 0.002."""
    max_latency_ratio: float = 1.5
    """How much longer the candidate may take in the bake. Default 1.5."""
    max_speed_ratio: float = 2.0
    """How much longer the candidate may take per row in the speed gate. Default 2."""
    min_agreement: float = 0.99
    """The share of rows in which a shadow must agree, for each output. Default 0.99."""
    allow_ops: tuple[str, ...] = ()
    """Operations that the safety gate lets pass although it would refuse them. Default none."""
    allow_signature_changes: bool = False
    """Whether a candidate's signatures may break callers of the stable version. Default no."""

    def __post_init__(self) -> None:
        _check_strategy(self.strategy)
        if not 0 < len(self.canary_steps) <= _MAX_STEPS:
            raise RegistryError(f"canary_steps must be 1 to {_MAX_STEPS}, not {len(self.canary_steps)}")
        if any(step.kind is not StepKind.CANARY for step in self.canary_steps):
            raise RegistryError("canary_steps must be of the kind canary; a shadow has shadow_share and shadow_bake_s")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:  # neither is nan
                raise RegistryError(f"{name} must be in {low:g} .. {high:g}, not {_shown_number(value)}")

    @property
    def manual(self) -> bool:
        """Whether versions become candidates by name only."""
        return Strategy.MANUAL in self.strategy

    def plan(self, strategy: Sequence[Strategy] | None = None) -> tuple[Step, ...]:
        """Returns the steps of ``strategy``, the policy's own by default.

        Raises:
            RegistryError: if its parts do not go together.
        """
        chosen = self.strategy if strategy is None else strategy
        _check_strategy(chosen)
        steps: list[Step] = []
        for one in chosen:
            if one is Strategy.SHADOW:
                steps.append(Step(StepKind.SHADOW, self.shadow_share, self.shadow_bake_s))
            elif one is Strategy.CANARY:
                steps.extend(self.canary_steps)
        return tuple(steps)

    def to_json(self, *, whole: bool = False) -> dict[str, JSON]:
        """Returns what differs from the defaults, as it is written; with ``whole`` everything."""
        default = RolloutPolicy()
        document: dict[str, JSON] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if whole or value != getattr(default, one.name):
                document[one.name] = _plain(value)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, JSON]) -> RolloutPolicy:
        """Returns the policy that was written; fields that are not known are left out.

        Raises:
            RegistryError: naming the field that can't be read.
        """
        source = Fields("the policy", document)
        return cls(**{name: read(source, name) for name, read in _READERS.items() if source.has(name)})


_RANGES = (
    ("shadow_share", 1e-6, 1.0),
    ("shadow_bake_s", 0.0, _MAX_SECONDS),
    ("watch_s", 0.0, _MAX_SECONDS),
    ("keep_warm_s", 0.0, _MAX_SECONDS),
    ("min_calls", 1, 1e9),
    ("max_error_increase", 0.0, 1.0),
    ("max_latency_ratio", 1.0, 1e6),
    ("max_speed_ratio", 1.0, 1e6),
    ("min_agreement", 0.0, 1.0),
)


def _plain(value: object) -> JSON:
    if isinstance(value, tuple):
        items = cast("tuple[object, ...]", value)
        return [_plain(asdict(item)) if isinstance(item, Step) else _plain(item) for item in items]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in cast("dict[str, object]", value).items()}
    return value.value if isinstance(value, StrEnum) else cast("JSON", value)


def _check_strategy(strategy: Sequence[Strategy]) -> None:
    if not strategy or len(set(strategy)) != len(strategy):
        raise RegistryError("a strategy is immediate, canary, shadow or manual, or some of them joined by '+'")
    if Strategy.IMMEDIATE in strategy and len(set(strategy) - {Strategy.MANUAL}) > 1:
        raise RegistryError("the strategy immediate goes with no other but manual")


def _percent(share: float) -> str:
    return f"{share:.4%}" if abs(share) < 1e6 else _shown_number(share)


def _shown_number(value: float) -> str:
    return f"{value:g}" if abs(value) < 2**1023 or isinstance(value, float) else "a huge number"


def _read_strategy(source: Fields, name: str) -> tuple[Strategy, ...]:
    try:
        return tuple(map(Strategy, source.texts(name)))
    except ValueError:
        raise source.wrong(name) from None


def _read_steps(source: Fields, name: str) -> tuple[Step, ...]:
    return tuple(map(read_step, source.objects(name)))


_READERS: Mapping[str, Callable[[Fields, str], Any]] = {
    "strategy": _read_strategy,
    "canary_steps": _read_steps,
    "min_calls": Fields.integer,
    "allow_ops": Fields.texts,
    "allow_signature_changes": Fields.flag,
    **{name: Fields.number for name, *_ in _RANGES if name != "min_calls"},
}


def read_step(source: Fields) -> Step:
    """Returns a step as it was written.

    Raises:
        RegistryError: if it can't be read.
    """
    try:
        kind = StepKind(source.text("kind"))
    except ValueError:
        raise source.wrong("kind") from None
    return Step(kind, source.number("share"), source.number("bake_s"))


def parse_strategy(text: str) -> tuple[Strategy, ...]:
    """Returns the strategies that a text such as ``shadow+canary`` names.

    Raises:
        RegistryError: if it names something else.
    """
    try:
        return tuple(Strategy(word.strip().lower()) for word in text.split("+"))
    except ValueError:
        known = ", ".join(strategy.value for strategy in Strategy)
        raise RegistryError(f"{shown(text)} is no strategy: use {known}, or some of them joined by '+'") from None


def parse_step(text: str) -> Step:
    """Returns the canary step that a text such as ``10%:5m`` stands for: a share, and how long it is baked.

    Raises:
        RegistryError: if it is something else.
    """
    share, _, duration = text.partition(":")
    try:
        return Step(StepKind.CANARY, parse_share(share), parse_duration(duration))
    except _TextError:
        raise RegistryError(
            f"{shown(text)} is no step: write a share and a time, such as 10%:60s, 10%:5m or 50%:1h"
        ) from None


def parse_share(text: str) -> float:
    """Returns the share, 0 to 1, that a text such as ``10%`` stands for.

    Raises:
        RegistryError: if it is something else.
    """
    match = _SHARE.fullmatch(text.strip())
    if match is None:
        raise _TextError(f"{shown(text)} is no share: write it such as 10% or 0.5%")
    return float(match[1]) / 100


def parse_duration(text: str) -> float:
    """Returns the seconds that a text such as ``60s``, ``5m`` or ``1h`` stands for.

    Raises:
        RegistryError: if it is something else.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise _TextError(f"{shown(text)} is no time: write it such as 60s, 5m or 1h")
    return float(match[1]) * _UNIT_S[match[2]]


class _TextError(RegistryError):
    """A text that can't be read."""
