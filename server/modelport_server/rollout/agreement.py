"""What it proves that two versions' answers to the same calls are alike, or are not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modelport_server.rollout.sequential import ODDS

_UNITS = 4.0
"""How many independent rows those of one call count for at most: callers send what is alike together."""


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
