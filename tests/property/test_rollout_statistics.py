"""How often healthy candidates are rolled back and how soon sick ones are, over many simulated rollouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.support.rollout_rates import (
    FAULTS,
    SEEN_WITH_AS_MANY_CALLS,
    STEP,
    STEP_S,
    WORLDS,
    detection,
    detections,
    healthy,
    in_watch,
    interval,
)
from tests.support.simulated_rollouts import Fault, World

UNSTEADY = ("both fail 30% in a tenth of the time", "traffic, times and mix of classes wander")
"""Where a healthy version may be rolled back in its watch: nothing tells then whose fault the times are."""
MEDIANS = {
    "5% of the calls fail": 130,
    "twice the time, 20 ms": 60,
    "twice the time, 1 ms, from 10 s on": 60,
    "a single class": 35,
    "NaN in 10% of the rows": 90,
}
"""Calls of a candidate at 1% of 1,000 calls/s by which half of the faults must have been found."""


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ProcessPoolExecutor(2) as executor:
        yield executor


@pytest.mark.parametrize("name", WORLDS)
def test_a_healthy_rollout_ends_well(name: str) -> None:
    end = healthy(WORLDS[name], 5)
    assert end is None or (name in UNSTEADY and end[0] != STEP), end


@pytest.mark.parametrize("name", MEDIANS)
def test_a_sick_candidate_is_found_out(name: str) -> None:
    sick = FAULTS[name]
    calls = [detection(sick.world(), sick.begins_s, seed).calls for seed in range(5)]
    assert np.median(calls) < MEDIANS[name]


@pytest.mark.parametrize(("share", "found"), [(0.01, False), (0.5, True)])
def test_a_short_batch_that_takes_longer_from_the_start_is_found_with_as_many_calls(share: float, found: bool) -> None:
    sick = FAULTS[SEEN_WITH_AS_MANY_CALLS]
    ends = [detection(sick.world(share=share), sick.begins_s, seed) for seed in range(5)]
    assert [math.isfinite(end.calls) for end in ends] == [found] * 5


DRIFTING = "traffic, times and mix of classes wander"


def test_a_healthy_version_may_drift_in_its_watch_as_the_one_before_it_did() -> None:
    found = [in_watch(replace(WORLDS[DRIFTING], seconds=STEP_S), seed) for seed in range(10)]
    assert found.count(None) >= 9  # without any regard for drift it would be 4


@pytest.mark.parametrize("name", [*WORLDS])
def test_a_version_that_answers_a_single_class_from_its_watch_on_is_found_out(name: str) -> None:
    world = replace(WORLDS[name], seconds=STEP_S, fault=Fault(one_class=1.0, at_s=STEP_S))
    found = [in_watch(world, seed) for seed in range(5)]
    assert sum(verdict is not None for verdict in found) >= 4


def test_a_version_that_is_three_times_slower_from_its_watch_on_is_found_out() -> None:
    world = World(seconds=STEP_S, fault=Fault(slower=3.0, at_s=STEP_S))
    found = [in_watch(world, seed) for seed in range(5)]
    assert [verdict and verdict.figures["sign"] for verdict in found] == ["engine"] * 5


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_two_thousand_healthy_rollouts_end_well(pool: Executor) -> None:
    for name, world in WORLDS.items():
        ends = [end for end in pool.map(partial(healthy, world), range(1000, 1225)) if end is not None]
        if name in UNSTEADY:
            ends = [end for end in ends if end[0] == STEP]
        assert ends == [], name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MEDIANS)
def test_three_hundred_sick_candidates_are_found_out(name: str, pool: Executor) -> None:
    found = [one.calls for one in detections(name, 1000.0, 0.01, 300, pool)]
    assert np.median(found) < MEDIANS[name]
    assert sum(math.isinf(calls) for calls in found) <= 3


def test_the_interval_of_a_share() -> None:
    assert interval(0, 100) == pytest.approx((0.0, 0.0362), abs=1e-4)
    assert interval(5, 100) == pytest.approx((0.0164, 0.1128), abs=1e-4)
    assert interval(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
