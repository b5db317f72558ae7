"""Copies of calls on a real engine process: what it says of its answers, and that nothing else notices."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from modelport.tensors import array_bytes, dtype_of
from modelport_registry import Registry
from modelport_server.batching.calls import Answer, Call
from modelport_server.engines.process import LoadOrder
from modelport_server.errors import EngineDiedError, InvalidCallError, ModelFailureError, NotCopiedError
from modelport_server.options import BatchLimits, EngineLimits
from modelport_server.servable import Servable
from modelport_server.tensors import RawTensor
from tests.support.bad_versions import FAILING, class_golden, class_scores

MODEL, TAG = "classes", 2
LARGEST = 16
TIMEOUT_S = 60.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servable(tmp_path_factory: pytest.TempPathFactory, bad_versions: Path) -> AsyncGenerator[Servable]:
    """A classifier that is loaded, and that fails in a bad mood."""
    root = tmp_path_factory.mktemp("registry")
    published = Registry(root).publish(MODEL, bad_versions / FAILING, golden=[class_golden(TAG)])
    servable = Servable(
        LoadOrder(root, MODEL, published.version, LARGEST),
        Registry(root).manifest(MODEL, published.version),
        BatchLimits(max_batch_size=LARGEST),
        EngineLimits(),
        on_state=lambda _: None,
        on_rejected=lambda _gate, _reason: None,
    )
    await servable.start()
    yield servable
    await servable.stop()


def _raw(name: str, array: NDArray[Any]) -> RawTensor:
    dtype = dtype_of(array)
    return RawTensor(name, dtype, array.shape, array_bytes(array, dtype))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - nobody tells when a process has come so far
            await asyncio.sleep(0.001)


def _answered(classes: NDArray[np.int64], said: NDArray[np.int64] | None = None, mood: int = 0) -> Call:
    """Returns a call that asks for classes, and was answered with those or others."""

    def rows(of: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.stack([of, np.full(len(of), mood)], axis=1).astype(np.float32)

    scores = class_scores(rows(classes if said is None else said))
    version = np.full(len(classes), f"{TAG}".encode(), object)
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    future.set_result(Answer(7, (_raw("scores", scores), _raw("version", version)), 0, 0))
    inputs = (_raw("x", rows(classes)),)
    return Call("serving_default", ("serving_default", (2,)), inputs, len(classes), splittable=True, future=future)


async def test_what_warming_up_found_bounds_batches(servable: Servable) -> None:
    assert 1 <= servable.efficient_batch_size <= LARGEST
    assert servable.batch_size == LARGEST, "it was not asked to choose"


async def test_the_engine_compares(servable: Servable) -> None:
    found = await servable.compare(_answered(np.array([3, 1, 4])), look=True)
    assert found.agreeing == {"scores": (3, 3), "version": (3, 3)}
    assert found.categories == found.answer_categories == {"scores": [3, 1, 4], "version": []}
    assert found.engine_time_us > 0
    other = await servable.compare(_answered(np.array([3, 1, 4]), np.array([3, 9, 4])), look=False)
    assert (other.agreeing, other.categories) == ({"scores": (3, 2), "version": (3, 3)}, {})
    seen = await servable.compare(_answered(np.array([3, 1, 4]), np.array([3, 9, 4])), look=True)
    assert (seen.categories["scores"], seen.answer_categories["scores"]) == ([3, 1, 4], [3, 9, 4])


async def test_an_output_that_is_not_there_agrees_in_nothing(servable: Servable) -> None:
    call = _answered(np.array([1, 2]))
    scores, version = call.future.result().outputs
    call.future = asyncio.get_running_loop().create_future()
    call.future.set_result(Answer(7, (scores._replace(name="gone"), version), 0, 0))
    assert (await servable.compare(call, look=False)).agreeing == {"gone": (2, 0), "version": (2, 2)}


async def test_a_large_call_is_compared_in_the_rows_of_one_batch(servable: Servable) -> None:
    found = await servable.compare(_answered(np.arange(100) % 10), look=False)
    assert (found.rows, found.agreeing["scores"]) == (LARGEST, (LARGEST, LARGEST))


async def test_what_is_not_for_it_is_not_run(servable: Servable) -> None:
    call = _answered(np.array([1]))
    call.inputs = (call.inputs[0]._replace(name="z"),)
    with pytest.raises(InvalidCallError, match="has no input 'z'; its inputs are 'x'"):
        await servable.compare(call, look=False)
    other = _answered(np.array([1]))
    other.signature = "other"
    with pytest.raises(InvalidCallError, match="no signature 'other'"):
        await servable.compare(other, look=False)
    assert servable.takes_copies


async def test_a_model_that_fails_says_so(servable: Servable) -> None:
    with pytest.raises(ModelFailureError) as failed:
        await servable.compare(_answered(np.array([1]), mood=1), look=False)
    assert not failed.value.caller_fault
    assert (await servable.compare(_answered(np.array([1])), look=False)).agreeing["scores"] == (1, 1)


async def test_one_at_a_time_beside_calls_until_the_engine_dies(servable: Servable) -> None:
    pid = servable.pid
    os.kill(pid, signal.SIGSTOP)
    copy = asyncio.create_task(servable.compare(_answered(np.array([5])), look=False))
    await _until(lambda: not servable.takes_copies and servable.oldest_wait_s > 0)
    with pytest.raises(NotCopiedError):
        await servable.compare(_answered(np.array([5])), look=False)
    call = servable.prepare("", _answered(np.array([5])).inputs, (), float("inf"))
    servable.submit(call)
    copy.cancel()  # nobody waits for it any more, and its slot is the engine's still
    with pytest.raises(asyncio.CancelledError):
        await copy
    assert not servable.takes_copies
    os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(TIMEOUT_S):
        assert (await call.future).version == servable.version
    await _until(lambda: servable.takes_copies)
    os.kill(pid, signal.SIGSTOP)
    copy = asyncio.create_task(servable.compare(_answered(np.array([5])), look=False))
    await _until(lambda: not servable.takes_copies)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDiedError):
        await copy
    await _until(lambda: servable.takes_copies and servable.pid != pid)  # it is started again
    assert (await servable.compare(_answered(np.array([5])), look=False)).agreeing["scores"] == (1, 1)
