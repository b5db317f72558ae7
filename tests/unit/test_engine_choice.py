"""The fastest engine that reproduces the golden examples is taken, and the others say why they were not."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from modelport_registry import Golden, SignatureSpec, TensorSpec
from modelport_server.batching.calls import Batch, BatchOutput
from modelport_server.engines.choice import Candidate, Chosen, EngineChoice, candidates
from modelport_server.engines.order import Loaded, LoadOrder
from modelport_server.engines.parallel import Parallelism
from modelport_server.engines.process import RejectedError
from modelport_server.errors import ModelFailureError
from modelport_server.gates.result import GateResult, Outcome

OPENVINO, TENSORFLOW = Candidate("openvino"), Candidate("tensorflow")
BOTH = candidates(["openvino", "tensorflow"], "float32")
COLUMN = (TensorSpec("x", "float32", (None,)),)
SPEC = SignatureSpec("serving_default", COLUMN, (TensorSpec("y", "float32", (None,)),))
ROWS = np.ones(4, np.float32)
GOLDEN = Golden("serving_default", {"x": ROWS}, {"y": ROWS})

NARROW, WIDE = Parallelism(4, 1), Parallelism(1, 4)

RowUs = Callable[[int], float]


@dataclass
class FakeProcess:
    """A process whose engine takes so long, or fails a gate."""

    row_us: Mapping[str, RowUs]
    """What a batch takes, by engine."""
    rejected: Mapping[str, tuple[str, str]]
    """Gate and reason, by engine."""
    dependent: Mapping[str, tuple[str, ...]]
    """The signatures whose rows depend on each other, by engine."""
    first: bool
    pid: int
    engine: str = ""
    stopped: bool = False
    order: LoadOrder | None = None
    single_row_ms: float = 0.0
    sizes: list[int] = field(default_factory=list[int])

    @property
    def slots(self) -> int:
        return 2

    @property
    def instances(self) -> int:
        return 1

    async def load(self, order: LoadOrder) -> Loaded:
        self.order = order
        self.engine = order.engine if order.precision == "float32" else f"{order.engine} {order.precision}"
        if self.engine in self.rejected:
            raise RejectedError(*self.rejected[self.engine])
        warm_up = GateResult("warm-up", Outcome.PASSED, 1.0, {"last_row_ms": self.single_row_ms})
        parallelism = order.parallelism or NARROW
        if parallelism == WIDE:
            self.engine += " wide"
        return Loaded(f"{order.engine} 1.0", 4, self.dependent.get(order.engine, ()), (warm_up,), parallelism)

    async def run(self, batch: Batch) -> BatchOutput:
        assert not self.stopped
        rows = batch.parts[0].call.inputs[0].shape[0]
        self.sizes.append(rows)
        if (spent_us := self.row_us[self.engine](rows)) < 0:
            raise ModelFailureError("it is broken")
        return BatchOutput((), int(spent_us), lambda: None)

    async def stop(self) -> None:
        self.stopped = True


@dataclass
class Machine:
    """Where engines are tried."""

    row_us: dict[str, RowUs] = field(default_factory=dict[str, RowUs])
    rejected: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    dependent: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    golden: Sequence[Golden] = (GOLDEN,)
    processes: list[FakeProcess] = field(default_factory=list[FakeProcess])
    single_row_ms: float = 0.0
    """What a row takes by itself."""
    parallelism: Parallelism | None = None
    """What the order asks for."""
    usual: Candidate | None = None
    """What runs the version in charge."""
    aside: list[int] = field(default_factory=list[int])
    """Who was kept from the callers' cores while it was measured."""

    def _new(self, first: bool) -> FakeProcess:
        pid = len(self.processes) + 1
        self.processes.append(
            FakeProcess(self.row_us, self.rejected, self.dependent, first, pid, single_row_ms=self.single_row_ms)
        )
        return self.processes[-1]

    async def choose(self, groups: Sequence[Sequence[Candidate]] = BOTH, largest: int = 128) -> Chosen[FakeProcess]:
        choice = EngineChoice(
            order=LoadOrder(Path("registry"), "digits", 3, largest, parallelism=self.parallelism),
            groups=groups,
            new_process=self._new,
            signatures={"serving_default": SPEC},
            golden=self.golden,
            usual=self.usual,
            measuring=self._measuring,
            wide=WIDE,
        )
        return await choice.run()

    @contextmanager
    def _measuring(self, pids: Callable[[], Set[int]]) -> Generator[None]:
        self.aside += sorted(pids())
        yield

    def check_only(self, chosen: Chosen[FakeProcess]) -> None:
        """All others have ended."""
        assert [process for process in self.processes if not process.stopped] == [chosen.process]


