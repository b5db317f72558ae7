"""What a gate found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from modelport_registry import JSON

INTEGRITY = "integrity"
SAFETY = "safety"
SIGNATURE = "signature"
LOAD = "load"
GOLDEN = "golden"
WARM_UP = "warm-up"
SPEED = "speed"
GATES = (INTEGRITY, SAFETY, SIGNATURE, LOAD, GOLDEN, WARM_UP, SPEED)
"""Every gate, in the order in which a version passes them."""


class Outcome(StrEnum):
    """How a gate ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """There was nothing to check, as where no stable version is there to compare with."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate's end."""

    gate: str
    """One of ``GATES``."""
    outcome: Outcome
    seconds: float
    """How long it took."""
    figures: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    """What was measured."""
    reason: str = ""
    """Why it failed or was skipped, in one line."""

    def to_json(self) -> dict[str, JSON]:
        """Returns it as the journal and ``modelport verify --json`` write it."""
        document: dict[str, JSON] = {
            "gate": self.gate,
            "outcome": self.outcome.value,
            "seconds": round(self.seconds, 4),
            "figures": dict(self.figures),
        }
        return document | ({"reason": self.reason} if self.reason else {})
