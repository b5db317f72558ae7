"""Figures from many calls."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


def percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    """Returns the percentiles by name, of what may be nothing."""
    if not len(values):
        return dict.fromkeys(PERCENTILES, float("nan"))
    found = np.percentile(values, list(PERCENTILES.values()))
    return {name: round(float(value), 4) for name, value in zip(PERCENTILES, found, strict=True)}


def median(values: Sequence[float]) -> float:
    """Returns the median, of what may be nothing."""
    return statistics.median(values) if values else float("nan")


def ratios(later: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """Returns how many times as large each percentile is."""
    return {name: round(later[name] / before[name], 4) for name in PERCENTILES}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns a median, and the lowest and highest, for people."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f}  ({low:.{digits}f} to {high:.{digits}f})"


def at(rows: Sequence[Any], *path: str) -> list[float]:
    """Returns the numbers that lie at a path of keys in every row."""
    found: list[float] = []
    for row in rows:
        for key in path:
            row = row[key]
        found.append(float(row))
    return found
