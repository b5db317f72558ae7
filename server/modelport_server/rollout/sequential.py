"""Sequential tests of shares: how much speaks for a candidate's being worse, at whatever moment one looks.

A test bets against the candidate's being as good as the stable version, window of time by window of time.
While it is as good, no bet can be expected to win, so that the stake, which begins at 1, ever comes to
1 / alpha with a probability of at most alpha (Ville 1939). That holds for all looks together: the product
of the bets is a test martingale (Shafer et al. 2011; Waudby-Smith & Ramdas 2024).

``paired`` needs no share known beforehand: of all hits in a window, those of the candidate are drawn like
balls from an urn (Mantel & Haenszel 1959, here for a sequence of windows), whatever the share of hits in that
window is. What happens to both versions at the same time is thereby no evidence.

``since`` mixes over when the candidate may have become worse (Shin, Ramdas & Rinaldo 2022) and over how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ODDS = (1.5, 3.0, 10.0, 60.0)
"""How much more likely a hit may have become: what the bets are on."""
_LOG_ODDS = np.log(np.array(ODDS))[:, np.newaxis]
_MORE = np.array(ODDS)[:, np.newaxis] - 1
_STRIDE = 4
_EVEN = 1e-6

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shares:
    """How many of how many were hits, of the candidate's and of the stable version's, window by window."""

    hits: Floats
    of: Floats
    stable_hits: Floats
    stable_of: Floats


@dataclass(frozen=True, slots=True)
class Found:
    """What a test has found."""

    log_e: float
    """The logarithm of the stake: how much speaks for worse."""
    first: int
    """In which window it seems to have become worse."""


def paired(shares: Shares, floor: float, units: Floats) -> Floats:
    """Returns the logarithms of bets that a share is not larger than the stable version's in the same windows.

    Hits of the candidate among all hits follow a hypergeometric law, whose generating function is at most
    that of a binomial law (Hoeffding 1963): of draws that may be hits, or of hits that may be the candidate's,
    whichever is less. A share ``floor`` of the candidate's may be hits for whatever reason.
    ``units`` says how many independent ones a window may count for: the weight is a function of what is
    known of both versions together, and a weight below 1 only makes a bet smaller (Jensen).

    Returns:
        A row for each of ``ODDS``, a column for each window.
    """
    hits, of = shares.hits + shares.stable_hits, np.maximum(shares.of + shares.stable_of, 1)
    share = hits / of
    draws = shares.of * np.log1p((share + floor * (1 - share)) * _MORE)
    owners = hits * np.log1p(shares.of / of * _MORE) + shares.of * np.log1p(floor * _MORE)
    weight = np.minimum(1.0, units / np.maximum(np.minimum(hits, shares.of), 1)) * (shares.stable_of > 0)
    logs: Floats = weight * (shares.hits * _LOG_ODDS - np.minimum(draws, owners))
    return logs


def single(hits: Floats, of: Floats, limit: Floats | float, units: Floats) -> Floats:
    """Returns the logarithms of bets that a share is at most ``limit``; see ``paired``."""
    weight = np.minimum(1.0, units / np.maximum(of, 1))
    share = np.minimum(np.asarray(limit, np.float64), 1.0)
    logs: Floats = weight * (hits * _LOG_ODDS - of * np.log1p(share * _MORE))
    return logs


def since(bets: Floats) -> Found:
    """Returns what bets have come to, with even stakes on every row and on fewer and fewer on later begins."""
    if not bets.size:
        return Found(0.0, 0)
    sums = bets[:, ::-1].cumsum(axis=1)[:, ::-1][:, ::_STRIDE]
    begins: Floats = np.arange(sums.shape[1], dtype=np.float64)
    stakes = 0.5 / np.maximum(begins * (begins + 1.0), 1.0)
    logs = sums + np.log(stakes / len(bets))
    highest = float(logs.max())
    log_e = highest + math.log(float(np.exp(logs - highest).sum()))
    best = sums.max(axis=0)
    return Found(log_e, _STRIDE * int(np.flatnonzero(best >= best.max() - _EVEN)[-1]))


def upper_limit(count: float, total: float, alpha: float) -> float:
    """Returns what a share is at most, as seen at one moment, but for a probability of ``alpha``.

    Source: Chernoff's bound, in the form of Hoeffding 1963, theorem 1.
    """
    if total <= 0:
        return 1.0
    low, high = count / total, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if total * _divergence(count / total, middle) > math.log(1 / alpha):
            high = middle
        else:
            low = middle
    return high


def _divergence(share: float, other: float) -> float:
    """Returns the relative entropy of one share to a larger one."""
    if other >= 1:
        return math.inf if share < 1 else 0.0
    hits = share * math.log(share / other) if share > 0 else 0.0
    misses = (1 - share) * math.log((1 - share) / (1 - other)) if share < 1 else 0.0
    return hits + misses
