"""Verdicts on candidates: the sick are found out within few calls, the healthy are left alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pytest

from modelport_server.rollout.comparison import ComparisonLimits, Verdict, VerdictKind, compare
from modelport_server.rollout.evidence import Evidence, EvidenceSnapshot, Outcome
from modelport_server.rollout.sequential import ODDS, Shares, paired, since, single, upper_limit
from modelport_server.rollout.signs import engine_time, view
from modelport_server.tensors import RawTensor
from tests.support.simulated_rollouts import Fault, World, looks
from tests.unit.test_evidence import SIGNATURE, Clock, raw

LIMITS = ComparisonLimits()
CLASSES = np.eye(10, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class End:
    """How a simulated step ended."""

    verdict: Verdict
    at_s: float
    calls: int
    """The candidate's since its fault began."""


def run(world: World, seed: int = 1, *, concurrent: bool = True, every: int = 2) -> End:
    """Looks at a simulated step until the candidate is found to be worse, or to its end."""
    before, end = 0, None
    for look in looks(world, np.random.default_rng(seed), every):
        if look.at_s <= world.fault.at_s:
            before = look.candidate.ended
        verdict = compare(look.stable, look.candidate, LIMITS, concurrent=concurrent)
        end = End(verdict, look.at_s, look.candidate.ended - before)
        if verdict.kind is VerdictKind.WORSE:
            break
    assert end is not None
    return end


FAULTS = {
    "errors": (Fault(errors=0.05), 250),
    "all errors": (Fault(errors=1.0), 30),
    "slow": (Fault(slower=2.0), 60),
    "one class": (Fault(one_class=1.0), 40),
    "non-finite": (Fault(non_finite=0.1), 100),
}


@pytest.mark.parametrize("at_s", [0.0, 10.0])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_at_one_percent(name: str, at_s: float) -> None:
    fault, calls = FAULTS[name]
    fault = Fault(at_s=at_s, errors=fault.errors, slower=fault.slower, one_class=fault.one_class,
                  non_finite=fault.non_finite)  # fmt: skip
    # Short batches that are slow from the first on could be cold: see test_an_engine_that_is_idle_may_take_longer.
    if at_s == 0 and name == "slow":
        fault = Fault(slower=5.0)
    end = run(World(fault=fault))
    assert end.verdict.kind is VerdictKind.WORSE
    assert end.calls < calls
    assert end.verdict.figures["sign"]


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_within_seconds_at_larger_shares(name: str, share: float) -> None:
    end = run(World(share=share, seconds=20, fault=FAULTS[name][0]))
    assert end.verdict.kind is VerdictKind.WORSE
    assert end.at_s <= 8


