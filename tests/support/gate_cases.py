"""Every kind of bad version that a gate is to reject, and the server that they are published to.

``tests.support.bad_versions`` writes the models; here is which gate rejects each of them, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modelport_registry import Golden, Published, Registry
from tests.support.bad_versions import bad_golden, doubler_golden, drop_variables, flip_bit, link_variables
from tests.support.launch import program

MODEL = "doubler"
STABLE = 1
"""The good version, which is published first."""
LIMIT_S = 20.0
"""Of every gate: what hangs is waited for that long."""
MEMORY_BYTES = 2 << 30

PROGRAM = program(golden_timeout_s=LIMIT_S, warm_up_timeout_s=LIMIT_S, max_memory_bytes=MEMORY_BYTES)
"""What is run instead of ``modelport``, for limits that it has no options for."""
ARGUMENTS = ("--load-timeout", f"{LIMIT_S}", "--threads", "1")
"""What ``serve`` takes."""


@dataclass(frozen=True, slots=True)
class Case:
    """A bad version."""

    name: str
    gate: str
    reason: str
    """Part of what it is rejected with."""
    damage: Callable[[Path], None] | None = None
    """What is done to the folder of a good version; else the model's name is the case's."""


CASES = (
    Case("flipped-bit", "integrity", "variables", flip_bit),
    Case("missing-variables", "integrity", "variables", drop_variables),
    Case("symlink", "integrity", "variables", link_variables),
    Case("read-file", "safety", "ReadFile"),
    Case("renamed-output", "signature", "'y'"),
    Case("changed-dtype", "signature", "'x'"),
    Case("segfault-at-load", "load", "SIGSEGV"),
    Case("hang-at-load", "load", f"more than {LIMIT_S:g} s"),
    Case("segfault", "golden", "SIGSEGV"),
    Case("hang", "golden", f"more than {LIMIT_S:g} s"),
    Case("eater", "golden", "memory"),
    Case("retrained", "golden", "'y' differs"),
    Case("nan", "golden", "NaN"),
    Case("hang-at-warm-up", "warm-up", f"more than {LIMIT_S:g} s"),
    Case("slow", "speed", "times"),
)


@dataclass(frozen=True, slots=True)
class Publisher:
    """Publishes versions, good or bad."""

    registry: Registry
    aside: Path
    """A folder on the registry's file system where versions are damaged before anybody sees them."""
    models: Path
    """The folder that ``tests.support.bad_versions`` wrote."""

    def good(self) -> int:
        """Publishes the good version, and returns its number."""
        return self._publish(self.registry, "good", doubler_golden(STABLE)).version

    def bad(self, case: Case) -> int:
        """Publishes a bad version, and returns its number."""
        if case.damage is None:
            return self._publish(self.registry, case.name, bad_golden(case.name, 2)).version
        number = max(self.registry.versions(MODEL)) + 1
        aside = Registry(self.aside / case.name)
        folder = self._publish(aside, "good", doubler_golden(STABLE), version=number).path
        case.damage(folder)
        folder.rename(self.registry.root / MODEL / str(number))
        return number

    def _publish(self, registry: Registry, name: str, golden: Golden, version: int | None = None) -> Published:
        return registry.publish(MODEL, self.models / name, golden=[golden], version=version)
