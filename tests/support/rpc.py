"""Raw calls to a server under test, for what a well-behaved client would never send, and a canary."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import psutil
from numpy.typing import NDArray

from modelport.tensors import decode, encode
from modelport.v1 import prediction_pb2 as pb
from modelport.v1 import tensor_pb2
from tests.support.server import wait_for

PREDICT = "/modelport.v1.PredictionService/Predict"
PREDICT_STREAM = "/modelport.v1.PredictionService/PredictStream"
PREDICT_MANY = "/modelport.v1.PredictionService/PredictMany"
TIMEOUT_S = 60.0
BACK_TO_NORMAL_S = 5.0
BIG_MESSAGES = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended."""

    code: grpc.StatusCode
    message: str = ""
    response: pb.PredictResponse = field(default_factory=pb.PredictResponse)

    @property
    def outputs(self) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        return {tensor.name: decode(tensor) for tensor in self.response.outputs}


def request(model: str, inputs: Arrays, **fields: Any) -> pb.PredictRequest:
    """Returns a request with every array as an input."""
    return pb.PredictRequest(model=model, inputs=[encode(name, array) for name, array in inputs.items()], **fields)


def tensor(name: str, dtype: int, shape: Sequence[int], data: bytes = b"") -> tensor_pb2.Tensor:
    """Returns a tensor that need not be legal."""
    message = tensor_pb2.Tensor(name=name, shape=shape, data=data)
    message.dtype = dtype  # type: ignore[assignment]
    return message


def open_channel(address: str) -> grpc.Channel:
    """Returns a channel that sends and takes messages of any size, on a connection of its own."""
    return grpc.insecure_channel(address, options=[*BIG_MESSAGES, ("grpc.use_local_subchannel_pool", 1)])


def _method(channel: grpc.Channel, kind: str, path: str) -> Any:
    """Returns a method that takes and gives raw bytes; the type stubs do not know that it may."""
    return getattr(channel, kind)(path)


