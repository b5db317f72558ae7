"""The front's handle on an engine process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modelport.exceptions import ModelportError
from modelport_server.batching.calls import Batch, BatchOutput
from modelport_server.engines import _messages as messages
from modelport_server.engines._memory import Region
from modelport_server.errors import EngineDiedError, ModelFailureError
from modelport_server.options import EngineLimits
from modelport_server.tensors import RawTensor, cut_rows, join_rows

_log = logging.getLogger(__name__)
_SLOTS = 2
_STOP_S = 1.0
_MEMORY_POLL_S = 0.2
_ENDED = "the engine process ended"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class RejectedError(Exception):
    """A version failed a gate.

    Args:
        gate: which one.
        reason: why, in one line.
    """

    def __init__(self, gate: str, reason: str) -> None:
        super().__init__(reason)
        self.gate = gate


class UnreadableError(ModelportError):
    """A version could not be read or its engine not be started for now, which says nothing about the version."""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What an engine process should load."""

    root: Path
    model: str
    version: int
    largest: int
    """The largest batch that it will be given, in rows."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an engine process says once it can run batches."""

    engine: str
    golden_examples: int
    dependent: tuple[str, ...]
    """Signatures that look batched, but whose rows depend on each other."""


class EngineProcess:
    """One engine process, from its start to its end.

    Args:
        limits: bounds of time and memory.
        on_state: told ``verifying``, ``loading`` and ``warming`` as they begin.
    """

    def __init__(self, limits: EngineLimits, on_state: Callable[[str], None]) -> None:
        self._limits = limits
        self._on_state = on_state
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._regions: list[tuple[Region, Region]] = []
        self._free: list[int] = []
        self._ready: asyncio.Future[Loaded] | None = None
        self._running: dict[int, asyncio.Future[messages.Message]] = {}
        self._next_id = 0
        self._ended = asyncio.Event()
        self._why = ""
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def slots(self) -> int:
        """How many batches can be under way at once."""
        return _SLOTS

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
            RejectedError: if a gate failed, or the process died, hung or took too much memory.
            UnreadableError: if the version could not be read.
            OSError: if the process could not be started.
        """
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        message = {
            "op": "load",
            "root": str(order.root),
            "model": order.model,
            "version": order.version,
            "largest": order.largest,
            "threads": self._limits.threads,
        }
        self._start(loop)
        try:
            self._send(message)
            return await asyncio.wait_for(asyncio.shield(self._ready), self._limits.load_timeout_s)
        except TimeoutError:
            self.kill(f"loading took more than {self._limits.load_timeout_s:g} s")
            raise RejectedError("load", self._why) from None
        except EngineDiedError:
            await self.stop()  # to know how it ended
            raise RejectedError("load", self._why) from None
        except asyncio.CancelledError:
            self.kill("it is not wanted any more")
            raise

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for side in (ours, theirs):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * messages.MAX_MESSAGE_BYTES)
        ours.setblocking(False)
        self._channel = ours
        self._regions = [(Region.create("inputs"), Region.create("outputs")) for _ in range(_SLOTS)]
        self._free = list(range(_SLOTS))
        fds = [theirs.fileno(), *(region.fd for pair in self._regions for region in pair)]
        # -P: what lies in the folder that the server was started in must not be imported.
        command = [sys.executable, "-P", "-m", "modelport_server.engines.worker", str(os.getpid()), *map(str, fds)]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, env=_environment())
        loop.add_reader(ours.fileno(), self._on_readable)
        self._watch = loop.create_task(self._watch_memory())

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
        if op in ("done", "failed"):
            future = self._running.pop(message["id"], None)
            self._watch_oldest()
            if future is not None and not future.done():
                future.set_result(message)
        elif op == "state":
            self._on_state(message["state"])
        elif self._ready is None or self._ready.done():
            return
        elif op == "ready":
            self._ready.set_result(Loaded(message["engine"], message["golden"], tuple(message["dependent"])))
        elif op == "rejected":
            self._ready.set_exception(RejectedError(message["gate"], message["reason"]))
        elif op == "unreadable":
            self._ready.set_exception(UnreadableError(message["reason"]))

    async def run(self, batch: Batch) -> BatchOutput:
        """Runs a batch; the outputs are views of shared memory until ``release`` is called.

        Raises:
            ModelFailureError: if the model failed.
            EngineDiedError: if the process died, or hung and was killed.
        """
        if self._ended.is_set() or not self._free:
            raise EngineDiedError("the engine died")
        slot = self._free.pop()
        self._next_id += 1
        number = self._next_id
        try:
            self._send(self._run_message(number, slot, batch))
        except messages.MessageTooLargeError as error:
            self._free.append(slot)
            raise ModelFailureError("the call has too many inputs") from error
        except BaseException:
            self._free.append(slot)
            raise
        # From here on the slot is the engine's until it answers, whatever becomes of this call.
        future: asyncio.Future[messages.Message] = asyncio.get_running_loop().create_future()
        self._running[number] = future
        if len(self._running) == 1:
            self._watch_oldest()
        reply = await future
        if reply["op"] == "failed":
            self._free.append(slot)
            raise ModelFailureError(reply["message"], caller_fault=reply["caller_fault"])
        outputs = messages.read(self._regions[slot][1], reply["outputs"], reply["size"])
        return BatchOutput(outputs, reply["us"], partial(self._free.append, slot))

    def _run_message(self, number: int, slot: int, batch: Batch) -> messages.Message:
        tensors = _joined(batch)
        entries, size = messages.describe(tensors)
        messages.write(self._regions[slot][0], tensors, entries, size)
        return {
            "op": "run",
            "id": number,
            "slot": slot,
            "signature": batch.signature,
            "size": size,
            "inputs": entries,
        }

    def _watch_oldest(self) -> None:
        """Times the batch that the engine has begun: it runs one after another, whatever is queued."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            self._timer = asyncio.get_running_loop().call_later(self._limits.run_timeout_s, self._on_hang)

    def _on_hang(self) -> None:
        self.kill(f"a batch ran for more than {self._limits.run_timeout_s:g} s")

    async def _watch_memory(self) -> None:
        limit = self._limits.memory_limit_bytes
        while not self._ended.is_set():
            if _resident_bytes(self.pid) > limit:
                self.kill(f"it took more than {limit >> 20} MiB of memory")
                return
            await asyncio.sleep(_MEMORY_POLL_S)

    def kill(self, why: str) -> None:
        """Ends the process at once; everything that it had under way fails."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._die(why)

    def _die(self, why: str) -> None:
        if self._ended.is_set():
            return
        self._why = why
        self._ended.set()
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        error = EngineDiedError("the engine died while it ran the call")
        for future in self._running.values():
            if not future.done():
                future.set_exception(error)
        self._running.clear()
        self._watch_oldest()
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
                self._why = f"{_ENDED}: {_exit_text(code)}"
        for pair in self._regions:
            for region in pair:
                region.close()
        self._regions = []


def _joined(batch: Batch) -> list[RawTensor]:
    """Returns the inputs of all parts, one tensor for each input of the signature."""
    parts = batch.parts
    if len(parts) == 1 and parts[0].rows == parts[0].call.rows:
        return list(parts[0].call.inputs)
    count = len(parts[0].call.inputs)
    return [
        join_rows([cut_rows(part.call.inputs[index], part.start, part.stop) for part in parts])
        for index in range(count)
    ]


def _reap(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _exit_text(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _environment() -> dict[str, str]:
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3")}
