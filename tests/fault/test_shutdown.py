"""How the server comes up and goes down, under load and beside callers that do nothing to help."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modelport.v1 import prediction_pb2 as pb
from modelport_registry import Published, Registry
from tests.support.rpc import (
    PREDICT,
    Outcome,
    Stream,
    call,
    engines,
    failed,
    has_ended,
    open_channel,
    request,
    start,
)
from tests.support.server import ServerProcess, run_server, wait_for

OK = grpc.StatusCode.OK
Publish = Callable[[Path, str, int], Published]
X = np.ones((1, 4), np.float32)
CLEAR_LINE_S = 30.0
"""Far more than it should take, because the machine may be busy; what is tested is that it ends by itself."""


@contextmanager
def _serving(tmp_path: Path, *arguments: str) -> Generator[ServerProcess]:
    with run_server(tmp_path / "registry", tmp_path, "--threads", "1", *arguments) as server:
        server.wait_serving("toy")
        yield server
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]
    assert "never retrieved" not in log, log[-4000:]


def _health(channel: grpc.Channel, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request: Any = health_pb2.HealthCheckRequest
    return int(stub.Check(request(service=service), timeout=20, wait_for_ready=True).status)


SERVING = int(health_pb2.HealthCheckResponse.SERVING)
NOT_SERVING = int(health_pb2.HealthCheckResponse.NOT_SERVING)


class HealthWatch(threading.Thread):
    """Follows the server's health and notes when it was told what."""

    def __init__(self, address: str, service: str = "") -> None:
        super().__init__(daemon=True)
        self._channel = open_channel(address)
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        self._answers = stub.Watch(health_pb2.HealthCheckRequest(service=service))
        self.told: list[tuple[int, float]] = []

    def run(self) -> None:
        try:
            for answer in self._answers:
                self.told.append((int(answer.status), time.monotonic()))
        except grpc.RpcError:
            return

    def close(self) -> None:
        self._answers.cancel()
        self.join(30)
        self._channel.close()


RETRIES = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.1s",
"maxBackoff": "0.5s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"]}}]}"""


class Caller(threading.Thread):
    """Calls one after another until a call that began after the stop was announced has failed."""

    def __init__(self, address: str, stopping: threading.Event) -> None:
        super().__init__(daemon=True)
        options = [("grpc.service_config", RETRIES), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stopping = stopping
        self.answered = 0
        self.failed_early: list[Outcome] = []

    def run(self) -> None:
        with self._channel:
            method: Any = getattr(self._channel, "unary_unary")(PREDICT)  # noqa: B009 - untyped
            while True:
                announced = self._stopping.is_set()
                try:
                    method(request("toy", {"x": X}).SerializeToString(), timeout=20)
                except grpc.RpcError as error:
                    if not announced:
                        self.failed_early.append(failed(error))
                    return
                self.answered += 1


class StreamCaller(threading.Thread):
    """Sends on a stream until a notice says that the server goes, half-closes, and counts what comes back."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._channel = open_channel(address)
        self.sent = 0
        self.answered: list[int] = []
        self.notices: list[int] = []
        self.code: grpc.StatusCode | None = None

    def run(self) -> None:
        window = threading.Semaphore(8)
        over = threading.Event()

        def messages() -> Iterator[bytes]:
            while not over.is_set():
                window.acquire()
                self.sent += 1
                message = request("toy", {"x": X}, sequence=self.sent)
                yield pb.PredictStreamRequest(request=message).SerializeToString()

        method: Any = getattr(self._channel, "stream_stream")(  # noqa: B009 - untyped
            "/modelport.v1.PredictionService/PredictStream"
        )
        with self._channel:
            stream = method(messages(), timeout=120)
            try:
                for raw in stream:
                    answer = pb.PredictStreamResponse.FromString(raw)
                    if answer.HasField("notice"):
                        self.notices.append(answer.notice.reason)
                        over.set()
                    else:
                        self.answered.append(answer.response.sequence)
                    window.release()
            except grpc.RpcError:
                pass
            self.code = stream.code()


