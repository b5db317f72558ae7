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


def hopeless_text(
    model: str,
    version: int,
    *,
    under_way: int | None,
    last: tuple[int, str] | None,
    pinned: int | None,
    manual: bool,
    newer: int | None,
    tried: int | None,
) -> str | None:
    """Returns why a version will not come into service by itself, and what to do; None while it may.

    Args:
        model: the model's name.
        version: the version; it is neither in charge nor rejected.
        under_way: the version that is being rolled out or watched.
        last: the version whose rollout ended last, and how.
        pinned: the version that is pinned.
        manual: whether the model's policy is.
        newer: a higher version that was not rejected; it goes first.
        tried: the highest version that was in charge or a candidate; None while none is in charge.
    """
    start = f"start it: modelport rollout start {model} {version}"
    if under_way == version:
        return None
    if last is not None and last[0] == version:
        return f"is not in charge: its rollout has ended, {last[1]}; {start}"
    if pinned is not None:
        unpin = f"take the pin off: modelport pin {model} --remove"
        return f"will not come into service by itself: version {pinned} is pinned; {unpin}"
    if manual:
        return f"will not come into service by itself: the model's policy is manual; {start}"
    if newer is not None:
        return f"was passed over: version {newer} goes before it; {start}"
    if tried is not None and version <= tried:
        return f"was passed over: version {tried} was tried before it; {start}"
    return None


def turn_text(version: int, *, watched: bool) -> str:
    """Returns that another version goes first: one that is being rolled out, or was only just."""
    if watched:
        return f"version {version} has just taken over and is watched; a server takes this one up next"
    return f"it waits for the rollout of version {version} to end"
