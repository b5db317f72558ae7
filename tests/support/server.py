"""A real server in a process of its own, for tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import grpc

from modelport.v1 import model_pb2, model_pb2_grpc

START_TIMEOUT_S = 120.0


class ServerProcess:
    """``modelport serve`` on a free port of the loopback interface."""

    def __init__(
        self,
        registry: Path,
        scratch: Path,
        arguments: tuple[str, ...],
        port: int = 0,
        program: tuple[str, ...] = ("modelport",),
    ) -> None:
        self._port_file = scratch / f"port-{time.monotonic_ns()}"
        self.log = scratch / "server.log"
        self._output = self.log.open("ab")
        command = [sys.executable, "-m", *program, "serve", "--registry", str(registry)]
        command += ["--address", f"127.0.0.1:{port}", "--port-file", str(self._port_file), *arguments]
        self.process = subprocess.Popen(command, stdout=self._output, stderr=self._output)
        self.port = 0

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def wait_listening(self) -> None:
        """Returns once it takes calls."""
        wait_for(lambda: self._port_file.exists() or self.process.poll() is not None, "the server to listen")
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended: {self.log.read_text()}")
        self.port = int(self._port_file.read_text())

    def model(self, name: str) -> model_pb2.Model:
        """Returns what the server says of a model; an empty message if it does not know it."""
        with grpc.insecure_channel(self.address) as channel:
            stub = model_pb2_grpc.ModelServiceStub(channel)
            try:
                return stub.GetModel(model_pb2.GetModelRequest(model=name), timeout=20, wait_for_ready=True).model
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return model_pb2.Model()
                raise

    def version(self, name: str, number: int) -> model_pb2.ModelVersion:
        """Returns what the server says of a version; an empty message if it does not know it."""
        found = [version for version in self.model(name).versions if version.version == number]
        return found[0] if found else model_pb2.ModelVersion()

    def wait_serving(self, name: str, number: int | None = None) -> int:
        """Returns the version in charge, once there is one, or once it is ``number``."""

        def served() -> bool:
            version = self.model(name).serving_version
            return version == number if number is not None else version > 0

        wait_for(served, f"{name} to be served", self.alive)
        return self.model(name).serving_version

    def wait_state(self, name: str, number: int, state: str) -> model_pb2.ModelVersion:
        """Returns a version once it is in a state, named as in ``STATE_AVAILABLE`` without its prefix."""
        wanted = model_pb2.ModelVersion.State.Value(f"STATE_{state}")
        wait_for(lambda: self.version(name, number).state == wanted, f"{name}@{number} to be {state}", self.alive)
        return self.version(name, number)

    def alive(self) -> None:
        """Raises with the server's log if it has ended."""
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}: {self.log.read_text()[-4000:]}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self._output.close()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def wait_for(
    condition: Callable[[], bool],
    what: str,
    check: Callable[[], None] = lambda: None,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Returns once ``condition`` holds; asks often, because what it asks about is in another process."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        check()
        if time.monotonic() > deadline:
            raise AssertionError(f"gave up waiting for {what}")
        time.sleep(0.02)


@contextmanager
def run_server(
    registry: Path,
    scratch: Path,
    *arguments: str,
    port: int = 0,
    program: tuple[str, ...] = ("modelport",),
    engine: str = "tensorflow",
) -> Generator[ServerProcess]:
    """Starts a server, waits until it listens, and ends it afterwards, whatever happens."""
    scratch.mkdir(parents=True, exist_ok=True)
    server = ServerProcess(registry, scratch, ("--engine", engine, *arguments), port, program)
    try:
        server.wait_listening()
        yield server
    finally:
        server.stop()
