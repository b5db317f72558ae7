"""When the answers of a shadow count as alike, and what follows from it."""

from __future__ import annotations

import asyncio
import os
from typing import Any, NoReturn, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelport.tensors import array_bytes, dtype_of
from modelport_registry import RolloutPolicy
from modelport_server.batching.calls import Answer, Call
from modelport_server.errors import InvalidCallError
from modelport_server.rollout.comparison import Verdict, VerdictKind
from modelport_server.rollout.shadow import Shadow, agreeing_rows, upper_bound
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


@given(st.integers(1, 10_000), st.data())
def test_the_bound_lies_above_the_share(rows: int, data: st.DataObject) -> None:
    agreed = data.draw(st.integers(0, rows))
    assert agreed / rows - 1e-9 <= upper_bound(agreed, rows) <= 1.0 + 1e-9
    assert upper_bound(agreed * 4, rows * 4) <= upper_bound(agreed, rows) + 1e-9


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
    assert "output 'y' agrees in 0.00%" in found.reason


def test_without_rows_nothing_is_known() -> None:
    assert upper_bound(0, 0) == 1.0
    assert upper_bound(0, 10_000) < 0.01
