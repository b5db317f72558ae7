"""Whether two versions' answers to the same call are alike, and what many such calls prove."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from modelport.tensors import array_from_bytes
from modelport_server.rollout.sequential import ODDS
from modelport_server.tensors import RawTensor

MAX_ROWS = 1024
"""A larger call is compared in its first rows."""
_UNITS = 4.0
"""How many independent rows those of one call count for at most: callers send what is alike together."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What a copy of a call came to on another version than the one that answered the call."""

    engine_time_us: int
    """From its start to its end in the engine."""
    agreeing: Mapping[str, tuple[int, int]]
    """For each output of the answer, how many rows were compared, and how many of them are alike."""
    categories: Mapping[str, Sequence[int]]
    """The categories of each output's rows, see ``categories``; nothing where nobody asked for them."""


@dataclass(slots=True)
class Agreement:
    """How many rows of one output came out alike, and how much speaks for their being too few.

    Bets that rows agree too seldom, one on each of ``ODDS``, made before each call is seen: see ``sequential``.
    """

    rows: int = 0
    agreed: int = 0
    bets: list[float] = field(default_factory=lambda: [0.0] * len(ODDS))
    """Their logarithms."""

    def add(self, rows: int, agreed: int, least: float) -> None:
        """Counts a call.

        Args:
            rows: how many rows it had.
            agreed: how many of them came out alike.
            least: which share of all rows has to.
        """
        if not rows:
            return
        self.rows += rows
        self.agreed += agreed
        weight = min(1.0, _UNITS / rows)
        for index, odds in enumerate(ODDS):
            won = (rows - agreed) * math.log(odds) - rows * math.log1p((1 - least) * (odds - 1))
            self.bets[index] += weight * won

    @property
    def share(self) -> float:
        """The share of the rows that agreed; 1 where there was none."""
        return self.agreed / self.rows if self.rows else 1.0

    def too_seldom(self, least: float, chance: float) -> bool:
        """Returns whether rows agree in less than ``least``, unless it is by a chance of ``chance`` at most."""
        highest = max(self.bets)
        log_e = highest + math.log(sum(math.exp(bet - highest) for bet in self.bets) / len(self.bets))
        return self.share < least and log_e >= math.log(1 / chance)


def agreeing_rows(left: RawTensor, right: RawTensor | None) -> tuple[int, int]:
    """Returns how many rows there are and how many are alike.

    Rows of scores (floats in two dimensions) are alike if the same column is the highest; other floats
    if every element is within 1% or 0.001; anything else if it is equal.
    """
    if right is None or left.shape != right.shape or left.dtype != right.dtype:
        return (left.shape[0] if left.shape else 1), 0
    first, second = (array_from_bytes(t.dtype, t.shape, t.data) for t in (left, right))
    if not first.shape:
        first, second = first[np.newaxis], second[np.newaxis]
    first, second = first[:MAX_ROWS], second[:MAX_ROWS]
    floats = np.issubdtype(first.dtype, np.floating) or left.dtype.name == "bfloat16"
    if floats and first.ndim == 2 and first.shape[1] > 1:
        same = first.argmax(axis=1) == second.argmax(axis=1)
        same &= np.isfinite(first).all(axis=1) == np.isfinite(second).all(axis=1)
        return len(first), int(same.sum())
    if not first.size:
        return len(first), len(first)
    flat = (first.reshape(len(first), -1), second.reshape(len(second), -1))
    same = np.isclose(*flat, rtol=0.01, atol=0.001, equal_nan=True) if floats else flat[0] == flat[1]
    return len(first), int(np.asarray(same).all(axis=1).sum())