def call(channel: grpc.Channel, message: pb.PredictRequest | bytes, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Sends one Predict call, as raw bytes if it is bytes, and returns how it ended."""
    method = _method(channel, "unary_unary", PREDICT)
    raw = message if isinstance(message, bytes) else message.SerializeToString()
    try:
        return Outcome(grpc.StatusCode.OK, "", pb.PredictResponse.FromString(method(raw, timeout=timeout_s)))
    except grpc.RpcError as error:
        return failed(error)


def start_raw(channel: grpc.Channel, message: pb.PredictRequest, timeout_s: float = TIMEOUT_S) -> Any:
    """Sends a Predict call and returns the call itself."""
    return _method(channel, "unary_unary", PREDICT).future(message.SerializeToString(), timeout=timeout_s)


def start(channel: grpc.Channel, message: pb.PredictRequest, timeout_s: float = TIMEOUT_S) -> Callable[[], Outcome]:
    """Sends a Predict call and returns how to wait for its end."""
    future = start_raw(channel, message, timeout_s)

    def wait() -> Outcome:
        try:
            return Outcome(grpc.StatusCode.OK, "", pb.PredictResponse.FromString(future.result()))
        except grpc.RpcError as error:
            return failed(error)

    return wait


def start_many(channel: grpc.Channel, message: pb.PredictManyRequest | bytes, timeout_s: float = TIMEOUT_S) -> Any:
    """Sends a PredictMany call, as raw bytes if it is bytes, and returns the call itself."""
    raw = message if isinstance(message, bytes) else message.SerializeToString()
    return _method(channel, "unary_stream", PREDICT_MANY)(raw, timeout=timeout_s)


def joined(messages: Sequence[pb.PredictRequest], timeout_s: float = 0.0) -> pb.PredictManyRequest:
    """Returns the message that joins requests, each with so much time."""
    timeout_us = round(timeout_s * 1e6)
    requests = [pb.JoinedRequest(request=message, timeout_us=timeout_us) for message in messages]
    return pb.PredictManyRequest(requests=requests)


def outcomes(call: Any) -> dict[int, Outcome]:
    """Returns how each request of a PredictMany call ended, in the order of their ends."""
    found: dict[int, Outcome] = {}
    codes = {code.value[0]: code for code in grpc.StatusCode}
    for raw in call:
        for result in pb.PredictManyResponse.FromString(raw).results:
            assert result.index not in found
            if result.WhichOneof("kind") == "response":
                found[result.index] = Outcome(grpc.StatusCode.OK, "", result.response)
            else:
                found[result.index] = Outcome(codes[result.error.code], result.error.message)
    return found


def failed(error: Any) -> Outcome:
    """Returns the outcome that a ``grpc.RpcError`` stands for."""
    return Outcome(error.code(), error.details() or "")


class Stream:
    """A PredictStream call; ``send`` messages, raw or not, and take the answers with ``next``."""

    def __init__(self, channel: grpc.Channel, timeout_s: float = TIMEOUT_S) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = _method(channel, "stream_stream", PREDICT_STREAM)
        self._call: Any = method(iter(self._requests.get, None), timeout=timeout_s)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._requests.put(None)
        self._call.cancel()

    def send(self, message: pb.PredictRequest | bytes, *, follow: bool = False) -> None:
        """Sends a message."""
        if not isinstance(message, bytes):
            message = pb.PredictStreamRequest(request=message, follow=follow).SerializeToString()
        self._requests.put(message)

    def close(self) -> None:
        """Closes the caller's side."""
        self._requests.put(None)

    def next(self) -> pb.PredictStreamResponse:
        """Returns the next answer."""
        return pb.PredictStreamResponse.FromString(next(self._call))

    def ask(self, message: pb.PredictRequest | bytes, *, follow: bool = False) -> pb.PredictStreamResponse:
        """Sends a message and returns the next answer."""
        self.send(message, follow=follow)
        return self.next()

    def rest(self) -> list[pb.PredictStreamResponse]:
        """Returns all answers up to the end."""
        return [pb.PredictStreamResponse.FromString(raw) for raw in self._call]

    def code(self) -> grpc.StatusCode:
        """Returns the status that the call ended with."""
        code: grpc.StatusCode = self._call.code()
        return code


class Canary(threading.Thread):
    """A caller that does nothing wrong and must never notice that others do."""

    def __init__(self, address: str, model: str, tags: Sequence[int]) -> None:
        super().__init__(name="canary", daemon=True)
        self._address = address
        self._model = model
        self._tags = tags
        self._over = threading.Event()
        self.answered = 0
        self.complaints: list[str] = []

    def run(self) -> None:
        """Calls until told to stop."""
        with open_channel(self._address) as channel:
            while not self._over.wait(0.02):  # often, and yet leaving time to engines that load
                x = np.full((2, 4), self.answered, np.float32)
                outcome = call(channel, request(self._model, {"x": x}))
                self._check(outcome, x)
                self.answered += 1

    def _check(self, outcome: Outcome, x: NDArray[np.float32]) -> None:
        if outcome.code is not grpc.StatusCode.OK:
            self.complaints.append(f"{outcome.code}: {outcome.message}")
            return
        outputs = outcome.outputs
        right = np.array_equal(outputs["y"], x * 2) and len(set(outputs["version"].tolist())) == 1
        if not right or outputs["version"][0] not in self._tags:
            self.complaints.append(f"a wrong answer: {outputs}")

    def stop(self) -> None:
        """Ends the calls."""
        self._over.set()
        self.join(TIMEOUT_S)


@contextmanager
def canary(address: str, model: str, *tags: int) -> Generator[Canary]:
    """Lets a canary call a versioned model meanwhile; its answers must all be right."""
    bird = Canary(address, model, tags)
    bird.start()
    try:
        wait_for(lambda: bird.answered > 0, "the canary's first answer")
        yield bird
        seen = bird.answered
        wait_for(lambda: bird.answered > seen + 1, "the canary's next answer")
    finally:
        bird.stop()
    assert not bird.complaints, bird.complaints[:5]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds."""

    rss: int
    fds: int
    threads: int


def footprint(process: psutil.Process) -> Footprint:
    """Returns what a process holds now."""
    with process.oneshot():
        return Footprint(process.memory_info().rss, process.num_fds(), process.num_threads())


def wait_back(process: psutil.Process, before: Footprint, *, rss_bytes: int, fds: int = 0, threads: int = 0) -> None:
    """Returns once a process holds no more than before, but for the tolerances given; within 5 s."""

    def back() -> bool:
        now = footprint(process)
        return (
            now.rss <= before.rss + rss_bytes
            and now.fds <= before.fds + fds
            and now.threads <= before.threads + threads
        )

    try:
        wait_for(back, "the process to return to what it held", timeout_s=BACK_TO_NORMAL_S)
    except AssertionError:
        raise AssertionError(f"it held {before}, now {footprint(process)}") from None


def has_ended(process: psutil.Process) -> bool:
    """Returns whether a process has ended, be it that its parent has not waited for it yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def engines(process: psutil.Process) -> list[psutil.Process]:
    """Returns the engine processes of a server, oldest first."""
    return sorted(filter(_is_engine, process.children()), key=lambda child: child.create_time())


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "modelport_server.engines.worker" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
