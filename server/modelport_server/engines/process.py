"""The front's handle on an engine process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

from modelport.exceptions import ModelportError
from modelport_server.batching.calls import Batch, BatchOutput
from modelport_server.engines import _messages as messages
from modelport_server.engines._memory import Region
from modelport_server.engines._system import children
from modelport_server.engines.ahead import ALL_CORES
from modelport_server.engines.cores import BatchTimes, CoreSharing
from modelport_server.engines.kinds import INT8, TENSORFLOW
from modelport_server.engines.order import Loaded as Loaded
from modelport_server.engines.order import LoadOrder as LoadOrder
from modelport_server.engines.parallel import Parallelism, settled
from modelport_server.engines.spawner import Child, Spawner, end_group, execute, exit_text
from modelport_server.errors import EngineDiedError, ModelFailureError, NotCopiedError
from modelport_server.gates import result as gates
from modelport_server.gates.result import GateResult, Outcome
from modelport_server.options import EngineLimits
from modelport_server.outputs import Compared
from modelport_server.tensors import Gathered, RawTensor, cut_rows, gather_rows

_log = logging.getLogger(__name__)
_MOST_WAITING = 8
"""The most batches that wait in an engine process: one for each that runs, so that filling and computing overlap, but
no more memory and descriptors than that."""
_STOP_S = 1.0
_USE_POLL_S = 0.2
_ENDED = "the engine process ended"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LOADING_GATES = gates.GATES[: gates.GATES.index(gates.SPEED)]
"""The gates that an engine process passes before it is ready."""
_STATES = {gates.INTEGRITY: "verifying", gates.LOAD: "loading", gates.GOLDEN: "warming"}
"""The state that a version enters with a gate; it keeps it in the gates after that."""


class RejectedError(Exception):
    """A version failed a gate.

    Args:
        gate: which one.
        reason: why, in one line.
        results: what each gate found, the failed one last.
    """

    def __init__(self, gate: str, reason: str, results: tuple[GateResult, ...] = ()) -> None:
        super().__init__(reason)
        self.gate = gate
        self.gates = results


class UnreadableError(ModelportError):
    """A version could not be read or its engine not be started for now, which says nothing about the version."""


@dataclass(slots=True)
class _Run:
    """A batch or a copy that the engine has been given."""

    on_reply: Callable[[messages.Message], None]
    on_death: Callable[[EngineDiedError], None]
    began_s: float = 0.0
    """When it began to run, at the latest; 0 while it waits."""


class EngineProcess:
    """One engine process, from its start to its end.

    Args:
        limits: bounds of time and memory.
        on_state: told ``verifying``, ``loading`` and ``warming`` as they begin.
        spawner: forks the process, if it can; without one it is started by itself.
        on_gate: told each gate as it begins.
        cores: told what the process does; without it nobody is moved to other cores.
    """

    def __init__(
        self,
        limits: EngineLimits,
        on_state: Callable[[str], None],
        spawner: Spawner | None = None,
        on_gate: Callable[[str], object] = lambda gate: None,
        cores: CoreSharing | None = None,
    ) -> None:
        self._limits = limits
        self._on_state = on_state
        self._on_gate = on_gate
        self._spawner = spawner
        self._cores = cores
        self._times = BatchTimes()
        self._process: Child | None = None
        self._channel: socket.socket | None = None
        self._regions: list[tuple[Region, Region]] = []
        self._free: list[int] = []
        self._parallelism = Parallelism()
        self._copying = False
        self._starts_others = False
        """Whether it starts processes while it loads, which count as its own."""
        self._ready: asyncio.Future[Loaded] | None = None
        self._gate = gates.INTEGRITY
        self._gate_began = 0.0
        self._state = ""
        self._results: list[GateResult] = []
        self._running: dict[int, _Run] = {}
        self._oldest_s = 0.0
        """When the oldest batch began that runs; 0 without any."""
        self._next_id = 0
        self._ended = asyncio.Event()
        self._why = ""
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def slots(self) -> int:
        """How many batches can be under way at once, those included that wait for others to end."""
        return self.instances + min(self.instances, _MOST_WAITING)

    @property
    def instances(self) -> int:
        """How many batches run at once."""
        return self._parallelism.instances

    @property
    def takes_copies(self) -> bool:
        """Whether ``compare`` can be called now."""
        return not self._copying and not self._ended.is_set()

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self._process.pid if self._process is not None else 0

    @property
    def ended(self) -> asyncio.Event:
        """Set once the process is gone or is being killed."""
        return self._ended

    @property
    def why(self) -> str:
        """Why it ended, for people."""
        return self._why

    async def load(self, order: LoadOrder) -> Loaded:
        """Starts the process and returns when the version has passed its gates and is warm.

        Raises:
            RejectedError: if a gate failed, or the process died in it, took longer than it may, or took
                more memory or threads than it may.
            UnreadableError: if the version could not be read.
            OSError: if the process could not be started.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._starts_others = order.precision == INT8
        self._parallelism = order.parallelism or settled(0, 0, len(ALL_CORES))
        try:
            await self._start(order.engine)
            self._begin(gates.INTEGRITY)
            self._send({"op": "load", "size": messages.write_document(self._regions[0][0], self._document(order))})
            return await asyncio.shield(self._ready)
        except EngineDiedError:
            await self.stop()  # to know how it ended
            raise self._rejection() from None
        except asyncio.CancelledError:
            self.kill("it is not wanted any more")
            raise

    def _document(self, order: LoadOrder) -> messages.Message:
        limits_s = {gate: _limit_s(self._limits, gate) for gate in LOADING_GATES}
        return order.to_json() | {"limits_s": limits_s, "parallelism": asdict(self._parallelism)}

    def _rejection(self) -> RejectedError:
        """Returns the end of the gate in which the process ended."""
        result = GateResult(self._gate, Outcome.FAILED, monotonic() - self._gate_began, {}, self._why)
        return RejectedError(self._gate, self._why, (*self._results, result))

    async def _start(self, engine: str) -> None:
        """Starts the process, where there is one that has imported the engine from that."""
        child: Child | None = None
        if self._spawner is not None:
            with self._open() as theirs:
                fds = self._fds(theirs)
                child = await self._spawner.fork(fds) if engine == TENSORFLOW else await self._spawner.wake(fds)
        if child is None:
            self._close()
            with self._open() as theirs:
                child = execute(self._fds(theirs))
        assert self._channel is not None
        self._process = child
        if self._cores is not None:
            self._cores.load(child.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._on_readable)
        self._watch = loop.create_task(self._watch_use())

    def _open(self) -> socket.socket:
        """Makes the socket pair and the slots; returns the engine's end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for side in (ours, theirs):
            room = (self.slots + 1) * messages.MAX_MESSAGE_BYTES
            side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        ours.setblocking(False)
        self._channel = ours
        # The last slot is for copies of calls, which come one after another beside whatever else the engine is at.
        self._regions = [(Region.create("inputs"), Region.create("outputs")) for _ in range(self.slots + 1)]
        self._free = list(range(self.slots))
        return theirs

    def _fds(self, theirs: socket.socket) -> list[int]:
        return [theirs.fileno(), *(region.fd for pair in self._regions for region in pair)]

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for pair in self._regions:
            for region in pair:
                region.close()
        self._regions = []

    def _send(self, message: messages.Message) -> None:
        assert self._channel is not None
        try:
            self._channel.send(messages.pack(message))
        except OSError as error:
            self._die(f"it could not be written to: {error.strerror}")
            raise EngineDiedError("the engine died") from error

    def _on_readable(self) -> None:
        assert self._channel is not None
        try:
            message = messages.receive(self._channel)
        except BlockingIOError:
            return
        except OSError:
            message = None
        if message is None:
            self._die(_ENDED)
        else:
            self._on_message(message)

    def _on_message(self, message: messages.Message) -> None:
        op = message["op"]
        if op in ("done", "compared", "failed"):
            run = self._running.pop(message["id"], None)
            self._watch_oldest()
            if run is not None:
                self._take_reply(run, message)
        elif op == "warning":
            _warn_once(message["text"])
        elif self._ready is not None and not self._ready.done():
            self._on_loading(message, self._ready)

    def _take_reply(self, run: _Run, message: messages.Message) -> None:
        try:
            run.on_reply(message)
        except Exception:  # whoever waits must hear of it, and nobody knows what else the process gets wrong
            _log.exception("an engine's reply can't be read")
            run.on_death(EngineDiedError("the engine's reply could not be read"))
            self.kill("its reply could not be read")

    def _on_loading(self, message: messages.Message, ready: asyncio.Future[Loaded]) -> None:
        op = message["op"]
        if op == "begin":
            self._begin(message["gate"])
        elif op == "end":
            self._results.append(_gate_result(message))
            if self._results[-1].outcome is Outcome.FAILED:
                ready.set_exception(RejectedError(self._gate, message["reason"], tuple(self._results)))
        elif op == "ready":
            golden, dependent = message["golden"], tuple(message["dependent"])
            ready.set_result(
                Loaded(
                    message["engine"],
                    golden,
                    dependent,
                    tuple(self._results),
                    self._parallelism,
                    best_size=message["best_size"],
                    efficient_size=message["efficient_size"],
                )
            )
            if self._cores is not None:
                self._cores.serve(self.pid, self._times)
        elif op == "unreadable":
            ready.set_exception(UnreadableError(message["reason"]))
        if ready.done():
            self._stop_timer()

    def _begin(self, gate: str) -> None:
        """Times the gate until the next one begins."""
        if gate != self._gate or not self._gate_began:
            self._on_gate(gate)
        self._gate, self._gate_began = gate, monotonic()
        self._stop_timer()
        limit_s = _limit_s(self._limits, gate)
        self._timer = asyncio.get_running_loop().call_later(limit_s, self.kill, f"took more than {limit_s:g} s")
        if gate in _STATES and self._state != _STATES[gate]:
            self._state = _STATES[gate]
            self._on_state(self._state)

    def run(self, batch: Batch) -> asyncio.Future[BatchOutput]:
        """Runs a batch; the outputs are views of shared memory until ``release`` is called.

        Raises:
            ModelFailureError: if the model failed.
            EngineDiedError: if the process died, or hung and was killed.
        """
        if self._ended.is_set() or not self._free:
            raise EngineDiedError("the engine died")
        slot = self._free.pop()
        future: asyncio.Future[BatchOutput] = asyncio.get_running_loop().create_future()
        run = _Run(partial(self._end_run, future, slot), partial(_fail, future))
        try:
            self._begin_run(run, "run", slot, batch.signature, _gathered(batch))
        except messages.MessageTooLargeError as error:
            self._free.append(slot)
            raise ModelFailureError("the call has too many inputs") from error
        except BaseException:
            self._free.append(slot)
            raise
        return future

    def _end_run(self, future: asyncio.Future[BatchOutput], slot: int, reply: messages.Message) -> None:
        if future.done():  # nobody waits any more
            self._free.append(slot)
        elif reply["op"] == "failed":
            self._free.append(slot)
            future.set_exception(_failure(reply))
        else:
            self._times.add(reply["us"] / 1e6, reply["cpu_us"] / 1e6, reply["busy_us"] / 1e6)
            outputs = messages.read(self._regions[slot][1], reply["outputs"], reply["size"])
            future.set_result(BatchOutput(outputs, reply["us"], partial(self._free.append, slot), reply["cpu_us"]))

    async def compare(
        self, signature: str, rows: int, inputs: Sequence[RawTensor], answer: Sequence[RawTensor], *, look: bool
    ) -> Compared:
        """Runs a copy of a call and returns how its outputs compare with what another version answered.

        Args:
            signature: its name.
            rows: how many rows it has.
            inputs: every input, in the signature's order; all rows run together.
            answer: the other version's outputs.
            look: whether to find the categories of the rows of both versions' outputs.

        Raises:
            ModelFailureError: if the model failed.
            EngineDiedError: if the process died, or hung and was killed.
            NotCopiedError: if a copy is under way, or this one has too many inputs and outputs.
        """
        if self._ended.is_set():
            raise EngineDiedError("the engine died")
        if self._copying:
            raise NotCopiedError("a copy is under way")
        future: asyncio.Future[messages.Message] = asyncio.get_running_loop().create_future()
        run = _Run(future.set_result, partial(_fail, future))
        try:
            self._begin_run(run, "compare", self.slots, signature, inputs, answer, look=look)
        except messages.MessageTooLargeError as error:
            raise NotCopiedError("it does not fit into a message") from error
        self._copying = True
        future.add_done_callback(self._on_compared)
        reply = await asyncio.shield(future)  # whoever gives up waiting does not free the slot
        if reply["op"] == "failed":
            raise _failure(reply)
        agreeing = {name: (of, agreed) for name, of, agreed in reply["agreeing"]}
        return Compared(rows, reply["us"], agreeing, reply["categories"], reply["answer_categories"])

    def _on_compared(self, _: object) -> None:
        self._copying = False

    def _begin_run(
        self,
        run: _Run,
        op: str,
        slot: int,
        signature: str,
        inputs: Sequence[RawTensor | Gathered],
        answer: Sequence[RawTensor] = (),
        *,
        look: bool = False,
    ) -> None:
        """Puts tensors into a free slot and has the engine run them; ``run`` is told how that ends.

        Raises:
            MessageTooLargeError: if there are too many of them.
            EngineDiedError: if the process died.
        """
        self._next_id += 1
        tensors = [*inputs, *answer]
        entries, size = messages.describe(tensors)
        messages.write(self._regions[slot][0], tensors, entries, size)
        message: messages.Message = {
            "op": op,
            "id": self._next_id,
            "slot": slot,
            "signature": signature,
            "size": size,
            "inputs": entries[: len(inputs)],
            "answer": entries[len(inputs) :],
            "look": look,
        }
        self._send(message)
        self._running[self._next_id] = run
        if len(self._running) <= self.instances:
            self._watch_oldest()

    def _watch_oldest(self) -> None:
        """Times the batches that the engine has begun: in the order in which they came, as many as run at once."""
        now = monotonic()
        begun = list(islice(self._running.values(), self.instances))
        for run in begun:
            run.began_s = run.began_s or now
        oldest = min((run.began_s for run in begun), default=0.0)
        if oldest == self._oldest_s:
            return
        self._oldest_s = oldest
        self._stop_timer()
        if begun:
            self._timer = asyncio.get_running_loop().call_later(
                oldest + self._limits.run_timeout_s - now, self._on_hang
            )

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_hang(self) -> None:
        self.kill(f"a batch ran for more than {self._limits.run_timeout_s:g} s")

    async def _watch_use(self) -> None:
        limits = self._limits
        memory_limit = limits.memory_limit_bytes
        while not self._ended.is_set():
            others = self._starts_others and self._ready is not None and not self._ready.done()
            uses = [_use(pid) for pid in (self.pid, *(children(self.pid) if others else ()))]
            resident, threads = (sum(numbers) for numbers in zip(*uses, strict=True))
            if resident > memory_limit:
                self.kill(f"it took more than {memory_limit >> 20} MiB of memory")
            elif threads > limits.max_threads:
                self.kill(f"it has more than {limits.max_threads} threads")
            await asyncio.sleep(_USE_POLL_S)

    def kill(self, why: str) -> None:
        """Ends the process at once; everything that it had under way fails."""
        if self._process is not None:
            self._process.kill()
        self._die(why)

    def _die(self, why: str) -> None:
        if self._ended.is_set():
            return
        self._why = why
        self._ended.set()
        if self._cores is not None:
            self._cores.forget(self.pid)
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        error = EngineDiedError("the engine died while it ran the call")
        for run in self._running.values():
            run.on_death(error)
        self._running.clear()
        self._stop_timer()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineDiedError("the engine died while loading"))
            self._ready.exception()  # seen: nobody may be waiting any more

    async def stop(self) -> None:
        """Lets the process end, and kills it if it does not within a few seconds; then frees its memory."""
        self._die("it was stopped")
        if self._watch is not None:
            self._watch.cancel()
        if self._process is not None:
            process, self._process = self._process, None
            code = await asyncio.to_thread(_reap, process)
            if code and self._why == _ENDED:
                self._why = f"{_ENDED}: {exit_text(code)}"
        self._close()


def _fail(future: asyncio.Future[Any], error: EngineDiedError) -> None:
    if not future.done():
        future.set_exception(error)


def _failure(reply: messages.Message) -> ModelFailureError:
    return ModelFailureError(reply["message"], caller_fault=reply["caller_fault"])


def _gathered(batch: Batch) -> Sequence[RawTensor | Gathered]:
    """Returns the inputs of all parts, one tensor for each input of the signature."""
    parts = batch.parts
    if len(parts) == 1 and parts[0].rows == parts[0].call.rows:
        return parts[0].call.inputs
    count = len(parts[0].call.inputs)
    return [
        gather_rows([cut_rows(part.call.inputs[index], part.start, part.stop) for part in parts])
        for index in range(count)
    ]


def _reap(process: Child) -> int:
    try:
        return process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        end_group(process.pid)


def _use(pid: int) -> tuple[int, int]:
    """Returns the resident bytes and the number of threads of a process; zeros if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[21]) * _PAGE_BYTES, int(fields[17])  # rss and num_threads, see proc(5)
    except (OSError, IndexError):
        return 0, 0


def _gate_result(message: Mapping[str, Any]) -> GateResult:
    outcome = Outcome(message["outcome"])
    return GateResult(message["gate"], outcome, message["seconds"], message["figures"], message.get("reason", ""))


def _limit_s(limits: EngineLimits, gate: str) -> float:
    return {
        gates.INTEGRITY: limits.integrity_timeout_s,
        gates.SAFETY: limits.safety_timeout_s,
        gates.SIGNATURE: limits.signature_timeout_s,
        gates.LOAD: limits.load_timeout_s,
        gates.GOLDEN: limits.golden_timeout_s,
        gates.WARM_UP: limits.warm_up_timeout_s,
    }[gate]


@cache
def _warn_once(text: str) -> None:
    """Logs what would be the same for each engine process."""
    _log.warning("%s", text)