def test_what_is_tried() -> None:
    assert BOTH == ((OPENVINO, TENSORFLOW),)
    assert candidates(["tensorflow"], "float32") == ((TENSORFLOW,),)
    assert candidates(["openvino"], "bfloat16") == ((Candidate("openvino", "bfloat16"),), (OPENVINO,))
    assert candidates(["openvino", "tensorflow"], "int8") == ((Candidate("openvino", "int8"),), (OPENVINO, TENSORFLOW))


@pytest.mark.parametrize(("openvino_us", "winner"), [(100.0, "openvino"), (300.0, "tensorflow")])
async def test_the_faster_one_is_taken(openvino_us: float, winner: str) -> None:
    machine = Machine({"openvino": lambda rows: openvino_us * rows, "tensorflow": lambda rows: 200.0 * rows})
    chosen = await machine.choose()
    machine.check_only(chosen)
    assert (chosen.candidate.engine, chosen.loaded.engine) == (winner, f"{winner} 1.0")
    reasons = {attempt.engine: attempt.reason for attempt in chosen.attempts}
    loser = ({"openvino 1.0", "tensorflow 1.0"} - {f"{winner} 1.0"}).pop()
    assert reasons == {f"{winner} 1.0": "", loser: f"slower than {winner} 1.0"}
    times = {attempt.engine: attempt.row_ms for attempt in chosen.attempts}
    assert times["tensorflow 1.0"] == pytest.approx({1: 0.2, 32: 0.2, 128: 0.2})
    assert [process.first for process in machine.processes] == [True, False]
    assert machine.aside == [1, 2]


@pytest.mark.parametrize(
    ("usual", "tensorflow_us", "winner", "why"),
    [
        (OPENVINO, 95.0, "openvino", "hardly faster than openvino 1.0, which runs the version in charge"),
        (OPENVINO, 85.0, "tensorflow", "slower than tensorflow 1.0"),
        (OPENVINO, 105.0, "openvino", "slower than openvino 1.0"),
        (TENSORFLOW, 105.0, "tensorflow", "hardly faster than tensorflow 1.0, which runs the version in charge"),
        (Candidate("openvino", "bfloat16"), 95.0, "tensorflow", "slower than tensorflow 1.0"),
        (None, 95.0, "tensorflow", "slower than tensorflow 1.0"),
    ],
)
async def test_the_engine_of_the_version_in_charge_is_kept_unless_another_one_is_clearly_faster(
    usual: Candidate | None, tensorflow_us: float, winner: str, why: str
) -> None:
    machine = Machine({"openvino": lambda rows: 100.0 * rows, "tensorflow": lambda rows: tensorflow_us * rows})
    machine.usual = usual
    chosen = await machine.choose()
    machine.check_only(chosen)
    assert chosen.candidate.engine == winner
    assert [attempt.reason for attempt in chosen.attempts] == [why, ""]


async def test_all_sizes_count() -> None:
    """What is a little faster for single rows and far slower for many is not the faster one."""
    slow_batches: RowUs = lambda rows: 90.0 if rows == 1 else 400.0 * rows  # noqa: E731
    machine = Machine({"openvino": slow_batches, "tensorflow": lambda rows: 100.0 * rows})
    assert (await machine.choose()).candidate == TENSORFLOW


async def test_rows_that_depend_on_each_other_are_measured_as_they_were_published() -> None:
    equal: RowUs = lambda rows: 100.0  # noqa: E731
    machine = Machine(
        {"openvino": equal, "tensorflow": equal},
        dependent=dict.fromkeys(("openvino", "tensorflow"), ("serving_default",)),
    )
    chosen = await machine.choose()
    assert set(chosen.process.sizes) == {4}


async def test_one_that_fails_while_it_is_measured_is_not_taken() -> None:
    machine = Machine({"openvino": lambda rows: 1.0 if rows == 1 else -1.0, "tensorflow": lambda rows: 100.0})
    chosen = await machine.choose()
    machine.check_only(chosen)
    assert chosen.candidate == TENSORFLOW
    assert chosen.attempts[0].reason == "it fails on golden inputs: it is broken"


@pytest.mark.parametrize("gate", ["load", "golden", "warm-up"])
async def test_tensorflow_is_taken_where_the_other_fails(gate: str) -> None:
    machine = Machine(rejected={"openvino": (gate, "no rule for MatrixDeterminant")})
    chosen = await machine.choose()
    machine.check_only(chosen)
    assert chosen.candidate == TENSORFLOW
    assert [attempt.text for attempt in chosen.attempts] == [
        f"openvino: {gate}: no rule for MatrixDeterminant",
        "tensorflow 1.0: taken (4 batches at once on 1 thread each)",
    ]


async def test_a_version_that_fails_on_each_is_rejected_as_by_the_last() -> None:
    machine = Machine(rejected={"openvino": ("load", "one reason"), "tensorflow": ("golden", "another")})
    with pytest.raises(RejectedError, match="another") as caught:
        await machine.choose()
    assert caught.value.gate == "golden"
    assert all(process.stopped for process in machine.processes)


