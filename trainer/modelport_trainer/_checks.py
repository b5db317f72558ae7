"""Checks that the option classes share."""

from __future__ import annotations

import math

from modelport_trainer.errors import OptionError


def check_count(name: str, value: int, *, lowest: int = 1, highest: int) -> None:
    """Raises OptionError unless ``value`` lies between ``lowest`` and ``highest``, both included."""
    if not lowest <= value <= highest:
        raise OptionError(f"{name}: {value} is not between {lowest:,} and {highest:,}")


def check_share(name: str, value: float, *, zero_allowed: bool = False) -> None:
    """Raises OptionError unless ``value`` is a share below 1 and above 0, or 0 where that is allowed."""
    if not (math.isfinite(value) and 0 <= value < 1) or (value == 0 and not zero_allowed):
        lowest = "0" if zero_allowed else "above 0"
        raise OptionError(f"{name}: {value} is not a share from {lowest} to below 1")


def check_positive(name: str, value: float) -> None:
    """Raises OptionError unless ``value`` is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{name}: {value} is not above 0")
