"""Threads that run batches at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import pytest

from modelport_server.engines.instances import Instances, OnAllInstances, TimeShares
from modelport_server.engines.parallel import ALONE, Parallelism, settled, wide
from modelport_server.engines.protocol import Array, EngineError


def test_work_runs_on_all_threads_at_the_same_time() -> None:
    meeting = threading.Barrier(3)
    found: list[int] = []

    def meet() -> None:
        meeting.wait(10)
        found.append(threading.get_ident())

    with Instances(3) as instances:
        for _ in range(2):
            instances.run(meet)
    assert len(found) == 6
    assert len(set(found)) == 3, "the same threads each time"
    assert threading.get_ident() in found


def test_what_fails_on_another_thread_is_raised_once_all_have_ended() -> None:
    here = threading.get_ident()
    ended: list[int] = []

    def work() -> None:
        if threading.get_ident() != here:
            raise ValueError("there")
        ended.append(here)

    with Instances(2) as instances, pytest.raises(ValueError, match="there"):
        instances.run(work)
    assert ended == [here]


def test_threads_end_with_it() -> None:
    with Instances(4) as instances:
        instances.run(lambda: None)
        inside = [thread for thread in threading.enumerate() if thread.name.startswith("instance")]
    for thread in inside:
        thread.join(10)
    assert len(inside) == 3
    assert not any(thread.is_alive() for thread in inside)


class Engine:
    """Notes who calls it, and fails where it is told to."""

    name = "engine"

    def __init__(self, fails_on: int | None = None) -> None:
        self.threads: list[int] = []
        self.fails_on = fails_on

    def load(self, path: object, signatures: object) -> None:
        """Has nothing to load."""

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self.threads.append(threading.get_ident())
        if len(inputs["x"]) == self.fails_on:
            raise EngineError("too many")
        return inputs


def test_a_run_is_run_on_each_instance() -> None:
    engine = Engine(fails_on=2)
    with Instances(3) as instances:
        everywhere = OnAllInstances(engine, instances)
        everywhere.run("serving_default", {"x": np.zeros(1)})
        assert len(set(engine.threads)) == 3
        with pytest.raises(EngineError, match="too many"):
            everywhere.run("serving_default", {"x": np.zeros(2)})


def test_time_is_divided_among_those_that_run_at_the_time() -> None:
    now = [10.0]
    shares = TimeShares(lambda: 1.5 * now[0], lambda: now[0])
    with shares.share() as first:
        now[0] += 1
        with shares.share() as second:
            now[0] += 4
        now[0] += 2
    now[0] += 100
    with shares.share() as third:
        now[0] += 3
    assert [share.busy_s for share in (first, second, third)] == [5, 2, 3]
    assert [share.cpu_s for share in (first, second, third)] == [7.5, 3, 4.5]


@pytest.mark.parametrize(
    ("instances", "threads", "cores", "expected"),
    [
        (0, 0, 1, Parallelism(1, 1)),
        (0, 0, 2, Parallelism(2, 1)),
        (0, 0, 8, Parallelism(8, 1)),
        (0, 0, 64, Parallelism(8, 8)),
        (0, 2, 8, Parallelism(4, 2)),
        (0, 16, 8, Parallelism(1, 16)),
        (2, 0, 8, Parallelism(2, 4)),
        (16, 0, 8, Parallelism(16, 1)),
        (3, 5, 8, Parallelism(3, 5)),
    ],
)
def test_cores_are_shared_out(instances: int, threads: int, cores: int, expected: Parallelism) -> None:
    assert settled(instances, threads, cores) == expected


def test_a_batch_may_get_all_cores() -> None:
    assert wide(8) == Parallelism(1, 8)


def test_it_is_told_in_words() -> None:
    assert ALONE.text == "1 batch at once on all threads"
    assert Parallelism(2, 1).text == "2 batches at once on 1 thread each"
    assert Parallelism(1, 4).text == "1 batch at once on 4 threads"
