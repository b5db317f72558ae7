"""The bake: compares a rollout's candidate with the stable version while a phase of the rollout lasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic

from modelport_registry import Phase, Rollout, RolloutPolicy, StepKind
from modelport_registry import State as Desired
from modelport_server.batching.calls import Batch, BatchOutput, Call
from modelport_server.rollout.comparison import ComparisonLimits, Verdict, compare
from modelport_server.rollout.evidence import Evidence, EvidenceSnapshot, Outcome, outcome_of
from modelport_server.rollout.shadow import Shadow
from modelport_server.rollout.status import Traffic
from modelport_server.servable import Servable

_LOOK_S = 0.2
"""How long a verdict holds at least: less than the time between two looks of the manager, so that each may judge."""
_LONGEST_LOOK_S = 1.2
"""And at most: what can be told is to be acted on within two seconds."""
_SHARE = 1 / 500
"""The share of the time that comparing may take where that is possible: calls wait meanwhile."""
_Key = tuple[str, Phase, int, int | None]


class Witness:
    """Writes down what one servable does, as evidence."""

    def __init__(self, servable: Servable) -> None:
        self.servable = servable
        self.evidence = Evidence()
        self.looks = True
        """Whether it looks into outputs: not where the candidate's engine does, for which nobody waits."""

    def on_call(self, call: Call, now_s: float) -> None:
        """Counts a call."""
        if call.future.cancelled():
            outcome: Outcome | None = Outcome.CANCELLED
        else:
            error = call.future.exception()
            outcome = outcome_of(error) if error is not None else Outcome.ANSWERED
        if outcome is not None:
            self.evidence.on_call(outcome, now_s - call.enqueued_at)

    def on_batch(self, batch: Batch, output: BatchOutput) -> None:
        """Counts a batch."""
        if self.looks:
            self.evidence.on_batch(batch.signature, batch.rows, output.engine_time_us, output.outputs)
        else:
            self.evidence.on_time(batch.signature, batch.rows, output.engine_time_us)

    def snapshot(self) -> EvidenceSnapshot:
        """Returns what has been seen."""
        return self.evidence.snapshot(oldest_wait_s=self.servable.oldest_wait_s)


