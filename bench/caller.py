"""A caller in a process of its own that adds little to what it measures.

It writes HTTP/2 frames that were made beforehand to blocking sockets and reads the answers' frames, one call
after another on every connection: a call costs it some 20 us of Python, where a gRPC channel costs 200 us and
has threads whose turn comes at odd times. What is left of its own jitter is measured with every call, by
a loop of fixed length and by a byte that another process sends back.

Started by ``Caller``; writes what it measured to a file when SIGTERM comes.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import time
from array import array
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelport.v1 import prediction_pb2 as pb

FIELDS = ("start_ns", "took_ns", "version", "spin_ns", "ping_ns")
"""What is written of each call: int64 each; times by the monotonic clock; version 0 for a failed call."""

_PATH = b"/modelport.v1.PredictionService/Predict"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8  # RFC 9113, section 6
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_FRAME_HEAD = 9
_MAX_REQUEST = 16_000
_GREATEST_WINDOW = 2**31 - 1
_FIRST_WINDOW = 65_535
_SPINS = 1_000
_RECEIVE_BYTES = 1 << 16


class CallerError(Exception):
    """The server does not do what this caller can deal with."""


class Connection:
    """An HTTP/2 connection with one call at a time.

    Args:
        address: ``unix:PATH`` or ``HOST:PORT``.
        request: the message of every call.
    """

    def __init__(self, address: str, request: bytes) -> None:
        if len(request) > _MAX_REQUEST:
            raise CallerError(f"a request of {len(request)} bytes needs more than one frame")
        self.socket = _connect(address)
        self._headers = _header_block()
        self._body = b"\0" + len(request).to_bytes(4, "big") + request
        self._stream = -1
        self._window = _FIRST_WINDOW
        self._received = b""
        self._answer = b""
        self.started_ns = 0
        more = (_GREATEST_WINDOW - _FIRST_WINDOW).to_bytes(4, "big")
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0) + _frame(_WINDOW, 0, 0, more))

    def fileno(self) -> int:
        """The socket's."""
        return self.socket.fileno()

    def send(self) -> None:
        """Begins a call."""
        self._stream += 2
        self._answer = b""
        self._window -= len(self._body)
        if self._window < 0:
            raise CallerError("the server does not open its window")
        text = _frame(_HEADERS, _END_HEADERS, self._stream, self._headers)
        text += _frame(_DATA, _END_STREAM, self._stream, self._body)
        self.started_ns = time.monotonic_ns()
        self.socket.sendall(text)

    def receive(self) -> bool:
        """Reads what is there, or waits for something; returns whether the call has ended."""
        data = self.socket.recv(_RECEIVE_BYTES)
        if not data:
            raise CallerError("the server closed the connection")
        received, over, at = self._received + data, False, 0
        while len(received) - at >= _FRAME_HEAD:
            end = at + _FRAME_HEAD + int.from_bytes(received[at : at + 3], "big")
            if end > len(received):
                break
            over |= self._take(received[at + 3], received[at + 4], received[at + _FRAME_HEAD : end])
            at = end
        self._received = received[at:]
        return over

    def version(self) -> int:
        """Returns the version that answered; 0 if the call failed."""
        return pb.PredictResponse.FromString(self._answer[5:]).version if self._answer else 0

    def _take(self, kind: int, flags: int, payload: bytes) -> bool:
        if kind == _DATA:
            self._answer += payload
        elif kind == _SETTINGS and not flags & _ACK:
            self.socket.sendall(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self.socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW:
            self._window += int.from_bytes(payload, "big")  # those of streams, too, but they get none
        elif kind == _GOAWAY:
            raise CallerError("the server goes away")
        elif kind == _RESET:
            return True
        return kind in (_DATA, _HEADERS) and bool(flags & _END_STREAM)


def _connect(address: str) -> socket.socket:
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("unix:"))
        return connection
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _header_block() -> bytes:
    """Returns the headers of a call, each a literal that is not indexed (RFC 7541, section 6.2.2)."""
    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": _PATH,
        b":authority": b"localhost",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    return b"".join(bytes((0, len(name))) + name + bytes((len(value),)) + value for name, value in headers.items())


