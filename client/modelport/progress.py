"""How far a version has come on its way into service, in words; imports nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

TELL_EVERY_S = 5.0
"""How often, in seconds, fresh figures are told while a version stays in the same phase."""


class Teller:
    """Tells of a new phase at once, and in the same phase of fresh figures now and then.

    Args:
        on_progress: is told; None for nobody.
        every_s: the least time between two figures of the same phase, in seconds.
    """

    def __init__(self, on_progress: Callable[[str], None] | None, every_s: float) -> None:
        self._on_progress = on_progress
        self._every_s = every_s
        self._phase = ""
        self._told = ""
        self._told_at_s = 0.0
        self._since_s = time.monotonic()
        self.text = "nothing is known yet"
        """The newest, whether it was told or not."""

    def phase_age_s(self, phase: str) -> float:
        """Returns how long a phase has been told, in seconds; 0 for a new one."""
        return time.monotonic() - self._since_s if phase == self._phase else 0.0

    def tell(self, phase: str, figures: str = "") -> None:
        """Takes in where the version is, and how far within that."""
        self.text = f"{phase}: {figures}" if figures else phase
        now_s = time.monotonic()
        same = phase == self._phase
        if same and (self.text == self._told or now_s < self._told_at_s + self._every_s):
            return
        if not same:
            self._phase, self._since_s = phase, now_s
        self._told, self._told_at_s = self.text, now_s
        if self._on_progress is not None:
            self._on_progress(self.text)


def step_text(number: int, count: int, kind: str, share: float) -> str:
    """Returns which step it is, counted from 1, such as ``step 1 of 3 (canary 1%)``."""
    return f"step {number} of {count} ({kind} {share * 100:.4g}%)"


def time_text(age_s: float, least_s: float) -> str:
    """Returns how much of the time has passed that a phase lasts at least."""
    return f"{age_s:.0f} s of {least_s:g} s" if age_s < least_s else f"{least_s:g} s are over"


def calls_text(calls: int, least: int) -> str:
    """Returns how many calls there were of those that a step needs."""
    return f"{calls:,} of {least:,} calls" if calls < least else f"{calls:,} calls"


def turn_text(version: int, *, watched: bool) -> str:
    """Returns that another version goes first: one that is being rolled out, or was only just."""
    if watched:
        return f"version {version} has just taken over and is watched; a server takes this one up next"
    return f"it waits for the rollout of version {version} to end"