class Bake:
    """Follows one model's rollout from phase to phase.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._key: _Key | None = None
        self._since_s = clock()
        self._paused_at_s: float | None = None
        self._witnesses: dict[int, Witness] = {}
        self._baseline: EvidenceSnapshot | None = None
        self._shadow: Shadow | None = None
        self._judge_at_s = float("-inf")
        self._verdict: Verdict | None = None

    @property
    def age_s(self) -> float:
        """How long the present phase and step have been seen, pauses left out, in seconds."""
        return (self._clock() if self._paused_at_s is None else self._paused_at_s) - self._since_s

    @property
    def copied_to(self) -> Servable | None:
        """Who gets copies of calls, and calls that name it; None if nobody does."""
        return self._shadow.candidate if self._shadow is not None else None

    def follow(self, desired: Desired, servables: Mapping[int, Servable]) -> None:
        """Takes in the rollout as it is now and who can answer, and watches those that matter."""
        rollout = desired.rollout
        key = _key(rollout)
        if key != self._key:
            self._turn(key, rollout)
        self._pause(paused=rollout is not None and rollout.paused)
        if rollout is None:
            return
        for number in _compared(rollout, desired):
            if number in servables:
                self._watch(servables[number])
        self._mirror(rollout, desired.policy, servables)

    def _turn(self, key: _Key | None, rollout: Rollout | None) -> None:
        """Begins the next phase; a promoted version is compared with what its predecessor did until then."""
        predecessor = self._witnesses.get(rollout.previous) if rollout is not None and rollout.previous else None
        kept: Mapping[str, int] = rollout.baseline if rollout is not None else {}
        self._baseline = predecessor.snapshot().with_totals(kept) if predecessor is not None else _of_kept(kept)
        self._key, self._since_s, self._paused_at_s = key, self._clock(), None
        self._judge_at_s, self._verdict = float("-inf"), None
        for witness in self._witnesses.values():
            witness.servable.observers = ()
        self._witnesses = {}
        self._end_shadow()

    def _end_shadow(self) -> None:
        if self._shadow is not None:
            self._shadow.stop()
            self._shadow = None

    def _pause(self, *, paused: bool) -> None:
        """Stops the phase's clock, or lets it go on; what is seen meanwhile counts all the same."""
        now = self._clock()
        if paused and self._paused_at_s is None:
            self._paused_at_s = now
        elif not paused and self._paused_at_s is not None:
            self._since_s += now - self._paused_at_s
            self._paused_at_s = None

    def _watch(self, servable: Servable) -> None:
        witness = self._witnesses.get(servable.version)
        if witness is None or witness.servable is not servable:
            self._witnesses[servable.version] = witness = Witness(servable)
            servable.observers = (witness,)

    def _mirror(self, rollout: Rollout, policy: RolloutPolicy, servables: Mapping[int, Servable]) -> None:
        """Has the stable version's calls copied to the candidate while the step says so."""
        step, candidate = rollout.current, servables.get(rollout.version)
        stable = self._witnesses.get(rollout.previous) if rollout.previous is not None else None
        if step is None or step.kind is not StepKind.SHADOW or candidate is None or stable is None:
            return
        if self._shadow is None or self._shadow.candidate is not candidate:
            self._end_shadow()
            evidence = self._witnesses[rollout.version].evidence
            self._shadow = Shadow(candidate, evidence, stable.evidence, step.share, policy)
            stable.looks = False
        stable.servable.observers = (stable, self._shadow)
        self._shadow.look()

    def verdict(self, desired: Desired) -> Verdict | None:
        """Returns how the candidate does, a few times a second anew; None where there is nothing to compare."""
        rollout = desired.rollout
        if rollout is None or self._key != _key(rollout):
            return None
        began_s = self._clock()
        if began_s >= self._judge_at_s:
            self._verdict = self._judge(rollout, desired.policy)
            took_s = self._clock() - began_s
            self._judge_at_s = began_s + min(max(_LOOK_S, took_s / _SHARE), _LONGEST_LOOK_S)
        return self._verdict

    def _judge(self, rollout: Rollout, policy: RolloutPolicy) -> Verdict | None:
        candidate, before = self._witnesses.get(rollout.version), self._before(rollout)
        if rollout.phase is Phase.GATES or candidate is None or before is None:
            return None
        limits = ComparisonLimits(
            max_error_increase=policy.max_error_increase,
            max_latency_ratio=policy.max_latency_ratio,
            min_calls=policy.min_calls,
        )
        concurrent = rollout.current is not None and rollout.current.kind is StepKind.CANARY
        found = compare(before, candidate.snapshot(), limits, concurrent=concurrent)
        return self._shadow.judge(found) if self._shadow is not None else found

    def _before(self, rollout: Rollout) -> EvidenceSnapshot | None:
        if rollout.phase is Phase.WATCH:
            return self._baseline
        stable = self._witnesses.get(rollout.previous) if rollout.previous is not None else None
        return stable.snapshot() if stable is not None else None

    def totals(self, version: int | None) -> dict[str, int]:
        """Returns how many calls a version has had in this phase and how many failed; nothing if it is not watched."""
        witness = self._witnesses.get(version) if version is not None else None
        return witness.snapshot().totals() if witness is not None else {}

    def traffic(self, version: int) -> Traffic | None:
        """Returns what a version has answered in this phase; None if it is not watched."""
        witness = self._witnesses.get(version)
        return witness.evidence.traffic() if witness is not None else None


def _key(rollout: Rollout | None) -> _Key | None:
    return (rollout.id, rollout.phase, rollout.step, rollout.previous) if rollout is not None else None


def _of_kept(kept: Mapping[str, int]) -> EvidenceSnapshot | None:
    """Returns what the rollout itself says of the version before, for a server that has not seen it."""
    return EvidenceSnapshot.of_totals(kept) if kept else None


def _compared(rollout: Rollout, desired: Desired) -> tuple[int, ...]:
    """Returns the versions that are watched in a phase."""
    before = rollout.previous
    if rollout.phase is Phase.WATCH:
        return (rollout.version,)
    if rollout.phase is Phase.GATES:
        return (before,) if before is not None else ()
    return (rollout.version, before) if before is not None else (rollout.version,)