class _Control:
    """What any process would notice of the machine: a loop, and a byte there and back to another process."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        code = "import socket; s = socket.socket(fileno=0)\nwhile d := s.recv(1): s.send(d)"
        self._echo = subprocess.Popen([sys.executable, "-c", code], stdin=other.fileno())
        other.close()

    def measure(self) -> tuple[int, int]:
        """Returns what the loop took and what the byte took, in nanoseconds."""
        started = time.monotonic_ns()
        for _ in range(_SPINS):
            pass
        spun = time.monotonic_ns()
        self._socket.send(b".")
        self._socket.recv(1)
        return spun - started, time.monotonic_ns() - spun

    def close(self) -> None:
        """Ends the other process."""
        self._socket.close()
        self._echo.wait()


def _call(connections: list[Connection], interval_s: float, control: _Control | None) -> array[int]:
    """Calls until SIGTERM comes, or the parent is gone; returns the fields of all calls."""
    over = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal over
        over = True

    signal.signal(signal.SIGTERM, stop)
    parent, record = os.getppid(), array("q")
    ready = select.epoll()
    by_fd = {connection.fileno(): connection for connection in connections}
    for connection in connections:
        connection.send()
        ready.register(connection.fileno(), select.EPOLLIN)
    due_s = time.monotonic()
    while not over and os.getppid() == parent:
        for fd, _ in ready.poll(1.0):
            connection = by_fd[fd]
            if not connection.receive():
                continue
            took_ns = time.monotonic_ns() - connection.started_ns
            controls = (0, 0) if control is None else control.measure()
            record.extend((connection.started_ns, took_ns, connection.version(), *controls))
            if interval_s:
                due_s = max(due_s + interval_s, time.monotonic())
                time.sleep(max(0.0, due_s - time.monotonic()))
            connection.send()
    return record


def main() -> None:
    """Is the caller's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("request", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--controls", action="store_true")
    options = parser.parse_args()
    request = options.request.read_bytes()
    connections = [Connection(options.address, request) for _ in range(options.connections)]
    control = _Control() if options.controls else None
    gc.collect()
    gc.freeze()
    gc.disable()
    record = _call(connections, options.interval, control)
    with options.output.open("wb") as file:
        record.tofile(file)
    if control is not None:
        control.close()


class Calls(NamedTuple):
    """What a caller measured: arrays of equal length."""

    start_s: NDArray[np.float64]
    """When each call began, by the monotonic clock."""
    took_ms: NDArray[np.float64]
    version: NDArray[np.int64]
    """Who answered; 0 for a failed call."""
    spin_ms: NDArray[np.float64]
    """A loop of fixed length after the call."""
    ping_ms: NDArray[np.float64]
    """A byte to another process and back after the call."""

    def between(self, start_s: float, end_s: float) -> Calls:
        """Returns the calls that began in a stretch of time."""
        inside = (self.start_s >= start_s) & (self.start_s < end_s)
        took, version = self.took_ms[inside], self.version[inside]
        return Calls(self.start_s[inside], took, version, self.spin_ms[inside], self.ping_ms[inside])


class Caller:
    """Calls a server from a process of its own; use it as ``with``.

    Args:
        address: the server.
        request: the message of every call.
        folder: for files.
        connections: how many call, each one after another.
        interval_s: from the start of a call to the start of the next, at least; for one connection.
        controls: measure the machine after every call too.
    """

    def __init__(
        self,
        address: str,
        request: bytes,
        folder: Path,
        *,
        connections: int = 1,
        interval_s: float = 0.0,
        controls: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._output = folder / "calls"
        (folder / "request").write_bytes(request)
        self._command = [sys.executable, "-m", "bench.caller", address, str(folder / "request"), str(self._output)]
        self._command += ["--connections", str(connections), "--interval", str(interval_s)]
        self._command += ["--controls"] if controls else []
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Caller:
        self._process = subprocess.Popen(self._command)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def check(self) -> None:
        """Ends the benchmark if the caller has ended."""
        if self._process is not None and self._process.poll() is not None:
            sys.exit("error: the caller ended, see above")

    def stop(self) -> Calls:
        """Ends the calls and returns them."""
        self.check()
        self.__exit__(None, None, None)
        fields: NDArray[Any] = np.fromfile(self._output, np.int64).reshape(-1, len(FIELDS)).T
        start, took, version, spin, ping = fields
        return Calls(start / 1e9, took / 1e6, version, spin / 1e6, ping / 1e6)


if __name__ == "__main__":
    main()
