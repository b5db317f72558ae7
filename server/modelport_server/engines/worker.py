"""An engine process: puts one version through its gates, then runs batches and copies of calls until the front goes.

Started by ``modelport_server.engines.spawner``, in one of two ways: forked from the zygote, or with a
command line that gives the front's pid and the file descriptors of the socket pair and of each slot's two
regions, inputs and outputs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Never

from modelport.exceptions import ModelportError
from modelport.tensors import array_bytes, array_from_bytes, dtype_of
from modelport_registry import JSON, Golden, IntegrityError, InvalidModelError, Manifest, Registry
from modelport_server.engines import _messages as messages
from modelport_server.engines._memory import Region
from modelport_server.engines._system import Priority, close_network, live_under, take_cores
from modelport_server.engines.instances import Instances, OnAllInstances, TimeShares
from modelport_server.engines.int8 import Samples, samples_of
from modelport_server.engines.kinds import INT8, OPENVINO, TENSORFLOW
from modelport_server.engines.order import LoadOrder
from modelport_server.engines.parallel import Parallelism
from modelport_server.engines.protocol import Array, Engine, EngineError
from modelport_server.engines.verification import GoldenMismatchError, Verified, check_golden
from modelport_server.engines.warming import Request, TimedEngine, WarmedUp, WarmUp, WarmUpError
from modelport_server.gates import result as gates
from modelport_server.gates.result import GateResult, Outcome
from modelport_server.outputs import agreeing_rows, categories
from modelport_server.signatures import is_batchable
from modelport_server.tensors import RawTensor

_MIB = 1 << 20
_PATIENCE = 0.5
"""The share of a gate's time after which those who serve no longer keep it from its end."""

_MAX_LOOKS = 8
"""Of how many outputs of each version the categories of a copy's rows are told: they have to fit into a message."""
_MANY_OUTPUTS = 500
"""With more outputs than this there is no room in a message for categories."""

Figures = dict[str, JSON]


class _RejectedError(Exception):
    """The version fails the gate that it is at."""


class _SkippedError(Exception):
    """There is nothing for the gate to check."""


class _UnreadableError(Exception):
    """The version could not be read now; that says nothing about the version."""


class Worker:
    """One engine process's work.

    Args:
        channel: the socket pair's end.
        slots: for each slot, where inputs come and where outputs go.
    """

    def __init__(self, channel: socket.socket, slots: list[tuple[Region, Region]]) -> None:
        self._channel = channel
        self._slots = slots
        self._engine: Engine | None = None
        self._shares = TimeShares()

    def serve(self) -> None:
        """Loads the version that the first message names, then answers until the front is gone."""
        message = messages.receive(self._channel)
        if message is None:
            return
        if why := close_network():
            self._send({"op": "warning", "text": f"engine processes can't be kept from the network: {why}"})
        document = messages.read_document(self._slots[0][0], message["size"])
        parallelism = Parallelism(**document["parallelism"])
        loading = _Loading(self._send, document, parallelism)
        try:
            self._engine = loading.run()
        except _RejectedError:
            return  # the gate has said so
        except _UnreadableError as error:
            self._send({"op": "unreadable", "reason": str(error)})
            return
        with Instances(parallelism.instances) as instances:
            instances.run(self.answer)

    def answer(self) -> None:
        """Runs what comes until the front is gone; each instance is in here."""
        try:
            while (message := messages.receive(self._channel)) is not None:
                self._run(message)
        except ConnectionError:
            return
        except BaseException:  # else this process would live on, an instance short, and the front wait for an answer
            traceback.print_exc()
            os._exit(1)

    def _send(self, message: messages.Message) -> None:
        self._channel.send(messages.pack(message))

    def _run(self, message: messages.Message) -> None:
        inputs_region, outputs_region = self._slots[int(message["slot"])]
        reply: messages.Message = {"id": message["id"]}
        assert self._engine is not None
        try:
            raw = messages.read(inputs_region, message["inputs"], message["size"])
            inputs = {tensor.name: array_from_bytes(tensor.dtype, tensor.shape, tensor.data) for tensor in raw}
            started = time.monotonic()
            with self._shares.share() as share:
                outputs = self._engine.run(message["signature"], inputs)
            spent_us = int((time.monotonic() - started) * 1e6)
            reply |= {"us": spent_us, "cpu_us": int(share.cpu_s * 1e6), "busy_us": int(share.busy_s * 1e6)}
            if message["op"] == "compare":
                answer = messages.read(inputs_region, message["answer"], message["size"])
                self._send(reply | {"op": "compared"} | _comparison(answer, _raw(outputs), look=message["look"]))
                return
            tensors = _raw(outputs)
            entries, size = messages.describe(tensors)
            messages.write(outputs_region, tensors, entries, size)
            self._send(reply | {"op": "done", "outputs": entries, "size": size})
        except EngineError as error:
            self._send(reply | {"op": "failed", "caller_fault": error.caller_fault, "message": str(error)})
        except OSError:
            raise  # the front is gone, or there is no memory to share with it
        except Exception as error:  # whatever a model makes us do, the front must hear of it
            text = f"the engine failed: {type(error).__name__}"
            self._send(reply | {"op": "failed", "caller_fault": False, "message": text})


