"""Shadow traffic: copies of real calls for a candidate, whose answers are compared and thrown away."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from modelport.exceptions import ModelportError
from modelport.names import DEFAULT_SIGNATURE
from modelport.tensors import array_from_bytes
from modelport_registry import JSON, RolloutPolicy
from modelport_server.batching.calls import Answer, Batch, BatchOutput, Call
from modelport_server.errors import InvalidCallError
from modelport_server.rollout.comparison import Verdict, VerdictKind
from modelport_server.rollout.sequential import ODDS
from modelport_server.rollout.spare import SpareTime
from modelport_server.servable import Servable
from modelport_server.tensors import RawTensor

_MAX_UNDER_WAY = 2
_PATIENCE_S = 5.0
_MAX_ROWS = 1024
"""A larger call is compared in its first rows."""
_UNITS = 4.0
"""How many independent rows those of one call count for at most: callers send what is alike together."""
_FALSE_ALARM = 1e-5
"""How likely an output that agrees often enough is said not to, over all looks at it."""
_SUSPICION = 0.05


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


class Shadow:
    """Copies a share of the stable version's calls to the candidate once their callers have been answered.

    Callers never wait for it: a call is copied after it has ended, and dropped where the candidate is
    still busy with the last copies or the machine has no core to spare.

    Args:
        candidate: gets the copies.
        share: of the calls, 0 to 1.
        policy: what counts as agreement.
        is_idle: returns whether the machine has a core to spare; by default the machine is asked.
    """

    def __init__(
        self,
        candidate: Servable,
        share: float,
        policy: RolloutPolicy,
        is_idle: Callable[[], bool] | None = None,
    ) -> None:
        self.candidate = candidate
        self._share = share
        self._policy = policy
        self._owed = 0.0
        self._under_way: set[asyncio.Future[Answer]] = set()
        self._is_idle = is_idle or SpareTime(lambda: candidate.pid).there_is
        self._agreement: dict[str, Agreement] = {}
        self._scheduled = 0
        self._copied = 0
        self._dropped = 0
        self._failed = 0

    def on_call(self, call: Call, now_s: float) -> None:
        """Copies a call that was answered, if it is among the share."""
        if call.future.cancelled() or call.future.exception() is not None:
            return
        self._owed += self._share
        if self._owed < 1 - 1e-9:
            return
        self._owed -= 1
        if self._scheduled + len(self._under_way) >= _MAX_UNDER_WAY or not self._is_idle():
            self._dropped += 1
            return
        self._scheduled += 1
        # Not now: the caller's answer goes out first.
        asyncio.get_running_loop().call_soon(self._copy, call, call.future.result())

    def on_batch(self, batch: Batch, output: BatchOutput) -> None:
        """Takes no notice of batches."""

    def _copy(self, call: Call, answer: Answer) -> None:
        self._scheduled -= 1
        try:
            copy = self.candidate.prepare(call.signature, call.inputs, (), monotonic() + _PATIENCE_S)
            self.candidate.submit(copy)
        except InvalidCallError:  # what callers send is not for it
            self._failed += 1
            self._compare(call.signature, answer, {})
            return
        except ModelportError:
            self._failed += 1
            return
        self._copied += 1
        self._under_way.add(copy.future)
        copy.future.add_done_callback(lambda future: self._on_answer(call.signature, answer, future))

    def _on_answer(self, signature: str, answer: Answer, future: asyncio.Future[Answer]) -> None:
        self._under_way.discard(future)
        if future.cancelled() or future.exception() is not None:
            self._failed += 1
            return
        self._compare(signature, answer, {tensor.name: tensor for tensor in future.result().outputs})

    def _compare(self, signature: str, answer: Answer, given: Mapping[str, RawTensor]) -> None:
        for tensor in answer.outputs:
            name = tensor.name if signature == DEFAULT_SIGNATURE else f"{signature}/{tensor.name}"
            found = self._agreement.setdefault(name, Agreement())
            found.add(*agreeing_rows(tensor, given.get(tensor.name)), self._policy.min_agreement)

    def judge(self, found: Verdict) -> Verdict:
        """Returns what is to be made of the candidate, given what the comparison without the answers found."""
        figures: dict[str, JSON] = {
            **found.figures,
            "copied": self._copied,
            "dropped": self._dropped,
            "failed": self._failed,
            "agreement": {name: round(one.share, 6) for name, one in self._agreement.items()},
            "rows": max((one.rows for one in self._agreement.values()), default=0),
        }
        kind, reason = found.kind, found.reason
        if kind is not VerdictKind.WORSE:
            kind, reason = self._judge_agreement(kind, reason)
        return Verdict(kind, reason, figures)

    def _judge_agreement(self, kind: VerdictKind, reason: str) -> tuple[VerdictKind, str]:
        least, enough = self._policy.min_agreement, self._policy.min_calls
        for name, one in sorted(self._agreement.items()):
            if one.too_seldom(least, _FALSE_ALARM):
                text = f"output {name!r} agrees in {one.share:.2%} of {one.rows} rows, below {least:.2%}"
                return VerdictKind.WORSE, text
        # Of the signature that is called most: one that nobody calls would hold up the rollout for ever.
        most = max((one.rows for one in self._agreement.values()), default=0)
        if most < enough:
            return VerdictKind.WAITING, f"{most} of {enough} rows compared"
        doubtful = (one for one in self._agreement.values() if one.rows >= enough or one.too_seldom(least, _SUSPICION))
        if any(one.share < least for one in doubtful):
            return VerdictKind.DOUBTFUL, "too few rows to tell whether the outputs agree"
        return kind, reason


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
    first, second = first[:_MAX_ROWS], second[:_MAX_ROWS]
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
