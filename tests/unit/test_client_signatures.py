"""How often a client asks how a model is called while versions change."""

from __future__ import annotations

import pytest

from modelport import SignatureInfo
from modelport._options import Target
from modelport._signatures import SignatureCache

TARGET = Target(model="m")
ONE, TWO = (SignatureInfo(name=name, inputs=(), outputs=(), batched=True) for name in ("one", "two"))


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> SignatureCache:
    """Knows the signature of version 1, which is in charge."""
    cache = SignatureCache(clock)
    cache.put(TARGET, 1, ONE)
    return cache


def test_a_version_that_has_not_answered_before_is_reason_to_ask_at_once(cache: SignatureCache) -> None:
    cache.answered(TARGET, 1)
    assert cache.fresh(TARGET) is cache.take(TARGET) is ONE
    cache.answered(TARGET, 2)
    assert cache.fresh(TARGET) is None
    assert cache.take(TARGET) is None


def test_one_caller_asks_and_others_go_on_with_what_is_known(cache: SignatureCache, clock: Clock) -> None:
    cache.answered(TARGET, 2)
    assert [cache.take(TARGET) for _ in range(64)] == [None] + [ONE] * 63
    cache.answered(TARGET, 2)  # the one who asks has no answer yet
    assert cache.take(TARGET) is ONE
    clock.now = 1.0  # and never gets any
    cache.answered(TARGET, 2)
    assert cache.take(TARGET) is None
    assert cache.get(TARGET) is ONE
    cache.put(TARGET, 2, TWO)
    assert cache.fresh(TARGET) is cache.take(TARGET) is TWO


def test_two_versions_that_answer_in_turns_are_reason_to_ask_once_a_second(cache: SignatureCache, clock: Clock) -> None:
    asked = 0
    for number in range(400):
        clock.now = number * 0.01
        cache.answered(TARGET, 1 + number % 2)
        if cache.take(TARGET) is None:
            asked += 1
            cache.put(TARGET, 1, ONE)
    assert asked == 4  # the first time that version 2 answered, and once a second since


def test_what_was_a_candidate_and_is_in_charge_is_asked_for_within_a_second(
    cache: SignatureCache, clock: Clock
) -> None:
    cache.answered(TARGET, 2)
    cache.put(TARGET, 1, ONE)
    clock.now = 0.5
    cache.answered(TARGET, 2)
    assert cache.take(TARGET) is ONE
    clock.now = 1.0
    cache.answered(TARGET, 2)
    assert cache.take(TARGET) is None
    cache.put(TARGET, 2, TWO)
    clock.now = 99.0
    cache.answered(TARGET, 2)
    assert cache.take(TARGET) is TWO


def test_what_is_known_is_bounded(cache: SignatureCache) -> None:
    for number in range(1000):
        cache.put(Target(model=f"m{number}"), 1, ONE)
    assert cache.get(TARGET) is None
    assert cache.get(Target(model="m999")) is ONE
