"""An engine process: verifies, loads and warms one version, then runs batches until the front goes.

Started by ``modelport_server.engines.process``. The command line gives the file descriptors of the
socket pair and of each slot's two regions, inputs and outputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from modelport.exceptions import ModelportError
from modelport.tensors import array_bytes, array_from_bytes, dtype_of
from modelport_registry import IntegrityError, InvalidModelError, Manifest, Registry
from modelport_server.engines import _messages as messages
from modelport_server.engines._memory import Region
from modelport_server.engines.protocol import Array, Engine, EngineError
from modelport_server.engines.verification import GoldenMismatchError, Verified, check_golden, warm_up
from modelport_server.signatures import is_batchable
from modelport_server.tensors import RawTensor

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LOADING_NICE = 19
_OOM_SCORE = 500

Result = TypeVar("Result")


class _RejectedError(Exception):
    def __init__(self, gate: str, reason: str) -> None:
        super().__init__(reason)
        self.gate = gate


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

    def serve(self) -> None:
        """Loads the version that the first message names, then answers until the front is gone."""
        order = messages.receive(self._channel)
        if order is None:
            return
        try:
            self._load(order)
        except _RejectedError as error:
            self._send({"op": "rejected", "gate": error.gate, "reason": str(error)})
            return
        except _UnreadableError as error:
            self._send({"op": "unreadable", "reason": str(error)})
            return
        except Exception as error:  # whatever a model makes us do, the front must hear of it
            self._send(
                {"op": "rejected", "gate": "load", "reason": f"it makes the engine fail: {type(error).__name__}"}
            )
            raise
        while (message := messages.receive(self._channel)) is not None:
            self._run(message)

    def _send(self, message: messages.Message) -> None:
        self._channel.send(messages.pack(message))

    def _load(self, order: messages.Message) -> None:
        registry, model, version = Registry(Path(order["root"])), str(order["model"]), int(order["version"])
        self._send({"op": "state", "state": "verifying"})
        manifest = _niced(lambda: _verify(registry, model, version))
        self._send({"op": "state", "state": "loading"})
        _niced(_import_engine)
        # On this thread, because the engine's thread pools take on the priority of the one that makes them.
        self._engine = engine = _new_engine(int(order["threads"]))
        path = registry.path(model, version)
        _niced(lambda: _load_model(engine, path, manifest))
        self._send({"op": "state", "state": "warming"})
        verified = _niced(lambda: _check(engine, registry, manifest, int(order["largest"])))
        self._send(
            {
                "op": "ready",
                "engine": engine.name,
                "golden": verified.examples,
                "dependent": list(verified.dependent),
            }
        )

    def _run(self, message: messages.Message) -> None:
        inputs_region, outputs_region = self._slots[int(message["slot"])]
        reply: messages.Message = {"id": message["id"]}
        assert self._engine is not None
        try:
            raw = messages.read(inputs_region, message["inputs"], message["size"])
            inputs = {tensor.name: array_from_bytes(tensor.dtype, tensor.shape, tensor.data) for tensor in raw}
            started = time.monotonic()
            outputs = self._engine.run(message["signature"], inputs)
            spent_us = int((time.monotonic() - started) * 1e6)
            entries, size = _write_outputs(outputs_region, outputs)
            self._send(reply | {"op": "done", "outputs": entries, "size": size, "us": spent_us})
        except EngineError as error:
            self._send(reply | {"op": "failed", "caller_fault": error.caller_fault, "message": str(error)})
        except OSError:
            raise  # the front is gone
        except Exception as error:  # whatever a model makes us do, the front must hear of it
            text = f"the engine failed: {type(error).__name__}"
            self._send(reply | {"op": "failed", "caller_fault": False, "message": text})


def _write_outputs(region: Region, outputs: Mapping[str, Array]) -> tuple[list[list[object]], int]:
    tensors: list[RawTensor] = []
    for name in sorted(outputs):
        array = outputs[name]
        dtype = dtype_of(array)
        tensors.append(RawTensor(name, dtype, array.shape, array_bytes(array, dtype)))
    entries, size = messages.describe(tensors)
    messages.write(region, tensors, entries, size)
    return entries, size


def _niced(work: Callable[[], Result]) -> Result:
    """Runs ``work`` on a thread of the lowest priority, so that it takes no time from those who serve.

    A thread, because an unprivileged process that has been niced can't go back.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOADING_NICE)
            results.append(work())
        except BaseException as error:  # it is raised again on the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="load", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _import_engine() -> None:
    from modelport_server.engines.tensorflow_engine import import_tensorflow

    import_tensorflow()


def _new_engine(threads: int) -> Engine:
    from modelport_server.engines.tensorflow_engine import TensorFlowEngine

    return TensorFlowEngine(threads=threads)


def _verify(registry: Registry, model: str, version: int) -> Manifest:
    try:
        return registry.verify(model, version)
    except (IntegrityError, InvalidModelError) as error:
        raise _RejectedError("integrity", str(error)) from error
    except (ModelportError, OSError) as error:
        raise _UnreadableError(str(error)) from error


def _load_model(engine: Engine, path: Path, manifest: Manifest) -> None:
    try:
        engine.load(path, list(manifest.signatures))
    except EngineError as error:
        raise _RejectedError("load", str(error)) from error


def _check(engine: Engine, registry: Registry, manifest: Manifest, largest: int) -> Verified:
    batched = [name for name, spec in manifest.signatures.items() if is_batchable(spec)]
    try:
        golden = registry.golden(manifest.model, manifest.version)
        verified = check_golden(engine, golden, batched, largest)
    except GoldenMismatchError as error:
        raise _RejectedError("golden", str(error)) from error
    except EngineError as error:
        raise _RejectedError("golden", f"the model fails on its golden examples: {error}") from error
    except (IntegrityError, InvalidModelError) as error:
        raise _RejectedError("golden", str(error)) from error
    except (ModelportError, OSError) as error:
        raise _UnreadableError(str(error)) from error
    independent = [name for name in batched if name not in verified.dependent]
    warm_up(engine, list(manifest.signatures.values()), golden, independent, largest)
    return verified


def _settle(front: int) -> None:
    """Ties this process to the front, given by its pid: it ends when the front does, and only then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != front:  # it ended before the kernel was told
        sys.exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))


def main() -> None:
    """Runs an engine process; the arguments are the front's pid and file descriptors."""
    front, *numbers = [int(argument) for argument in sys.argv[1:]]
    _settle(front)
    channel = socket.socket(fileno=numbers[0])
    pairs = [(Region(numbers[i]), Region(numbers[i + 1])) for i in range(1, len(numbers), 2)]
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        Worker(channel, pairs).serve()
    sys.stdout.flush()
    os._exit(0)  # TensorFlow's own way out takes its time, and has nothing left to save


if __name__ == "__main__":
    main()