def test_sigterm_under_load_loses_no_call(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with _serving(tmp_path) as server:
        front = psutil.Process(server.process.pid)
        children = engines(front)
        watch = HealthWatch(server.address)
        watch.start()
        wait_for(lambda: [status for status, _ in watch.told] == [SERVING], "to be healthy")
        stopping = threading.Event()
        callers = [Caller(server.address, stopping) for _ in range(4)]
        streams = [StreamCaller(server.address) for _ in range(2)]
        for thread in (*callers, *streams):
            thread.start()
        wait_for(lambda: all(caller.answered > 5 for caller in callers), "calls to flow")
        wait_for(lambda: all(len(stream.answered) > 5 for stream in streams), "streams to flow")
        stopping.set()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        for thread in (*callers, *streams):
            thread.join(60)
            assert not thread.is_alive()
        watch.close()
        assert [status for status, _ in watch.told] == [SERVING, NOT_SERVING]
        assert [caller.failed_early for caller in callers] == [[]] * 4
        for stream in streams:
            assert stream.notices == [pb.StreamNotice.REASON_DRAINING]
            assert stream.code is OK
            assert stream.answered == list(range(1, stream.sent + 1))
        wait_for(lambda: all(map(has_ended, children)), "the engines to end")


def test_health_turns_before_calls_are_refused(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with _serving(tmp_path, "--lame-duck", "3") as server, open_channel(server.address) as channel:
        watches = [HealthWatch(server.address, service) for service in ("", "toy", "modelport.v1.PredictionService")]
        for watch in watches:
            watch.start()
        wait_for(lambda: all(watch.told for watch in watches), "to be healthy")
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: all(watch.told[-1][0] == NOT_SERVING for watch in watches), "health to turn")
        assert call(channel, request("toy", {"x": X})).code is OK  # the lame duck still takes calls
        assert server.process.wait(30) == 0
        for watch in watches:
            watch.close()


def test_accepted_calls_are_answered_though_the_engine_is_slow(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with _serving(tmp_path, "--lame-duck", "0") as server, open_channel(server.address) as channel:
        engine = engines(psutil.Process(server.process.pid))[0]
        with Stream(channel) as stream:
            stream.ask(request("toy", {"x": X}, sequence=1))
            engine.suspend()
            stream.send(request("toy", {"x": X}, sequence=2))
            waits = [start(channel, request("toy", {"x": X})) for _ in range(3)]
            # taken in the order of their connection: once this one has failed, the others are in
            assert call(channel, request("toy", {}), timeout_s=20).code is grpc.StatusCode.INVALID_ARGUMENT
            server.process.send_signal(signal.SIGTERM)
            assert stream.next().notice.reason == pb.StreamNotice.REASON_DRAINING
            engine.resume()
            assert [wait().code for wait in waits] == [OK] * 3
            assert stream.next().response.sequence == 2
            stream.close()
            assert stream.rest() == []
            assert stream.code() is OK
        assert server.process.wait(30) == 0


def test_a_stream_that_never_ends_is_cut_at_the_grace(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with _serving(tmp_path, "--grace", "1") as server, open_channel(server.address) as channel, Stream(channel) as idle:
        idle.ask(request("toy", {"x": X}))
        server.process.send_signal(signal.SIGTERM)
        assert idle.next().notice.reason == pb.StreamNotice.REASON_DRAINING
        assert server.process.wait(30) == 0


def test_an_engine_that_hangs_does_not_hold_up_the_end(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with _serving(tmp_path, "--grace", "1") as server, open_channel(server.address) as channel:
        engine = engines(psutil.Process(server.process.pid))[0]
        engine.suspend()
        wait = start(channel, request("toy", {"x": X}))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert wait().code is not OK
        wait_for(lambda: has_ended(engine), "the engine to end")


def test_a_large_answer_that_is_on_its_way_arrives(tmp_path: Path, saved_models: Path) -> None:
    Registry(tmp_path / "registry").publish("toy", saved_models / "zoo" / "strings")
    text = np.array([b"x" * (20 << 20)], dtype=object)
    with _serving(tmp_path) as server, open_channel(server.address) as channel, Stream(channel) as stream:
        stream.ask(request("toy", {"text": text[:0]}, sequence=1))
        engine = engines(psutil.Process(server.process.pid))[0]
        engine.suspend()
        wait = start(channel, request("toy", {"text": text}, outputs=["doubled"]))
        # answered after the call has been queued, because it is on its connection
        assert call(channel, request("toy", {})).code is grpc.StatusCode.INVALID_ARGUMENT
        server.process.send_signal(signal.SIGTERM)
        assert stream.next().notice.reason == pb.StreamNotice.REASON_DRAINING
        stream.close()
        engine.resume()  # the call is the last one under way, and stopping waits for nothing else
        outcome = wait()
        assert outcome.code is OK, outcome.message
        assert outcome.response is not None
        assert len(outcome.response.outputs[0].data) == 8 + (40 << 20)
        assert server.process.wait(60) == 0


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with _serving(tmp_path, "--grace", "300", "--lame-duck", "30") as server:
        watch = HealthWatch(server.address)
        watch.start()
        wait_for(lambda: bool(watch.told), "to be healthy")
        engine = engines(psutil.Process(server.process.pid))[0]
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: watch.told[-1][0] == NOT_SERVING, "health to turn")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) != 0
        watch.close()
        wait_for(lambda: has_ended(engine), "the engine to end")


def test_sigterm_while_a_version_loads(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with run_server(tmp_path / "registry", tmp_path) as server:
        front = psutil.Process(server.process.pid)
        wait_for(lambda: bool(engines(front)), "an engine to start")
        children = engines(front)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        wait_for(lambda: all(map(has_ended, children)), "the engine to end")
    assert "Traceback" not in server.log.read_text()


# ---- coming up


def _run_to_its_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelport", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=CLEAR_LINE_S, check=False)


def _one_clear_line(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    for word in words:
        assert word in lines[0]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        _one_clear_line(_run_to_its_end("-r", str(tmp_path), "--address", address), address, "--address")


@pytest.mark.parametrize("address", ["nowhere.invalid:8500", "127.0.0.1:99999", "127.0.0.1:port", ""])
def test_an_address_that_is_none(tmp_path: Path, address: str) -> None:
    _one_clear_line(_run_to_its_end("-r", str(tmp_path), "--address", address), "--address")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-batch-size", "0"], ["--max-batch-size"]),
        (["--grace", "-1"], ["--grace"]),
        (["--grace", "nan"], ["--grace"]),
        (["--run-timeout", "inf"], ["--run-timeout"]),
        (["--max-message-mib", "9999"], ["--max-message-mib"]),
        (["--model", "../x"], ["../x"]),
    ],
)
def test_a_flag_that_cant_be(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    _one_clear_line(_run_to_its_end("-r", str(tmp_path), *flags), *words)


@pytest.mark.parametrize("there", [True, False], ids=["empty", "missing"])
def test_an_empty_registry_is_up_and_not_serving_until_a_version_comes(
    tmp_path: Path, publish_tag: Publish, there: bool
) -> None:
    root = tmp_path / "registry"
    if there:
        root.mkdir()
    with run_server(root, tmp_path, "--threads", "1") as server, open_channel(server.address) as channel:
        assert _health(channel) == NOT_SERVING
        assert call(channel, request("toy", {"x": X})).code is grpc.StatusCode.NOT_FOUND
        publish_tag(root, "toy", 1)
        server.wait_serving("toy", 1)
        wait_for(lambda: _health(channel) == SERVING, "to be healthy")
        assert _health(channel, "toy") == SERVING
        assert call(channel, request("toy", {"x": X})).code is OK
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
