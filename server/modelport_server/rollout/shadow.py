"""Shadow traffic: copies of real calls for a candidate, whose answers are compared and thrown away."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic

from modelport.names import DEFAULT_SIGNATURE
from modelport_registry import JSON, RolloutPolicy
from modelport_server.batching.calls import Batch, BatchOutput, Call
from modelport_server.errors import InvalidCallError, NotCopiedError, ServeError
from modelport_server.outputs import agreeing_rows
from modelport_server.rollout.agreement import Agreement
from modelport_server.rollout.comparison import Verdict, VerdictKind
from modelport_server.rollout.evidence import Evidence, Outcome, outcome_of
from modelport_server.rollout.spare import SpareTime
from modelport_server.servable import Servable

_log = logging.getLogger(__name__)

_MAX_WAITING = 32
"""Calls that end together are copied one after another; more than so many are not kept for it."""
_MAX_WAITING_BYTES = 16 << 20
"""The same in bytes of inputs and answers."""
_FALSE_ALARM = 1e-5
"""How likely an output that agrees often enough is said not to, over all looks at it."""
_SUSPICION = 0.05


class Shadow:
    """Copies a share of the stable version's calls to the candidate once their callers have been answered.

    Callers never wait for it: a call is copied after it has ended, and dropped where the candidate is
    behind with the last copies or the machine has no core to spare. The candidate's engine process compares
    the answers: whatever is done here, callers wait for.

    Args:
        candidate: gets the copies.
        evidence: told what the candidate makes of them.
        stable_evidence: told what the answers were like that the calls got.
        share: of the calls, 0 to 1.
        policy: what counts as agreement.
        is_idle: returns whether the machine has a core to spare; by default the machine is asked.
    """

    def __init__(
        self,
        candidate: Servable,
        evidence: Evidence,
        stable_evidence: Evidence,
        share: float,
        policy: RolloutPolicy,
        is_idle: Callable[[], bool] | None = None,
    ) -> None:
        self.candidate = candidate
        self._evidence = evidence
        self._stable_evidence = stable_evidence
        self._share = share
        self._policy = policy
        self._owed = 0.0
        self._waiting: deque[Call] = deque()
        self._waiting_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._spare = SpareTime(lambda: candidate.pid)
        self._is_idle = is_idle if is_idle is not None else self._spare.there_is
        self._agreement: dict[str, Agreement] = {}
        self._copied = 0
        self._dropped = 0
        self._failed = 0

    def look(self) -> None:
        """Looks whether the machine has a core to spare; to be called a few times a second."""
        self._spare.look()

    @property
    def has_time(self) -> bool:
        """Whether the machine had a core to spare when last looked."""
        return self._is_idle()

    def on_call(self, call: Call, now_s: float) -> None:
        """Copies a call that was answered, if it is among the share."""
        if call.future.cancelled() or call.future.exception() is not None:
            return
        self._owed += self._share
        if self._owed < 1 - 1e-9:
            return
        self._owed -= 1
        if not self._has_room(call) or not self.has_time:
            self._dropped += 1
            return
        self._waiting.append(call)
        self._waiting_bytes += _bytes(call)
        self._begin()

    def _begin(self) -> None:
        if self._waiting and self._task is None:  # a task, because the caller's answer goes out first
            self._task = asyncio.get_running_loop().create_task(self._copy_waiting())
            self._task.add_done_callback(self._on_done)

    def on_batch(self, batch: Batch, output: BatchOutput) -> None:
        """Takes no notice of batches."""

    def stop(self) -> None:
        """Copies nothing more of what waits; what the candidate is at comes to its end."""
        self._waiting.clear()
        self._waiting_bytes = 0

    def _has_room(self, call: Call) -> bool:
        return len(self._waiting) < _MAX_WAITING and self._waiting_bytes + _bytes(call) <= _MAX_WAITING_BYTES

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a call could not be copied", exc_info=error)
        self._begin()  # for what came this moment

    async def _copy_waiting(self) -> None:
        while self._waiting:
            call = self._waiting.popleft()
            self._waiting_bytes -= _bytes(call)
            if self.candidate.takes_copies:
                await self._copy(call)
            else:
                self._dropped += 1

    async def _copy(self, call: Call) -> None:
        began_s = monotonic()
        try:
            found = await self.candidate.compare(call, look=self._evidence.take_look())
        except NotCopiedError:
            self._dropped += 1
            return
        except InvalidCallError:  # what callers send is not for it
            self._failed += 1
            self._add(call.signature, {t.name: agreeing_rows(t, None) for t in call.future.result().outputs})
            return
        except ServeError as error:
            self._copied += 1
            self._failed += 1
            if (outcome := outcome_of(error)) is not None:
                self._evidence.on_call(outcome, monotonic() - began_s)
            return
        self._copied += 1
        self._evidence.on_call(Outcome.ANSWERED, monotonic() - began_s)
        self._evidence.on_time(call.signature, found.rows, found.engine_time_us)
        self._evidence.on_categories(call.signature, found.categories)
        self._stable_evidence.on_categories(call.signature, found.answer_categories)
        self._add(call.signature, found.agreeing)

    def _add(self, signature: str, agreeing: Mapping[str, tuple[int, int]]) -> None:
        for output, (rows, agreed) in agreeing.items():
            name = output if signature == DEFAULT_SIGNATURE else f"{signature}/{output}"
            self._agreement.setdefault(name, Agreement()).add(rows, agreed, self._policy.min_agreement)

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


def _bytes(call: Call) -> int:
    """Returns the size of a call's inputs and of its answer."""
    return call.bytes + sum(len(tensor.data) for tensor in call.future.result().outputs)
