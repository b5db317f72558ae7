"""A servable: one loaded model version, its engine, its queue, and the calls that hold on to it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import monotonic

from modelport.names import DEFAULT_SIGNATURE, shown
from modelport_registry import Golden, Manifest, SignatureSpec
from modelport_server.batching.batcher import Batcher
from modelport_server.batching.calls import Answer, Batch, BatchOutput, Call
from modelport_server.batching.counts import Counts
from modelport_server.engines.ahead import ALL_CORES
from modelport_server.engines.choice import Attempt, Candidate, EngineChoice
from modelport_server.engines.cores import CoreSharing
from modelport_server.engines.kinds import FLOAT32, TENSORFLOW
from modelport_server.engines.parallel import Parallelism, wide
from modelport_server.engines.probing import to_raw
from modelport_server.engines.process import EngineProcess, Loaded, LoadOrder, RejectedError, UnreadableError
from modelport_server.engines.protocol import Array
from modelport_server.engines.spawner import Spawner
from modelport_server.errors import EngineDiedError, InvalidCallError, NotAvailableError, ServeError
from modelport_server.gates.result import GateResult
from modelport_server.gates.speed import Probe
from modelport_server.once import Signal
from modelport_server.options import BatchLimits, EngineLimits
from modelport_server.outputs import MAX_COMPARED_ROWS, Compared
from modelport_server.rollout.observation import Observer
from modelport_server.signatures import (
    arrange,
    batch_key,
    common_rows,
    empty_outputs,
    is_batchable,
    wanted_outputs,
)
from modelport_server.tensors import RawTensor, cut_rows

_log = logging.getLogger(__name__)

_CRASHES_TO_REJECT = 3
_CRASH_WINDOW_S = 60.0
_UNREADABLE_S = 1.0
_LATELY_S = 1.0
"""Whoever has called so long ago may well call again at any moment."""
_PROBE = "probe"


@dataclass(frozen=True, slots=True)
class ServedSignature:
    """A signature and how it is run."""

    spec: SignatureSpec
    batched: bool


class Servable:
    """One model version from loading to its end.

    Args:
        order: what to load.
        manifest: the version's manifest.
        limits: bounds of the queue and of batches.
        engine_limits: bounds of the engine process.
        on_state: told ``verifying``, ``loading`` and ``warming`` as they begin.
        on_rejected: called with gate and reason when the engine has crashed too often to go on.
        spawner: forks engine processes, if it can; without one they are started by themselves.
        cores: told what engine processes do, if anything is.
        candidates: the engines that are tried, each group only if nothing of the one before will do.
        golden: the version's golden examples, by which engines are measured; without them the first one is taken.
        usual: what runs the version that this one is to take over from.
    """

    def __init__(
        self,
        order: LoadOrder,
        manifest: Manifest,
        limits: BatchLimits,
        engine_limits: EngineLimits,
        *,
        on_state: Callable[[str], None],
        on_rejected: Callable[[str, str], object],
        spawner: Spawner | None = None,
        cores: CoreSharing | None = None,
        candidates: Sequence[Sequence[Candidate]] = ((Candidate(TENSORFLOW),),),
        golden: Sequence[Golden] = (),
        usual: Candidate | None = None,
    ) -> None:
        self.model = order.model
        self.version = order.version
        self.manifest = manifest
        self.signatures: dict[str, ServedSignature] = {}
        self.engine_name = ""
        self.attempts: tuple[Attempt, ...] = ()
        self.candidate: Candidate | None = None
        """What runs it, once that is chosen."""
        self.parallelism = Parallelism()
        self.batch_size = limits.max_batch_size
        """The most rows that run together."""
        self.efficient_batch_size = limits.efficient_batch_size
        """``BatchLimits.efficient_batch_size``."""
        self.golden_examples = 0
        self.gates: tuple[GateResult, ...] = ()
        self.retire_streams = Signal()
        self.observers: tuple[Observer, ...] = ()
        self.engine_deaths = 0
        """How often its engine process has died."""
        self._observed: dict[Call, None] = {}
        self._copied_at_s = math.inf
        self._order = order
        self._limits = limits
        self._engine_limits = engine_limits
        self._on_state = on_state
        self._on_rejected = on_rejected
        self._spawner = spawner
        self._cores = cores
        self._candidates = candidates
        self._golden = golden
        self._usual = usual
        self._probes: dict[Call, Probe | None] = {}
        self._engine: EngineProcess | None = None
        self._batcher = Batcher(self, limits, order.version)
        self._leases = 0
        self._released_at_s = -math.inf
        self._streams = 0
        self._crashes: deque[float] = deque(maxlen=_CRASHES_TO_REJECT)
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def leases(self) -> int:
        """How many calls it has under way."""
        return self._leases

    @property
    def streams(self) -> int:
        """How many streams are pinned to it."""
        return self._streams

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._engine.pid if self._engine is not None else 0

    @property
    def precision(self) -> str:
        """What it computes in."""
        return self.candidate.precision if self.candidate is not None else FLOAT32

    @property
    def is_up(self) -> bool:
        """Whether its engine process runs; calls wait while one that died is started again."""
        return self._engine is not None and not self._engine.ended.is_set()

    @property
    def counts(self) -> Counts:
        """What has become of its calls."""
        return self._batcher.counts

    @property
    def waiting_rows(self) -> int:
        """How many rows wait for its engine."""
        return self._batcher.waiting_rows

    @property
    def slots(self) -> int:
        """How many batches its engine takes at once."""
        return self._engine.slots if self._engine is not None else 1

    @property
    def instances(self) -> int:
        """How many batches its engine runs at once."""
        return self._engine.instances if self._engine is not None else 1

    async def start(self) -> None:
        """Loads the version.

        Raises:
            RejectedError: if it failed a gate.
        """
        loaded = await self._load()
        self.engine_name = loaded.engine
        self.golden_examples = loaded.golden_examples
        self.gates = loaded.gates
        self.signatures = {
            name: ServedSignature(spec, is_batchable(spec) and name not in loaded.dependent)
            for name, spec in self.manifest.signatures.items()
        }
        for name in loaded.dependent:
            _log.warning(
                "%s@%d: rows of %s depend on each other; its calls run one at a time",
                self.model,
                self.version,
                name,
            )
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    async def _load(self) -> Loaded:
        """Loads it on the fastest engine; another time on the same as the first."""
        choice = EngineChoice(
            order=self._order,
            groups=self._candidates,
            new_process=self._new_process,
            signatures=self.manifest.signatures,
            golden=self._golden,
            usual=self._usual,
            measuring=self._cores.measuring if self._cores is not None else lambda pids: nullcontext(),
            wide=wide(len(ALL_CORES)),
        )
        chosen = await choice.run()
        self._engine = chosen.process
        self.attempts = self.attempts or chosen.attempts
        self.candidate = chosen.candidate
        self.parallelism = chosen.loaded.parallelism
        if not self.engine_name:  # later the machine may be busy, and callers are used to the sizes that it has
            if self._limits.adaptive and self._order.in_haste and chosen.loaded.best_size:
                self.batch_size = chosen.loaded.best_size
            # Beside others' load it is less certain, but known; batches are merely larger or smaller for it.
            self.efficient_batch_size = self.efficient_batch_size or chosen.loaded.efficient_size
            self._batcher.limit_batches(self.batch_size, self.efficient_batch_size)
        self._candidates, self._golden = ((chosen.candidate,),), ()
        return chosen.loaded

    def _new_process(self, first: bool) -> EngineProcess:
        on_state = self._on_state if first else _ignore
        return EngineProcess(self._engine_limits, on_state, self._spawner, cores=self._cores)

    async def _supervise(self) -> None:
        """Starts the engine again whenever it dies, until it has died too often."""
        while self._engine is not None:
            await self._engine.ended.wait()
            self._batcher.pause()
            await self._engine.stop()
            why = self._engine.why
            _log.error("%s@%d: the engine died: %s", self.model, self.version, why)
            self.engine_deaths += 1
            self._crashes.append(monotonic())
            if len(self._crashes) == _CRASHES_TO_REJECT and self._crashes[-1] - self._crashes[0] < _CRASH_WINDOW_S:
                self._give_up("crash", f"its engine died {_CRASHES_TO_REJECT} times within a minute: {why}")
                return
            try:
                await self._load_again()
            except RejectedError as error:
                self._give_up(error.gate, str(error))
                return
            except Exception:  # else the queue would wait for ever for an engine that nobody starts
                _log.exception("%s@%d: the engine can't be started again", self.model, self.version)
                self._give_up("load", "its engine can't be started again")
                return
            self._batcher.resume()
            _log.info("%s@%d: the engine is back", self.model, self.version)

    async def _load_again(self) -> None:
        """Loads until the version can be read."""
        while True:
            try:
                await self._load()
            except (UnreadableError, OSError) as error:
                _log.warning("%s@%d: the engine can't be started now: %s", self.model, self.version, error)
                await asyncio.sleep(_UNREADABLE_S)
            else:
                return

    def _give_up(self, gate: str, reason: str) -> None:
        self._batcher.close(NotAvailableError("the version's engine keeps failing"))
        self.retire_streams.set()
        self._on_rejected(gate, reason)

    async def stop(self) -> None:
        """Ends the engine process; whatever is still queued fails with NotAvailableError."""
        self._batcher.close(NotAvailableError("the version is retired"))
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._engine is not None:
            await self._engine.stop()

    def pin(self) -> None:
        """Counts a stream that is pinned to it: the servable is not retired before the stream is told."""
        self._streams += 1

    def unpin(self) -> None:
        """Counts the end of a stream that was pinned to it."""
        self._streams -= 1

    @property
    def has_callers(self) -> bool:
        """Whether it has calls under way, or had some a moment ago."""
        return self._leases > 0 or monotonic() - self._released_at_s < _LATELY_S

    def acquire(self) -> None:
        """Takes a call's lease: the servable is not retired while it is held."""
        self._leases += 1

    def release(self) -> None:
        """Gives a lease back."""
        self._leases -= 1
        self._released_at_s = monotonic()

    @property
    def oldest_wait_s(self) -> float:
        """How long the oldest of the observed calls and copies has been under way, in seconds; 0 without any."""
        oldest = next(iter(self._observed), None)
        began_s = min(self._copied_at_s, oldest.enqueued_at if oldest is not None else math.inf)
        return max(0.0, monotonic() - began_s)

    def run(self, batch: Batch) -> asyncio.Future[BatchOutput]:
        """Runs a batch on the engine, as the batcher asks."""
        if self._engine is None:
            raise EngineDiedError("the engine is not there")
        running = self._engine.run(batch)
        if self._probes or self.observers:
            running.add_done_callback(lambda done: self._on_batch_ended(batch, done))
        return running

    def _on_batch_ended(self, batch: Batch, done: asyncio.Future[BatchOutput]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        output = done.result()
        if batch.parts[0].call in self._probes:
            self._on_probe(batch, output)
        else:
            self._tell(lambda observer: observer.on_batch(batch, output))

    def _tell(self, tell: Callable[[Observer], object]) -> None:
        for observer in self.observers:
            try:
                tell(observer)
            except Exception:  # neither callers nor other observers have anything to do with it
                _log.exception("%s@%d: a call or batch could not be observed", self.model, self.version)

    def _on_probe(self, batch: Batch, output: BatchOutput) -> None:
        call = batch.parts[0].call
        self._probes[call] = Probe(output.engine_time_us, output.cpu_time_us)

    async def probe(self, signature: str, inputs: Mapping[str, Array]) -> Probe:
        """Runs one batch by itself and returns what it cost.

        It waits for its turn like a call, is not joined with others, and no observer hears of it.

        Args:
            signature: its name.
            inputs: every input, all rows at once.

        Raises:
            ServeError: if it can't be run.
        """
        spec = self.signature(signature).spec
        arranged = arrange(spec, to_raw(inputs))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        call = Call(spec.name, (spec.name, _PROBE), arranged, 1, splittable=False, future=future, uncounted=True)
        self._probes[call] = None
        try:
            await self._batcher.room(call)
            self._batcher.submit(call)
            await future
            probe = self._probes[call]
            assert probe is not None
            return probe
        finally:
            del self._probes[call]

    @property
    def takes_copies(self) -> bool:
        """Whether ``compare`` can be called now."""
        return self._engine is not None and self._engine.takes_copies

    async def compare(self, call: Call, *, look: bool) -> Compared:
        """Runs a copy of a call that another version has answered, and returns how the outputs compare.

        Of a call of many rows only as many run as one batch has. No observer hears of it.

        Args:
            call: it; its future has the answer.
            look: whether to find the categories of the rows of both versions' outputs.

        Raises:
            InvalidCallError: if the call is not one for this version.
            ServeError: if it can't be run.
        """
        served = self.signature(call.signature)
        inputs: Sequence[RawTensor] = arrange(served.spec, call.inputs)
        if served.spec.batched:
            common_rows(served.spec, inputs)
        answer: Sequence[RawTensor] = call.future.result().outputs
        most = min(self._limits.max_batch_size, MAX_COMPARED_ROWS)
        rows = call.rows
        if call.splittable and served.batched and rows > most:
            rows = most
            inputs, answer = ([cut_rows(tensor, 0, most) for tensor in tensors] for tensors in (inputs, answer))
        if self._engine is None:
            raise EngineDiedError("the engine is not there")
        self._copied_at_s = monotonic()
        try:
            return await self._engine.compare(served.spec.name, rows, inputs, answer, look=look)
        finally:
            self._copied_at_s = math.inf

    def signature(self, name: str) -> ServedSignature:
        """Returns the signature named, ``serving_default`` for an empty name.

        Raises:
            InvalidCallError: if there is none of that name.
        """
        wanted = name or DEFAULT_SIGNATURE
        found = self.signatures.get(wanted)
        if found is None:
            have = ", ".join(repr(known) for known in sorted(self.signatures)[:16]) or "none"
            raise InvalidCallError(f"{self.model} has no signature {shown(wanted)}; it has {have}")
        return found

    def prepare(self, signature: str, inputs: Sequence[RawTensor], outputs: Sequence[str], deadline: float) -> Call:
        """Returns a call that has been checked in full, not queued yet.

        Args:
            signature: its name; empty for ``serving_default``.
            inputs: every input once, in any order.
            outputs: the outputs wanted; none means all. Only checked here.
            deadline: when the call expires, in seconds on the monotonic clock.

        Raises:
            InvalidCallError: saying what is wrong.
        """
        try:
            served = self.signature(signature)
            wanted_outputs(served.spec, outputs)
            arranged = arrange(served.spec, inputs)
            rows = common_rows(served.spec, arranged) if served.spec.batched else 1
        except InvalidCallError as error:
            self.counts.fail(error)
            raise
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        splittable = served.batched and rows > 0
        call = Call(
            signature=served.spec.name,
            key=batch_key(served.spec, arranged) if splittable else (served.spec.name,),
            shareable=not any(None in (tensor.shape or ())[1:] for tensor in served.spec.outputs),
            inputs=arranged,
            rows=max(rows, 1) if splittable else 1,
            splittable=splittable,
            future=future,
            deadline=deadline,
        )
        if rows == 0 and (empty := empty_outputs(served.spec)) is not None:
            future.set_result(Answer(self.version, empty, 0, 0))
        return call

    def submit(self, call: Call) -> None:
        """Queues a prepared call.

        Raises:
            ServeError: if it can't be queued.
        """
        if call.ended:  # it has no rows, or was given up while it waited for room
            self._batcher.count_end(call)
            return
        self._batcher.submit(call)
        self._observe(call)

    def _observe(self, call: Call) -> None:
        if self.observers:
            self._observed[call] = None
            call.future.add_done_callback(lambda _: self._on_call_ended(call))

    def _on_call_ended(self, call: Call) -> None:
        self._observed.pop(call, None)
        now = monotonic()
        self._tell(lambda observer: observer.on_call(call, now))

    def hand_over(self, heir: Servable) -> None:
        """Lets another version answer the calls that name none and of which nothing has run yet."""
        for call in self._batcher.take_waiting():
            try:
                again = heir.prepare(call.signature, call.inputs, (), call.deadline)
                again.movable, again.message = True, call.message
                heir.submit(again)
            except ServeError as error:
                call.fail(error)
                continue
            call.future.add_done_callback(lambda done, again=again: again.future.cancel())  # type: ignore[misc]
            again.future.add_done_callback(lambda done, call=call: _pass_on(done, call))  # type: ignore[misc]

    async def room(self, call: Call) -> None:
        """Returns when the queue has room for ``call``."""
        if math.isinf(call.deadline):
            await self._batcher.room(call)
            return
        try:
            # Not wait_for: it runs a task of its own, and between the two somebody else may take the room.
            async with asyncio.timeout(max(call.deadline - monotonic(), 0)):
                await self._batcher.room(call)
        except TimeoutError:
            return  # queueing it says that it has expired


def _ignore(state: str) -> None:
    """The version is in that state already, on another engine."""


def _pass_on(done: asyncio.Future[Answer], call: Call) -> None:
    """Ends ``call`` as another ended that was made for it."""
    if done.cancelled():
        call.fail(NotAvailableError("the version is retired"))
    elif (error := done.exception()) is not None:
        if isinstance(error, Exception):
            call.fail(error)
    elif not call.ended:
        call.future.set_result(done.result())