class _Loading:
    """A version on its way through the gates.

    Args:
        send: sends a message to the front.
        document: what the front ordered.
        parallelism: how many batches run at once.
    """

    def __init__(
        self, send: Callable[[messages.Message], None], document: messages.Message, parallelism: Parallelism
    ) -> None:
        self._send = send
        self._order = order = LoadOrder.from_json(document)
        self._parallelism = parallelism
        self._limits_s: Mapping[str, float] = document["limits_s"]
        self._registry = Registry(order.root)
        self._path = Path()
        self._priority = Priority(stays=order.in_haste)

    def run(self) -> Engine:
        """Returns the engine once the version has passed all gates and is warm.

        Raises:
            _RejectedError: if it failed one, of which the front has been told.
            _UnreadableError: if the version can't be read now.
        """
        self._priority.lower()
        with self._gate(gates.INTEGRITY) as figures:
            manifest = self._priority.run(self._verify)
            figures |= {"files": len(manifest.files), "bytes": manifest.size_bytes}
        with self._gate(gates.SAFETY) as figures:
            figures |= self._priority.run(self._check_safety)
        with self._gate(gates.SIGNATURE) as figures:
            figures |= self._check_signatures(manifest)
        with self._gate(gates.LOAD) as figures:
            engine = TimedEngine(self._load(manifest))
            figures |= {"engine": engine.name, "resident_mib": _resident_bytes() // _MIB}
        batched = [name for name, spec in manifest.signatures.items() if is_batchable(spec)]
        verified = Verified()
        with self._gate(gates.GOLDEN) as figures:
            golden = self._priority.run(lambda: self._check_golden(engine, batched, verified, figures))
        independent = [name for name in batched if name not in verified.dependent]
        with self._gate(gates.WARM_UP) as figures:
            warm = self._priority.run(lambda: self._warm_up(engine, manifest, golden, independent, figures))
        self._priority.restore()
        self._send(
            {
                "op": "ready",
                "engine": engine.name,
                "golden": verified.examples,
                "dependent": verified.dependent,
                "best_size": warm.best_size,
                "efficient_size": warm.efficient_size,
            }
        )
        return engine.engine

    @contextlib.contextmanager
    def _gate(self, gate: str) -> Generator[Figures]:
        """Tells the front how a gate begins and ends; what is put into the figures is part of that."""
        self._send({"op": "begin", "gate": gate})
        started = time.monotonic()
        figures: Figures = {}

        def end(outcome: Outcome, reason: str = "") -> None:
            result = GateResult(gate, outcome, time.monotonic() - started, figures, reason)
            self._send({"op": "end"} | result.to_json())

        try:
            with self._priority.raised_if_starved(self._limits_s[gate] * _PATIENCE):
                yield figures
        except _SkippedError as skipped:
            end(Outcome.SKIPPED, str(skipped))
        except _UnreadableError:
            raise
        except _RejectedError as error:
            end(Outcome.FAILED, str(error))
            raise
        except Exception as error:  # whatever a model makes us do, the front must hear of it
            end(Outcome.FAILED, f"it makes the engine fail: {type(error).__name__}")
            raise
        else:
            end(Outcome.PASSED)

    def _verify(self) -> Manifest:
        try:
            self._path = self._registry.path(self._order.model, self._order.version)
            return self._registry.verify(self._order.model, self._order.version)
        except (IntegrityError, InvalidModelError) as error:
            raise _RejectedError(str(error)) from error
        except (ModelportError, OSError) as error:
            raise _UnreadableError(str(error)) from error

    def _check_safety(self) -> Figures:
        from modelport_server.gates.safety import UnsafeModelError, check_safety

        try:
            graph = (self._path / "saved_model.pb").read_bytes()
            return dict(check_safety(graph, self._order.allow_ops, model=self._order.model))
        except (UnsafeModelError, IntegrityError, InvalidModelError) as error:
            raise _RejectedError(str(error)) from error
        except OSError as error:
            raise _UnreadableError(str(error)) from error

    def _check_signatures(self, manifest: Manifest) -> Figures:
        from modelport_server.gates.signature import SignatureChangedError, check_signatures

        order = self._order
        if order.baseline is None:
            raise _SkippedError("there is no other version in charge to compare with")
        try:
            allowed = order.allow_signature_changes
            return dict(check_signatures(order.baseline, manifest.signatures, allowed, model=order.model))
        except SignatureChangedError as error:
            raise _RejectedError(str(error)) from error

    def _load(self, manifest: Manifest) -> Engine:
        order = self._order
        self._priority.run(lambda: _import_engine(order.engine))
        samples = self._priority.run(lambda: self._samples(manifest))
        try:
            # Its thread pools take on the priority of the thread that makes them, and are as large as that has cores.
            engine = self._priority.run_on_all_cores(lambda: _new_engine(order, self._parallelism, samples))
            self._priority.lower()
            self._priority.run(lambda: engine.load(self._path, list(manifest.signatures)))
        except EngineError as error:
            raise _RejectedError(str(error)) from error
        except OSError as error:
            raise _UnreadableError(f"its files can't be read: {error.strerror or error}") from error
        return engine

    def _samples(self, manifest: Manifest) -> Mapping[str, Samples]:
        """Returns what int8 is calibrated with, by signature; nothing for other precisions."""
        if (self._order.engine, self._order.precision) != (OPENVINO, INT8):
            return {}
        return samples_of(self._golden(), [name for name, spec in manifest.signatures.items() if is_batchable(spec)])

    def _golden(self) -> Sequence[Golden]:
        try:
            return self._registry.golden(self._order.model, self._order.version)
        except (IntegrityError, InvalidModelError) as error:
            raise _RejectedError(str(error)) from error
        except (ModelportError, OSError) as error:
            raise _UnreadableError(str(error)) from error

    def _check_golden(
        self, engine: Engine, batched: Sequence[str], verified: Verified, figures: Figures
    ) -> Sequence[Golden]:
        try:
            golden = self._golden()
            check_golden(engine, golden, batched, self._order.largest, verified)
        except GoldenMismatchError as error:
            raise _RejectedError(str(error)) from error
        except EngineError as error:
            raise _RejectedError(f"the model fails on its golden examples: {error}") from error
        finally:
            figures |= verified.figures()
        return golden

    def _warm_up(
        self,
        engine: TimedEngine,
        manifest: Manifest,
        golden: Sequence[Golden],
        batched: Sequence[str],
        figures: Figures,
    ) -> WarmedUp:
        with Instances(self._parallelism.instances) as instances:
            warm_up = WarmUp(
                engine=OnAllInstances(engine, instances),
                signatures=manifest.signatures,
                batched=batched,
                largest=self._order.largest,
                limit_s=self._limits_s[gates.WARM_UP],
                compiles_sizes=self._order.engine == OPENVINO,
                in_haste=self._order.in_haste,
            )
            try:
                warm_up.run(golden, self._requests())
            except WarmUpError as error:
                raise _RejectedError(str(error)) from error
            finally:
                figures |= warm_up.done.figures() | engine.figures()
        return warm_up.done

    def _requests(self) -> Sequence[Request]:
        from modelport_server.gates.warmup_requests import WARMUP_REQUESTS, WarmUpRequestsError, read_warmup_requests

        try:
            return read_warmup_requests(self._path / WARMUP_REQUESTS)
        except WarmUpRequestsError as error:
            raise _RejectedError(str(error)) from error
        except OSError as error:
            raise _UnreadableError(str(error)) from error


def _raw(outputs: Mapping[str, Array]) -> list[RawTensor]:
    tensors: list[RawTensor] = []
    for name in sorted(outputs):
        array = outputs[name]
        dtype = dtype_of(array)
        tensors.append(RawTensor(name, dtype, array.shape, array_bytes(array, dtype)))
    return tensors


def _comparison(answer: Sequence[RawTensor], outputs: Sequence[RawTensor], *, look: bool) -> messages.Message:
    """Returns what the reply to ``compare`` says of the outputs.

    Args:
        answer: the other version's outputs.
        outputs: this one's.
        look: whether to find the categories of both versions' rows, of as many outputs as fit into a message.
    """
    given = {tensor.name: tensor for tensor in outputs}
    agreeing = [[tensor.name, *agreeing_rows(tensor, given.get(tensor.name))] for tensor in answer]
    most = _MAX_LOOKS if look and len(answer) <= _MANY_OUTPUTS else 0
    return {
        "agreeing": agreeing,
        "categories": {tensor.name: categories(tensor) for tensor in outputs[:most]},
        "answer_categories": {tensor.name: categories(tensor) for tensor in answer[:most]},
    }


def preload(engine: str = TENSORFLOW) -> None:
    """Imports everything that loading a version needs: a process that is forked after that need not."""
    _import_engine(engine)
    for module in ("safety", "signature", "warmup_requests"):
        importlib.import_module(f"modelport_server.gates.{module}")


def _import_engine(engine: str) -> None:
    if engine == OPENVINO:
        from modelport_server.engines.openvino_engine import import_openvino

        import_openvino()
    else:
        from modelport_server.engines.tensorflow_engine import import_tensorflow

        import_tensorflow()


def _new_engine(order: LoadOrder, parallelism: Parallelism, samples: Mapping[str, Samples]) -> Engine:
    if order.engine == OPENVINO:
        from modelport_server.engines.openvino_engine import OpenVINOEngine

        return OpenVINOEngine(parallelism=parallelism, precision=order.precision, samples=samples)
    from modelport_server.engines.tensorflow_engine import TensorFlowEngine

    return TensorFlowEngine(parallelism=parallelism, precision=order.precision)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_engine(front: int, fds: Sequence[int]) -> Never:
    """Is an engine process from here to its end.

    Args:
        front: the front's pid; it must be the parent.
        fds: the file descriptors of the socket pair's end and of each slot's two regions.
    """
    if live_under(front):
        channel = socket.socket(fileno=fds[0])
        pairs = [(Region(fds[i]), Region(fds[i + 1])) for i in range(1, len(fds), 2)]
        with contextlib.suppress(ConnectionError):
            Worker(channel, pairs).serve()
        sys.stdout.flush()
    os._exit(0)  # TensorFlow's own way out takes its time, and has nothing left to save


def main() -> None:
    """Runs an engine process; the arguments are the front's pid and file descriptors."""
    front, *fds = (int(argument) for argument in sys.argv[1:])
    take_cores()
    run_engine(front, fds)


if __name__ == "__main__":
    main()
