"""Figures from many calls."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


Percentiles = dict[str, float | None]
"""Percentiles by name; each is None where there was nothing."""


def percentiles(values: NDArray[np.float64]) -> Percentiles:
    """Returns the percentiles by name, of what may be nothing."""
    if not len(values):
        return dict.fromkeys(PERCENTILES)
    found = np.percentile(values, list(PERCENTILES.values()))
    return {name: round(float(value), 4) for name, value in zip(PERCENTILES, found, strict=True)}


def median_text(values: Sequence[float], digits: int = 2) -> str:
    """Returns the median, of what may be nothing, for people."""
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def ratios(later: Percentiles, before: Percentiles) -> Percentiles:
    """Returns how many times as large each percentile is."""
    return {name: _ratio(later[name], before[name]) for name in PERCENTILES}


def _ratio(later: float | None, before: float | None) -> float | None:
    return None if later is None or before is None else round(later / before, 4)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns a median, and the lowest and highest, for people."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{median_text(values, digits)}  ({low:.{digits}f} to {high:.{digits}f})"


def at(rows: Sequence[Any], *path: str) -> list[float]:
    """Returns the numbers that lie at a path of keys in the rows, without those that are None."""
    found: list[float] = []
    for row in rows:
        for key in path:
            row = row[key]
        if row is not None:
            found.append(float(row))
    return found


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes all figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