HEALTHY = {
    "steady": World(),
    "half": World(share=0.5, seconds=20),
    "bursts": World(together=8, slow_share=0.2, spread=0.6),
    "outages of both": World(share=0.1, slow_share=0.1, errors_when_slow=0.5),
    "drift": World(share=0.1, drift=1.0),
    "few calls": World(calls_per_s=5, share=0.5),
    "rare classes": World(share=0.1, even=0.3),
    "errors of both": World(share=0.1, errors=0.05),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_candidate_is_fine(name: str) -> None:
    end = run(HEALTHY[name], every=8)
    assert end.verdict.kind is VerdictKind.FINE, end.verdict


def test_too_few_calls_are_waited_for() -> None:
    end = run(World(calls_per_s=20, seconds=20), every=8)
    assert end.verdict.kind is VerdictKind.WAITING
    assert "of the 100 calls" in end.verdict.reason


def test_nothing_at_all_is_waited_for() -> None:
    nothing = Evidence(Clock()).snapshot()
    assert compare(nothing, nothing, LIMITS).kind is VerdictKind.WAITING
    assert compare(nothing, nothing, LIMITS, concurrent=False).kind is VerdictKind.WAITING


class Pair:
    """Two versions that are called by hand, on one clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.stable, self.candidate = Evidence(self.clock), Evidence(self.clock)
        self.rng = np.random.default_rng(3)

    def windows(
        self,
        count: int,
        stable: int = 40,
        candidate: int = 4,
        *,
        slower: float = 1.0,
        outcome: Outcome = Outcome.ANSWERED,
    ) -> None:
        """Lets some windows of time pass, with so many calls in each."""
        for _ in range(count):
            for _ in range(stable):
                self.call(self.stable, 0.005)
            for number in range(candidate):
                self.call(self.candidate, 0.005 * slower, outcome if number == 0 else Outcome.ANSWERED)
            self.clock.now_s += 0.25

    def call(self, evidence: Evidence, latency_s: float, outcome: Outcome = Outcome.ANSWERED) -> None:
        evidence.on_call(outcome, latency_s * float(self.rng.uniform(0.9, 1.1)))

    def compare(self, *, concurrent: bool = True, oldest_wait_s: float = 0.0) -> Verdict:
        now = self.candidate.snapshot(oldest_wait_s=oldest_wait_s)
        return compare(self.stable.snapshot(), now, LIMITS, concurrent=concurrent)


def test_calls_that_blame_the_inputs_count_beside_others_of_the_same_time() -> None:
    pair = Pair()
    pair.windows(12, outcome=Outcome.CALLER_FAULT)
    assert pair.compare().kind is VerdictKind.WORSE
    assert pair.compare(concurrent=False).kind is not VerdictKind.WORSE


def test_callers_that_leave_a_slow_candidate_speak_against_it() -> None:
    pair = Pair()
    pair.windows(30, slower=20, outcome=Outcome.CANCELLED)
    verdict = pair.compare()
    assert verdict.kind is VerdictKind.WORSE
    assert verdict.figures["sign"] == "latency"


def test_a_small_difference_of_latency_is_fine() -> None:
    pair = Pair()
    pair.windows(200, slower=1.3)
    assert pair.compare().kind is VerdictKind.FINE


def test_a_hiccup_of_a_second_is_no_reason_to_go_back() -> None:
    pair = Pair()
    pair.windows(20)
    pair.windows(4, slower=5)
    pair.windows(20)
    assert pair.compare().kind is VerdictKind.FINE


def test_a_call_that_is_never_answered_is_a_hang() -> None:
    pair = Pair()
    pair.windows(10)
    for _ in range(20):
        pair.clock.now_s += 0.2
        pair.compare()
    assert pair.compare(oldest_wait_s=4.0).kind is VerdictKind.WORSE
    assert "has not answered for 3.8 s" in pair.compare(oldest_wait_s=4.0).reason


def test_a_wait_is_none_where_the_stable_version_takes_as_long() -> None:
    pair = Pair()
    pair.windows(10)
    pair.stable.on_call(Outcome.ANSWERED, 3.0)
    for _ in range(20):
        pair.clock.now_s += 0.2
        pair.compare()
    assert pair.compare(oldest_wait_s=4.0).kind is not VerdictKind.WORSE


def batches(
    evidence: Evidence, outputs: list[RawTensor], *, engine_us: int = 2000, rows: int = 1, count: int = 8
) -> None:
    for _ in range(count):
        evidence.on_call(Outcome.ANSWERED, engine_us / 1e6 + 0.003)
        evidence.on_batch(SIGNATURE, rows, engine_us, outputs)


def beside_each_other(pair: Pair, windows: int, stable_us: int, candidate_us: int, candidate: int = 1) -> Verdict:
    """Lets both have batches, the stable version 50 in a window; returns what is made of it then."""
    for _ in range(windows):
        batches(pair.stable, [], engine_us=stable_us, count=50)
        batches(pair.candidate, [], engine_us=candidate_us, count=candidate)
        pair.clock.now_s += 0.25
    return pair.compare()


def test_an_engine_that_is_idle_may_take_longer() -> None:
    """As it does with caches that others have used meanwhile."""
    verdict = beside_each_other(Pair(), 120, 1000, 2200)
    assert verdict.kind is VerdictKind.FINE
    assert verdict.figures["first_ratio"] == pytest.approx(5.2 / 4.0, rel=0.1)


def test_an_engine_that_is_slow_and_never_idle_is_found() -> None:
    """It has fewer batches than the stable version's, of more calls each, but as many calls."""
    pair = Pair()
    for _ in range(60):
        for evidence, count, engine_us in ((pair.stable, 60, 4000), (pair.candidate, 30, 8000)):
            for number in range(120):
                evidence.on_call(Outcome.ANSWERED, engine_us / 1e6)
                if number < count:
                    evidence.on_time(SIGNATURE, 2, engine_us)
        pair.clock.now_s += 0.25
    assert pair.compare().kind is VerdictKind.WORSE


def test_what_short_batches_take_longer_does_not_excuse_long_ones() -> None:
    pair = Pair()
    beside_each_other(pair, 40, 1000, 2200)
    for _ in range(60):
        for evidence, count, engine_us in ((pair.stable, 50, 40_000), (pair.candidate, 2, 80_000)):
            batches(evidence, [], engine_us=engine_us, rows=64, count=count)
        pair.clock.now_s += 0.25
    found = engine_time(view(pair.stable.snapshot(), pair.candidate.snapshot(), concurrent=True), 1.5)
    assert found.real
    assert found.log_e > math.log(1 / LIMITS.false_alarm)


def test_calls_of_earlier_phases_do_not_make_the_stable_version_busier() -> None:
    pair = Pair()
    for _ in range(60):
        for evidence in (pair.stable, pair.candidate):
            batches(evidence, [], engine_us=1000)
        pair.clock.now_s += 0.25
    stable = pair.stable.snapshot()
    whole = stable.with_totals({name: 5 * count for name, count in stable.totals().items()})
    assert whole.ended == 5 * stable.ended
    assert not view(whole, pair.candidate.snapshot(), concurrent=False).colder


def in_larger_batches(candidate_us: int, *, windows: int = 60, stray: bool = False) -> Verdict:
    """Compares a candidate that has one row in each batch with a stable version that hardly ever has."""
    pair = Pair()
    if stray:
        pair.candidate.on_time(SIGNATURE, 64, 30_000)
    for window in range(windows):
        for _ in range(60):
            pair.stable.on_call(Outcome.ANSWERED, 0.012)
        for _ in range(10):
            pair.stable.on_time(SIGNATURE, 6, 4000)
        if window % 8 == 0:
            pair.stable.on_time(SIGNATURE, 1, 4000)
        for _ in range(4):
            pair.candidate.on_call(Outcome.ANSWERED, 0.012)
            pair.candidate.on_time(SIGNATURE, 1, candidate_us)
        pair.clock.now_s += 0.25
    return pair.compare()


def test_a_batch_that_takes_longer_than_larger_ones_is_found() -> None:
    """Though calls do not: the stable version's wait for their batch."""
    verdict = in_larger_batches(20_000)
    assert verdict.kind is VerdictKind.WORSE
    assert verdict.reason.startswith("batches that are no larger take ")
    assert in_larger_batches(20_000, stray=True).kind is VerdictKind.WORSE


def test_a_batch_that_takes_less_time_than_larger_ones_is_fine() -> None:
    assert in_larger_batches(1500).kind is VerdictKind.FINE
    assert in_larger_batches(4000).kind is VerdictKind.FINE


def test_what_is_slow_for_both_while_the_first_batches_run_is_not_put_down_to_few_calls() -> None:
    pair = Pair()
    beside_each_other(pair, 20, 4000, 6800)
    assert beside_each_other(pair, 120, 1000, 1700).kind is VerdictKind.FINE
    pair = Pair()
    beside_each_other(pair, 20, 1000, 1700)
    assert beside_each_other(pair, 120, 4000, 6800).kind is VerdictKind.FINE
    assert beside_each_other(pair, 60, 4000, 13_600).kind is VerdictKind.WORSE


def test_times_that_can_not_be_judged_yet_are_waited_for() -> None:
    verdict = beside_each_other(Pair(), 11, 1000, 1000, candidate=10)
    assert (verdict.kind, verdict.figures["candidate_calls"]) == (VerdictKind.WAITING, 110)
    assert "to tell how long its engine takes" in verdict.reason


def test_batches_that_can_not_be_judged_yet_are_waited_for() -> None:
    """Though calls can, which take long because they wait for their batch."""
    pair = Pair()
    for window in range(60):
        for evidence, calls, count in ((pair.stable, 60, 10), (pair.candidate, 7, 1)):
            for _ in range(calls):
                evidence.on_call(Outcome.ANSWERED, 0.02)
            for _ in range(count):
                evidence.on_time(SIGNATURE, 6, 4000)
        pair.clock.now_s += 0.25
        if window == 15:
            assert pair.compare().kind is VerdictKind.WAITING
    assert pair.compare().kind is VerdictKind.FINE


def test_an_engine_that_is_idle_and_takes_longer_than_it_did_is_found() -> None:
    pair = Pair()
    assert beside_each_other(pair, 120, 1000, 1700).kind is VerdictKind.FINE
    verdict = beside_each_other(pair, 60, 1000, 3400)
    assert verdict.kind is VerdictKind.WORSE
    assert re.fullmatch(
        r"batches of the same size take 3\.\d+ times as long as the stable version's in the last \S+ s, and took "
        r"1\.\d+ times as long at first: \S+ ms in the median now, the stable version's \S+ ms",
        verdict.reason,
    )


@pytest.mark.parametrize("at_first_us", [1700, 3200])
def test_an_engine_that_is_idle_and_takes_a_little_longer_than_it_did_is_fine(at_first_us: int) -> None:
    pair = Pair()
    beside_each_other(pair, 120, 1000, at_first_us)
    assert beside_each_other(pair, 120, 1000, at_first_us + 400).kind is VerdictKind.FINE


def test_what_is_slower_is_found_in_the_rarer_size_too() -> None:
    pair = Pair()
    for candidate_us in (2000, 12_000):
        for _ in range(60):
            for evidence, engine_us, count in ((pair.stable, 2000, 30), (pair.candidate, candidate_us, 1)):
                batches(evidence, [], engine_us=2000, rows=1, count=2 * count)
                batches(evidence, [], engine_us=engine_us, rows=8, count=count)
            pair.clock.now_s += 0.25
    assert pair.compare().kind is VerdictKind.WORSE


def test_sizes_that_the_candidate_seldom_has_are_not_waited_for() -> None:
    """Else it would be waited for ever where nothing else can be compared, or for a burst that does not come again."""
    pair = Pair()
    for window in range(200):
        for evidence, calls in ((pair.stable, 60), (pair.candidate, 4)):
            for _ in range(calls):
                evidence.on_call(Outcome.ANSWERED, 0.02)
        for _ in range(10):
            pair.stable.on_time(SIGNATURE, 6, 4000)
        for _ in range(4):
            pair.candidate.on_time(SIGNATURE, 6 if window < 1 else 1, 4000)
        pair.clock.now_s += 0.25
    assert pair.compare().kind is VerdictKind.FINE


def test_an_engine_that_is_idle_and_computes_twice_as_long_as_it_did_is_found() -> None:
    """What it takes for being idle does not double, so that it takes 1.5 times as long as it did."""
    pair = Pair()
    assert beside_each_other(pair, 120, 1000, 1700).kind is VerdictKind.FINE
    assert beside_each_other(pair, 60, 1000, 2600).kind is VerdictKind.WORSE


def test_an_engine_that_takes_far_longer_than_an_idle_one_may_is_found() -> None:
    assert beside_each_other(Pair(), 60, 1000, 5000).kind is VerdictKind.WORSE
    assert beside_each_other(Pair(), 60, 20_000, 40_000).kind is VerdictKind.WORSE


def test_an_engine_that_takes_longer_and_has_as_many_batches_is_found() -> None:
    assert beside_each_other(Pair(), 60, 1000, 2200, candidate=50).kind is VerdictKind.WORSE


def test_the_reason_says_how_many_batches_it_is_about() -> None:
    reason = beside_each_other(Pair(), 60, 20_000, 40_000, candidate=5).reason
    assert re.fullmatch(
        r"batches of the same size take 40\.7 ms in the median of \d+ in the last \S+ s, "
        r"the stable version's 20\.3 ms \(4\.?\d* ms are put down to its having few calls\)",
        reason,
    )


def baseline(pair: Pair, windows: int = 60) -> EvidenceSnapshot:
    """Returns what the stable version did on its own, earlier."""
    for _ in range(windows):
        batches(pair.stable, [raw(CLASSES[pair.rng.integers(10, size=1)])])
        pair.clock.now_s += 0.25
    return pair.stable.snapshot()


@pytest.mark.parametrize(
    ("engine_us", "one_class", "broken", "sign"),
    [(2000, False, False, ""), (5000, False, False, "engine"), (2000, True, False, "outputs"),
     (2000, False, True, "non-finite")],
)  # fmt: skip
def test_a_promoted_version_is_compared_with_what_its_predecessor_did(
    engine_us: int, one_class: bool, broken: bool, sign: str
) -> None:
    pair = Pair()
    before = baseline(pair)
    pair.clock.now_s += 60
    for _ in range(120):
        scores = CLASSES[pair.rng.integers(1 if one_class else 10, size=1)]
        batches(pair.candidate, [raw(scores * (math.nan if broken else 1))], engine_us=engine_us)
        pair.clock.now_s += 0.25
    verdict = compare(before, pair.candidate.snapshot(), LIMITS, concurrent=False)
    assert verdict.kind is (VerdictKind.WORSE if sign else VerdictKind.FINE), verdict
    assert verdict.figures.get("sign", "") == sign


def test_a_promoted_version_that_fails_goes_back() -> None:
    pair = Pair()
    before = baseline(pair, 240)
    for _ in range(80):
        batches(pair.candidate, [], count=19)
        pair.candidate.on_call(Outcome.FAILED, 0.005)
        pair.clock.now_s += 0.25
    verdict = compare(before, pair.candidate.snapshot(), LIMITS, concurrent=False)
    assert verdict.kind is VerdictKind.WORSE
    assert verdict.figures["sign"] == "errors"


def test_failures_that_came_all_at_once_are_doubtful_and_not_just_too_few() -> None:
    pair = Pair()
    before = baseline(pair)
    for number in range(150):
        pair.candidate.on_call(Outcome.FAILED if number % 3 == 0 else Outcome.ANSWERED, 0.005)
    verdict = compare(before, pair.candidate.snapshot(), LIMITS, concurrent=False)
    assert (verdict.kind, verdict.reason) == (
        VerdictKind.DOUBTFUL,
        f"it may be worse: 50 of 150 calls failed, 0 of the stable version's {before.ended}",
    )


def test_batches_are_compared_with_those_of_their_size() -> None:
    pair = Pair()
    for _ in range(60):
        batches(pair.stable, [], rows=32, engine_us=20_000)
        batches(pair.stable, [], rows=1, engine_us=2000, count=2)
        batches(pair.candidate, [], rows=32, engine_us=20_000, count=3)
        batches(pair.candidate, [], rows=1, engine_us=2000, count=1)
        pair.clock.now_s += 0.25
    assert pair.compare().kind is VerdictKind.FINE
    for _ in range(60):
        batches(pair.stable, [], rows=32, engine_us=20_000)
        batches(pair.stable, [], rows=1, engine_us=2000, count=2)
        batches(pair.candidate, [], rows=1, engine_us=4000, count=2)
        pair.clock.now_s += 0.25
    assert pair.compare().figures["sign"] == "engine"


@pytest.mark.parametrize(("mean", "kind"), [(1.0, VerdictKind.FINE), (1.6, VerdictKind.WORSE)])
def test_outputs_without_classes_are_compared_by_their_size(mean: float, kind: VerdictKind) -> None:
    pair = Pair()
    for _ in range(40):
        for evidence, middle in ((pair.stable, 1.0), (pair.candidate, mean)):
            prices = pair.rng.normal(middle, 0.1, (4, 1)).astype(np.float32)
            batches(evidence, [raw(prices, "price")], rows=4)
        pair.clock.now_s += 0.25
    assert pair.compare().kind is kind


@pytest.mark.parametrize(("moved", "kind"), [(0.05, VerdictKind.FINE), (0.4, VerdictKind.WORSE)])
def test_a_version_that_has_learnt_may_answer_a_little_otherwise(moved: float, kind: VerdictKind) -> None:
    pair = Pair()
    for _ in range(200):
        for evidence, share in ((pair.stable, 0.0), (pair.candidate, moved)):
            for _ in range(8):
                named = pair.rng.integers(10, size=1)
                batches(evidence, [raw(CLASSES[named if pair.rng.random() > share else [3]])], count=1)
        pair.clock.now_s += 0.25
    assert pair.compare().kind is kind


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="false_alarm"):
        ComparisonLimits(false_alarm=0)