async def test_what_has_nothing_to_do_with_engines_is_not_tried_again() -> None:
    machine = Machine(rejected={"openvino": ("integrity", "a file is missing")})
    with pytest.raises(RejectedError, match="a file is missing"):
        await machine.choose()
    assert len(machine.processes) == 1
    assert machine.processes[0].stopped


async def test_without_golden_examples_nobody_knows_whether_another_engine_is_right() -> None:
    machine = Machine(golden=())
    chosen = await machine.choose()
    assert chosen.candidate == TENSORFLOW
    assert "golden" in chosen.attempts[0].reason
    assert len(machine.processes) == 1


async def test_who_asks_for_an_engine_gets_it_without_golden_examples() -> None:
    machine = Machine(golden=())
    assert (await machine.choose(candidates(["openvino"], "float32"))).candidate == OPENVINO


async def test_a_precision_that_changes_the_answers_is_not_taken() -> None:
    machine = Machine(rejected={"openvino bfloat16": ("golden", "differs")})
    chosen = await machine.choose(candidates(["openvino"], "bfloat16"))
    machine.check_only(chosen)
    assert chosen.candidate == OPENVINO
    assert [attempt.reason for attempt in chosen.attempts] == ["golden: differs", ""]


async def test_a_precision_is_taken_that_reproduces_the_answers() -> None:
    machine = Machine()
    chosen = await machine.choose(candidates(["openvino"], "bfloat16"))
    assert chosen.candidate == Candidate("openvino", "bfloat16")
    assert len(machine.processes) == 1


async def test_an_engine_that_can_not_batch_is_not_taken_beside_one_that_can() -> None:
    machine = Machine(
        {"openvino": lambda rows: 1.0, "tensorflow": lambda rows: 100.0}, dependent={"openvino": ("serving_default",)}
    )
    chosen = await machine.choose()
    machine.check_only(chosen)
    assert chosen.candidate == TENSORFLOW
    assert "only in the batches that were published" in chosen.attempts[0].reason


async def test_a_precision_without_golden_examples_is_float32() -> None:
    machine = Machine(golden=())
    chosen = await machine.choose(candidates(["openvino"], "bfloat16"))
    assert chosen.candidate == OPENVINO
    assert len(machine.processes) == 1


async def test_where_all_fail_while_they_are_measured_the_next_are_tried() -> None:
    broken: RowUs = lambda rows: -1.0  # noqa: E731
    fine: RowUs = lambda rows: 10.0  # noqa: E731
    machine = Machine(
        {"openvino bfloat16": broken, "tensorflow bfloat16": broken, "openvino": fine, "tensorflow": fine}
    )
    chosen = await machine.choose(candidates(["openvino", "tensorflow"], "bfloat16"))
    machine.check_only(chosen)
    assert chosen.candidate.precision == "float32"
    machine = Machine({"openvino": broken, "tensorflow": broken})
    with pytest.raises(RejectedError, match="it is broken"):
        await machine.choose()
    assert all(process.stopped for process in machine.processes)


ONE = candidates(["tensorflow"], "float32")


async def test_all_cores_for_a_batch_are_not_tried_where_rows_are_short() -> None:
    machine = Machine(single_row_ms=4.9)
    chosen = await machine.choose(ONE)
    assert len(machine.processes) == 1
    assert chosen.loaded.parallelism == NARROW


async def test_all_cores_for_a_batch_are_taken_where_a_row_is_the_sooner_done() -> None:
    times: dict[str, RowUs] = {"tensorflow": lambda rows: 40_000 * rows, "tensorflow wide": lambda rows: 11_000 * rows}
    machine = Machine(times, single_row_ms=40.0)
    chosen = await machine.choose(ONE)
    assert chosen.loaded.parallelism == WIDE
    assert chosen.candidate == Candidate("tensorflow", parallelism=WIDE)
    machine.check_only(chosen)
    assert [attempt.reason for attempt in chosen.attempts] == ["slower than 1 batch at once on 4 threads", ""]


async def test_several_batches_at_once_are_kept_where_more_threads_gain_little() -> None:
    times: dict[str, RowUs] = {"tensorflow": lambda rows: 40_000 * rows, "tensorflow wide": lambda rows: 30_000 * rows}
    machine = Machine(times, single_row_ms=40.0)
    chosen = await machine.choose(ONE)
    assert chosen.loaded.parallelism == NARROW
    machine.check_only(chosen)


async def test_what_is_asked_for_is_not_measured() -> None:
    machine = Machine(single_row_ms=40.0, parallelism=NARROW)
    await machine.choose(ONE)
    assert len(machine.processes) == 1


async def test_without_golden_examples_nothing_else_is_tried() -> None:
    machine = Machine(single_row_ms=40.0, golden=())
    await machine.choose(ONE)
    assert len(machine.processes) == 1
