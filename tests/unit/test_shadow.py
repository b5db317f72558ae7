"""When the answers of a shadow count as alike, and what follows from it."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from modelport.tensors import array_bytes, dtype_of
from modelport_registry import RolloutPolicy
from modelport_server.batching.calls import Answer, Call
from modelport_server.errors import ExpiredError, InvalidCallError, ModelFailureError, NotCopiedError, ServeError
from modelport_server.outputs import Compared, agreeing_rows
from modelport_server.rollout.agreement import Agreement
from modelport_server.rollout.comparison import Verdict, VerdictKind
from modelport_server.rollout.evidence import CALLER_FAULTS, FAILED, ROWS, Evidence, bucket_of, size_of
from modelport_server.rollout.shadow import Shadow
from modelport_server.tensors import RawTensor


def raw(values: object, dtype: str = "float32") -> RawTensor:
    """Returns an output."""
    array = np.array(values, dtype)
    kind = dtype_of(array)
    return RawTensor("y", kind, array.shape, array_bytes(array, kind))


@pytest.mark.parametrize(
    ("left", "right", "alike"),
    [
        (raw([[0.1, 0.9], [0.8, 0.2]]), raw([[0.4, 0.6], [0.3, 0.7]]), (2, 1)),
        (raw([[0.1, np.nan]]), raw([[0.1, 0.9]]), (1, 0)),
        (raw([1.0, 2.0, 3.0]), raw([1.005, 2.1, 3.0]), (3, 2)),
        (raw([[1.0], [2.0]]), raw([[1.0], [2.5]]), (2, 1)),
        (raw([np.nan, 1.0]), raw([np.nan, 1.0]), (2, 2)),
        (raw([1, 2, 3], "int64"), raw([1, 2, 4], "int64"), (3, 2)),
        (raw([b"a", b"b"], "object"), raw([b"a", b"c"], "object"), (2, 1)),
        (raw([[[1.0, 2.0]], [[3.0, 4.0]]]), raw([[[1.0, 2.0]], [[3.0, 5.0]]]), (2, 1)),
        (raw(1.0), raw(1.0), (1, 1)),
        (raw(np.zeros((0, 3))), raw(np.zeros((0, 3))), (0, 0)),
        (raw(np.zeros((0, 3)), "int64"), raw(np.zeros((0, 3)), "int64"), (0, 0)),
        (raw(np.zeros(0)), raw(np.zeros(0)), (0, 0)),
        (raw([1.0, 2.0]), raw([1.0]), (2, 0)),
        (raw([1.0, 2.0]), raw([1, 2], "int64"), (2, 0)),
        (raw([1.0, 2.0]), None, (2, 0)),
    ],
)
def test_rows_that_agree(left: RawTensor, right: RawTensor | None, alike: tuple[int, int]) -> None:
    assert agreeing_rows(left, right) == alike


LEAST = 0.99
ALARM = 1e-5


@pytest.mark.parametrize("rows", range(1, 11))
def test_one_row_that_differs_proves_nothing(rows: int) -> None:
    for at in range(rows):
        one = Agreement()
        for index in range(rows):
            one.add(1, int(index != at), LEAST)
            assert not one.too_seldom(LEAST, ALARM)


def test_candidates_that_agree_often_enough_are_never_accused_and_others_soon() -> None:
    source = random.Random(5)
    accused = 0
    for _ in range(200):
        good, bad, found = Agreement(), Agreement(), 0
        for number in range(1, 2001):
            good.add(1, int(source.random() < LEAST), LEAST)
            bad.add(1, int(source.random() < 0.9), LEAST)
            assert not good.too_seldom(LEAST, ALARM)
            found = found or number * bad.too_seldom(LEAST, ALARM)
        accused += 0 < found < 600
    assert accused == 200


def test_the_rows_of_one_call_may_have_one_cause() -> None:
    one = Agreement()
    one.add(1000, 0, 0.5)
    assert not one.too_seldom(0.5, ALARM)
    for _ in range(20):
        one.add(1000, 0, 0.5)
    assert one.too_seldom(0.5, ALARM)


class Candidate:
    """A candidate that answers copies as it is told to."""

    pid = os.getpid()
    takes_copies = True

    def __init__(self, answer: Callable[[Call], Compared]) -> None:
        self._answer = answer
        self.copies: list[Call] = []

    async def compare(self, call: Call, *, look: bool) -> Compared:
        """Takes a copy."""
        self.copies.append(call)
        await asyncio.sleep(0)
        return self._answer(call)


@dataclass
class Machine:
    """Whether there is a core to spare."""

    idle: bool = True

    def __call__(self) -> bool:
        return self.idle


def _call(signature: str = "serving_default", input_bytes: int = 0) -> Call:
    """Returns a call of one row that has been answered."""
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    future.set_result(Answer(1, (raw([[1.0, 2.0]]),), 0, 0))
    inputs = (raw(np.zeros((1, input_bytes // 4))),)
    return Call(signature, (signature,), inputs, 1, splittable=False, future=future)


def _shadow(
    candidate: Candidate, share: float = 1.0, machine: Machine | None = None, stable: Evidence | None = None
) -> tuple[Shadow, Evidence]:
    evidence = Evidence()
    shadow = Shadow(
        cast("Any", candidate), evidence, stable or Evidence(), share, RolloutPolicy(), machine or Machine()
    )
    return shadow, evidence


async def _settled() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def _figures(shadow: Shadow) -> Mapping[str, Any]:
    return shadow.judge(Verdict(VerdictKind.FINE, "no worse")).figures


def _agrees(call: Call) -> Compared:
    return Compared(1, 1500, {"y": (1, 1)}, {"y": [1]}, {"y": [2]})


def _refuses(call: Call) -> Compared:
    raise InvalidCallError(f"m has no signature {call.signature!r}")


async def test_what_the_candidate_makes_of_copies_is_evidence() -> None:
    candidate = Candidate(_agrees)
    shadow, evidence = _shadow(candidate)
    for _ in range(5):
        shadow.on_call(_call(), 0.0)
    await _settled()
    seen = evidence.snapshot()
    assert (seen.ended, seen.calls.totals[FAILED]) == (5, 0)
    assert seen.engine["serving_default", size_of(1)].totals[bucket_of(0.0015)] == 5
    assert seen.outputs["serving_default", "y"].counts.totals[ROWS] == 5
    figures = _figures(shadow)
    assert (figures["copied"], figures["dropped"], figures["failed"], figures["rows"]) == (5, 0, 0, 5)


async def test_both_versions_outputs_are_looked_into_where_they_are_compared() -> None:
    stable = Evidence()
    shadow, evidence = _shadow(Candidate(_agrees), stable=stable)
    for _ in range(5):
        shadow.on_call(_call(), 0.0)
    await _settled()
    labels = [seen.snapshot().outputs["serving_default", "y"].labels for seen in (evidence, stable)]
    assert labels == [(1,), (2,)]


async def test_calls_that_were_not_answered_are_not_copied() -> None:
    candidate = Candidate(_agrees)
    shadow, _ = _shadow(candidate)
    failed, left = _call(), _call()
    failed.future = asyncio.get_running_loop().create_future()
    failed.future.set_exception(ExpiredError("too late"))
    left.future = asyncio.get_running_loop().create_future()
    left.future.cancel()
    shadow.on_call(failed, 0.0)
    shadow.on_call(left, 0.0)
    await _settled()
    assert candidate.copies == []


async def test_a_share_of_the_calls_is_copied() -> None:
    candidate = Candidate(_agrees)
    shadow, _ = _shadow(candidate, share=0.25)
    for _ in range(40):
        shadow.on_call(_call(), 0.0)
        await _settled()
    assert len(candidate.copies) == 10


async def test_copies_are_dropped_where_there_is_no_core_to_spare() -> None:
    candidate, machine = Candidate(_agrees), Machine(idle=False)
    shadow, _ = _shadow(candidate, machine=machine)
    for _ in range(3):
        shadow.on_call(_call(), 0.0)
    await _settled()
    machine.idle = True
    shadow.on_call(_call(), 0.0)
    await _settled()
    assert (_figures(shadow)["copied"], _figures(shadow)["dropped"]) == (1, 3)


async def test_what_waits_to_be_copied_is_bounded() -> None:
    candidate = Candidate(_agrees)
    shadow, _ = _shadow(candidate)
    for _ in range(100):
        shadow.on_call(_call(), 0.0)
    await _settled()
    first = _figures(shadow)
    assert (first["copied"], first["dropped"]) == (32, 68)
    for _ in range(10):
        shadow.on_call(_call(input_bytes=5 << 20), 0.0)
    await _settled()
    assert (_figures(shadow)["copied"], _figures(shadow)["dropped"]) == (32 + 3, 68 + 7)


async def test_a_candidate_that_is_busy_or_gone_gets_no_copy() -> None:
    candidate = Candidate(_agrees)
    candidate.takes_copies = False
    shadow, evidence = _shadow(candidate)
    shadow.on_call(_call(), 0.0)
    await _settled()
    assert (_figures(shadow)["dropped"], evidence.snapshot().ended) == (1, 0)


async def test_a_call_that_ends_as_the_last_copy_does_is_copied() -> None:
    candidate = Candidate(_agrees)
    shadow, _ = _shadow(candidate)
    shadow.on_call(_call(), 0.0)
    for wait in range(8):  # one of these moments is between the end of the copies and the next begin
        for _ in range(wait):
            await asyncio.sleep(0)
        shadow.on_call(_call(), 0.0)
    await _settled()
    assert len(candidate.copies) == 9


async def test_answers_count_towards_what_waits() -> None:
    candidate = Candidate(_agrees)
    shadow, _ = _shadow(candidate)
    large = _call()
    large.future = asyncio.get_running_loop().create_future()
    large.future.set_result(Answer(1, (raw(np.zeros((1, 5 << 20))),), 0, 0))
    shadow.on_call(large, 0.0)
    await _settled()
    assert (candidate.copies, _figures(shadow)["dropped"]) == ([], 1)


async def test_what_can_not_be_copied_says_nothing_about_the_candidate() -> None:
    def full(call: Call) -> Compared:
        raise NotCopiedError("it does not fit into a message")

    shadow, evidence = _shadow(Candidate(full))
    shadow.on_call(_call(), 0.0)
    await _settled()
    figures = _figures(shadow)
    assert (figures["copied"], figures["dropped"], figures["failed"]) == (0, 1, 0)
    assert evidence.snapshot().ended == 0


async def test_a_shadow_that_is_over_copies_nothing_more() -> None:
    candidate = Candidate(_agrees)
    shadow, _ = _shadow(candidate)
    for _ in range(5):
        shadow.on_call(_call(), 0.0)
    shadow.stop()
    await _settled()
    assert candidate.copies == []


@pytest.mark.parametrize(
    ("error", "faults"), [(ModelFailureError("no"), (1, 0)), (ModelFailureError("no", caller_fault=True), (0, 1))]
)
async def test_a_copy_that_fails_is_evidence(error: ServeError, faults: tuple[int, int]) -> None:
    def fail(call: Call) -> Compared:
        raise error

    shadow, evidence = _shadow(Candidate(fail))
    shadow.on_call(_call(), 0.0)
    await _settled()
    totals = evidence.snapshot().calls.totals
    assert (totals[FAILED], totals[CALLER_FAULTS]) == faults
    assert _figures(shadow)["failed"] == 1


async def test_a_fault_of_ours_is_logged_and_the_next_call_is_copied(caplog: pytest.LogCaptureFixture) -> None:
    broken = [True]

    def stumble(call: Call) -> Compared:
        if broken.pop():
            raise RuntimeError("a fault of ours")
        return _agrees(call)

    broken.insert(0, False)
    shadow, _ = _shadow(Candidate(stumble))
    shadow.on_call(_call(), 0.0)
    await _settled()
    assert "a call could not be copied" in caplog.text
    shadow.on_call(_call(), 0.0)
    await _settled()
    assert _figures(shadow)["copied"] == 1


async def test_a_candidate_that_takes_none_of_the_calls_agrees_in_nothing() -> None:
    policy = RolloutPolicy()
    shadow, evidence = _shadow(Candidate(_refuses))
    for _ in range(20 * policy.min_calls):
        shadow.on_call(_call("gone"), 0.0)
        await _settled()
    found = shadow.judge(Verdict(VerdictKind.WAITING, "0 of the 100 calls that it takes to tell"))
    assert found.kind is VerdictKind.WORSE
    assert "output 'gone/y' agrees in 0.00%" in found.reason
    assert evidence.snapshot().ended == 0


def test_without_rows_nothing_is_known() -> None:
    one = Agreement()
    one.add(0, 0, LEAST)
    assert (one.share, one.too_seldom(LEAST, 0.5)) == (1.0, False)


async def _judged(agreements: dict[str, tuple[int, int]]) -> Verdict:
    """Returns a verdict after calls of one row each: per signature how many, and how many of them agreed."""
    left = {signature: agreed for signature, (_, agreed) in agreements.items()}

    def answer(call: Call) -> Compared:
        left[call.signature] -= 1
        return Compared(1, 100, {"y": (1, int(left[call.signature] >= 0))}, {}, {})

    shadow, _ = _shadow(Candidate(answer))
    for signature, (rows, _agreed) in agreements.items():
        for _ in range(rows):
            shadow.on_call(_call(signature), 0.0)
            await _settled()
    return shadow.judge(Verdict(VerdictKind.FINE, "no worse"))


async def test_a_signature_that_hardly_anybody_calls_holds_up_nothing() -> None:
    assert (await _judged({"serving_default": (200, 200), "rare": (1, 1)})).kind is VerdictKind.FINE
    assert (await _judged({"serving_default": (50, 50), "rare": (1, 1)})).kind is VerdictKind.WAITING


async def test_outputs_of_the_same_name_are_told_apart_by_signature() -> None:
    found = await _judged({"serving_default": (200, 200), "other": (200, 0)})
    assert (found.kind, found.figures["agreement"]) == (VerdictKind.WORSE, {"y": 1.0, "other/y": 0.0})
