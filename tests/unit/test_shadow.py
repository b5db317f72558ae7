"""When the answers of a shadow count as alike, and what follows from it."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any, NoReturn, cast

import numpy as np
import pytest

from modelport.tensors import array_bytes, dtype_of
from modelport_registry import RolloutPolicy
from modelport_server.batching.calls import Answer, Call
from modelport_server.errors import InvalidCallError
from modelport_server.rollout.comparison import Verdict, VerdictKind
from modelport_server.rollout.shadow import Agreement, Shadow, agreeing_rows
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


class Choosy:
    """A candidate that takes none of the calls that the stable version gets."""

    pid = os.getpid()

    def prepare(self, signature: str, *_: object) -> NoReturn:
        raise InvalidCallError(f"m has no signature {signature!r}")


async def test_a_candidate_that_takes_none_of_the_calls_agrees_in_nothing() -> None:
    policy = RolloutPolicy()
    shadow = Shadow(cast("Any", Choosy()), 1.0, policy, lambda: True)
    answers = asyncio.get_running_loop()
    for _ in range(20 * policy.min_calls):
        future: asyncio.Future[Answer] = answers.create_future()
        future.set_result(Answer(1, (raw([1.0, 2.0]),), 0, 0))
        shadow.on_call(Call("gone", ("gone",), (), 1, splittable=False, future=future), 0.0)
        await asyncio.sleep(0)
    found = shadow.judge(Verdict(VerdictKind.WAITING, "0 of the 100 calls that it takes to tell"))
    assert found.kind is VerdictKind.WORSE
    assert "output 'gone/y' agrees in 0.00%" in found.reason


def test_without_rows_nothing_is_known() -> None:
    one = Agreement()
    one.add(0, 0, LEAST)
    assert (one.share, one.too_seldom(LEAST, 0.5)) == (1.0, False)


def _judged(agreements: dict[str, tuple[int, int]]) -> Verdict:
    """Returns a verdict after calls of one row each: per signature how many, and how many of them agreed."""
    shadow = Shadow(cast("Any", Choosy()), 1.0, RolloutPolicy())
    for signature, (rows, agreed) in agreements.items():
        for index in range(rows):
            given = {"y": raw([1.0])} if index >= rows - agreed else {}
            compare = cast("Any", shadow)._compare
            compare(signature, Answer(1, (raw([1.0]),), 0, 0), given)
    return shadow.judge(Verdict(VerdictKind.FINE, "no worse"))


def test_a_signature_that_hardly_anybody_calls_holds_up_nothing() -> None:
    assert _judged({"serving_default": (200, 200), "rare": (1, 1)}).kind is VerdictKind.FINE
    assert _judged({"serving_default": (50, 50), "rare": (1, 1)}).kind is VerdictKind.WAITING


def test_outputs_of_the_same_name_are_told_apart_by_signature() -> None:
    found = _judged({"serving_default": (200, 200), "other": (200, 0)})
    assert (found.kind, found.figures["agreement"]) == (VerdictKind.WORSE, {"y": 1.0, "other/y": 0.0})
