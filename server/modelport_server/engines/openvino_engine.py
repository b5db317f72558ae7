"""OpenVINO: reads SavedModels by itself, without TensorFlow. Imported in engine processes only."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelport.names import DEFAULT_SIGNATURE
from modelport_registry import InvalidModelError, SignatureSpec, read_graph, read_signatures, with_signature
from modelport_server.engines._imports import without
from modelport_server.engines.int8 import QuantisingError, Samples, is_quantised, quantise
from modelport_server.engines.kinds import INT8
from modelport_server.engines.parallel import ALONE, Parallelism
from modelport_server.engines.protocol import Array, EngineError

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", INT8: "f32"}
"""OpenVINO's names for the types that it may compute in; a model in int8 says by itself what is."""
_OUTPUTS = frozenset({*(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32)), "float32", "bool", "int64"})
_INPUTS = _OUTPUTS - {"int64"}
"""Types that it computes in full. It has no 64 bits: what is given to it, such as a key, may need them."""
_REFUSING = frozenset(
    {
        "Assert",
        "CheckNumerics",
        "CheckNumericsV2",
        "Gather",
        "GatherV2",
        "GatherNd",
        "ResourceGather",
        "ResourceGatherNd",
    }
    | {"FloorDiv", "FloorMod", "Mod", "TruncateDiv", "TruncateMod"}
)
"""Operations by which TensorFlow refuses inputs: places that are not there, divisors of 0. OpenVINO answers instead."""
_PREAMBLE = re.compile(r"Exception from |Check '|FrontEnd API failed|Model wasn't|Summary:|To facil|[\w./]+:\d+:?$")
"""What OpenVINO puts around the error itself: source files, and general advice."""
_PATH = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*")
_MESSAGE_CHARACTERS = 400
_SIDE = 64