def test_a_bet_on_what_chance_decides_wins_nothing() -> None:
    """The expectation of every bet, summed over all outcomes of an urn, is at most 1."""
    for of, stable_of, hits in ((3, 30, 4), (20, 20, 5), (40, 10, 30), (1, 200, 1)):
        least, most = max(0, hits - stable_of), min(hits, of)
        own = np.arange(least, most + 1, dtype=np.float64)
        chances = np.array([math.comb(of, int(k)) * math.comb(stable_of, hits - int(k)) for k in own], np.float64)
        chances /= math.comb(of + stable_of, hits)
        size = np.ones(len(own))
        for units in (1.0, 4.0, 1e9):
            bets = paired(Shares(own, size * of, hits - own, size * stable_of), 0.0, size * units)
            assert bets.shape == (len(ODDS), len(own))
            assert (np.exp(bets) @ chances <= 1 + 1e-9).all()


def test_a_bet_against_a_known_share_wins_nothing() -> None:
    own = np.arange(21, dtype=np.float64)
    chances = np.array([math.comb(20, int(k)) * 0.3**k * 0.7 ** (20 - k) for k in own])
    for units in (1.0, 1e9):
        bets = single(own, np.full(21, 20.0), 0.3, np.full(21, units))
        assert (np.exp(bets) @ chances <= 1 + 1e-9).all()


def test_stakes_add_up_to_one() -> None:
    found = since(np.zeros((3, 400)))
    assert found.log_e == pytest.approx(0, abs=0.01)
    assert found.log_e <= 0


def test_the_begin_of_a_fault_is_found() -> None:
    bets = np.full((1, 100), -0.5)
    bets[:, 60:] = 1.0
    found = since(bets)
    assert found.first == 60
    assert 40 - 8 < found.log_e < 40


def test_the_upper_limit_of_a_share() -> None:
    assert upper_limit(0, 0, 0.01) == 1
    assert upper_limit(5, 10, 0.01) > 0.8
    assert upper_limit(0, 10_000, 0.01) == pytest.approx(math.log(100) / 10_000, rel=0.01)
    assert upper_limit(100, 10_000, 0.01) == pytest.approx(0.0131, abs=0.0003)
    assert upper_limit(10, 10, 0.01) == 1