class OpenVINOEngine:
    """Runs signatures of a SavedModel on the processor.

    What ``run`` returns lies in OpenVINO's own memory, and is overwritten by the thread's next run of the signature.

    Args:
        parallelism: how many batches run at once, and on how many threads.
        precision: what it computes in, one of ``PRECISIONS``; inputs and outputs keep their types.
        samples: by signature, golden inputs that ``int8`` is calibrated with.

    Raises:
        EngineError: if the processor does not compute in the precision.
    """

    def __init__(
        self,
        *,
        parallelism: Parallelism = ALONE,
        precision: str = "float32",
        samples: Mapping[str, Samples] | None = None,
    ) -> None:
        self._openvino = openvino = import_openvino()
        self._core = openvino.Core()
        self._options: dict[str, Any] = {
            "NUM_STREAMS": parallelism.instances,
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "ENABLE_CPU_PINNING": False,  # the server moves engines from core to core
        }
        if parallelism.threads:
            self._options["INFERENCE_NUM_THREADS"] = parallelism.threads * parallelism.instances
        self._precision = precision
        self._samples = samples or {}
        self._quantised = False
        self._compiled: dict[str, Any] = {}
        self._of_thread = threading.local()
        self._inputs: dict[str, dict[str, int]] = {}
        self._outputs: dict[str, dict[str, int]] = {}
        self._make_threads()

    @property
    def name(self) -> str:
        """The engine and its version, and the precision if it is not float32."""
        version = self._openvino.__version__.partition("-")[0]
        precision = "" if self._precision == "float32" else f" {self._precision}"
        return f"openvino {version}{precision}"

    def _make_threads(self) -> None:
        """Makes OpenVINO's thread pool, which takes on this thread's priority and cores."""
        ops = self._openvino.opset13
        rows = ops.parameter([-1, _SIDE], np.float32)
        model = self._openvino.Model([ops.matmul(rows, rows, transpose_a=False, transpose_b=True)], [rows], "threads")
        compiled = self._core.compile_model(model, "CPU", self._options)
        taken = compiled.get_property("INFERENCE_PRECISION_HINT")
        if taken.to_string() != PRECISIONS[self._precision]:  # it takes another one without a word
            raise EngineError(
                f"this processor does not compute in {self._precision}: OpenVINO would take {taken.get_type_name()}"
            )
        compiled.create_infer_request().infer({0: np.zeros((_SIDE, _SIDE), np.float32)})

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Loads the SavedModel at ``path`` and compiles each signature.

        Raises:
            EngineError: if OpenVINO can't read or compile it, or it can't be made int8.
            OSError: if the files can't be read now.
        """
        try:
            data = (path / "saved_model.pb").read_bytes()
            specs = read_signatures(data)
            if found := _REFUSING & set(_operations(data)):
                raise EngineError(f"OpenVINO would answer where these refuse inputs: {', '.join(sorted(found))}")
            for name in signatures:
                with _alone(path, data, name, specs) as folder:
                    self._compile(folder, specs[name])
        except InvalidModelError as error:
            raise EngineError(f"OpenVINO can't read it: {error}") from error
        self._samples = {}
        if self._precision == INT8 and not self._quantised:
            raise EngineError("nothing of it can be computed in int8")

    def _compile(self, folder: Path, spec: SignatureSpec) -> None:
        for taken, tensors in ((_INPUTS, spec.inputs), (_OUTPUTS, spec.outputs)):
            for tensor in tensors:
                if tensor.dtype not in taken:
                    raise EngineError(f"{spec.name}: OpenVINO is not given {tensor.dtype}, which {tensor.name!r} is")
        try:
            with self._source(folder, spec.name) as source:
                model = self._core.read_model(source)
                compiled = self._core.compile_model(model, "CPU", self._options)
        except (EngineError, OSError):
            raise
        except Exception as error:
            raise EngineError(f"OpenVINO can't read it: {_public(error)}") from error
        self._quantised |= self._precision == INT8 and is_quantised(model)
        try:
            self.add(spec.name, compiled, [tensor.name for tensor in spec.outputs])
        except KeyError as error:
            raise EngineError(f"{spec.name}: OpenVINO does not find the output {error}") from error

    @contextlib.contextmanager
    def _source(self, folder: Path, signature: str) -> Generator[Path]:
        """Gives what is read: the SavedModel, or what it has become in int8."""
        if self._precision != INT8:
            yield folder
            return
        samples = self._samples.get(signature, ())
        if not samples:
            why = "int8 is calibrated with golden examples, and it has none: publish some, or drop --precision"
            raise EngineError(f"{signature}: {why}")
        with contextlib.ExitStack() as stack:
            try:
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="modelport-"))
                source = quantise(folder, samples, Path(scratch))
            except QuantisingError as error:
                raise EngineError(f"{signature}: it can't be made int8: {_public(error)}") from error
            except OSError as error:
                raise EngineError(f"{signature}: it can't be made int8: {error.strerror or error}") from error
            yield source

    def add(self, signature: str, compiled: Any, outputs: Sequence[str]) -> None:
        """Takes a compiled model, with the names of the outputs that are wanted.

        Raises:
            KeyError: if it has no such output.
        """
        names = {name: number for number, output in enumerate(compiled.outputs) for name in output.get_names()}
        self._outputs[signature] = {name: names[name] for name in outputs}
        self._inputs[signature] = {name: at for at, given in enumerate(compiled.inputs) for name in given.get_names()}
        self._compiled[signature] = compiled

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Runs one batch.

        Raises:
            EngineError: if OpenVINO reports an error.
        """
        request, places = self._request(signature), self._inputs[signature]
        # It takes no others, and does not keep them: they have to live until it is done.
        shared = {name: np.require(array, requirements=["C", "W"]) for name, array in inputs.items()}
        try:
            for name, array in shared.items():
                if name in places:  # OpenVINO leaves out inputs that nothing depends on
                    request.set_input_tensor(places[name], self._openvino.Tensor(array, shared_memory=True))
            request.infer(share_outputs=True)
            return {name: request.get_output_tensor(at).data for name, at in self._outputs[signature].items()}
        except Exception as error:
            raise EngineError(f"OpenVINO failed: {_public(error)}") from error

    def _request(self, signature: str) -> Any:
        """Returns this thread's own request: one that is running takes no other batch."""
        requests: dict[str, Any] = self._of_thread.__dict__
        if signature not in requests:
            requests[signature] = self._compiled[signature].create_infer_request()
        return requests[signature]


def import_openvino() -> Any:
    """Imports OpenVINO without its tools, and returns it.

    They convert models of other frameworks, take most of the time that the import takes, and bring a library that
    reports how they are used (``docs/adr/0052``).
    """
    with without("openvino.tools"):
        import openvino

    return openvino


@contextlib.contextmanager
def _alone(path: Path, data: bytes, signature: str, specs: Mapping[str, SignatureSpec]) -> Generator[Path]:
    """Gives a SavedModel of one signature alone: OpenVINO reads none but ``serving_default``."""
    if set(specs) == {DEFAULT_SIGNATURE} and signature == DEFAULT_SIGNATURE:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="modelport-") as folder:
        (Path(folder) / "saved_model.pb").write_bytes(with_signature(data, signature, DEFAULT_SIGNATURE))
        (Path(folder) / "variables").symlink_to(path / "variables")
        yield Path(folder)


def _operations(data: bytes) -> Iterator[str]:
    for graph in read_graph(data):
        for nodes in (graph.nodes, *(function.nodes for function in graph.functions.values())):
            yield from (node.op for node in nodes)


def _public(error: Exception) -> str:
    """Returns what an error says in one line, without source files and paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if not _PREAMBLE.match(line)), lines[-1] if lines else type(error).__name__)
    return _PATH.sub("...", line).strip("- ")[:_MESSAGE_CHARACTERS]
