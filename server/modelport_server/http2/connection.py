"""One connection: frames in, frames out, and how much of either there may be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol, cast

from modelport_server.http2 import frames, headers
from modelport_server.http2.call import STREAM_WINDOW, ServerCall
from modelport_server.http2.frames import ProtocolError
from modelport_server.http2.headers import HeaderReader, RequestHead

_log = logging.getLogger(__name__)

CONNECTION_WINDOW = 16 * 1024 * 1024
"""How many bytes of all calls may be on their way."""
FRAME_BYTES = 128 * 1024
"""The largest frame that is taken."""
_WRITE_BUFFER_BYTES = 256 * 1024
_FLUSHED_BYTES = 64 * 1024
"""What is not kept until the end of the event loop's turn."""
_UNREAD_BYTES = 4 * 1024 * 1024
"""The most bytes that wait for a peer which goes on asking but does not read."""
_HANDSHAKE_S = 20.0
_CALM = 10_000.0
"""How often a peer may ask for what costs the server something and brings nobody an answer, in a burst."""
_CALM_PER_S = 2_000.0
"""And how often in a second for long."""
_CALM_FOR_DATA = 2.0
"""How much of that each frame of an answer gives back: its caller may ask for a sign of life, and gives room again."""
_RESET_COST = 3.0
"""How much of it a call costs that is given up."""
_CLOSING_S = 1.0
"""How long a peer may take to read the rest once a connection is at its end."""
_DRAIN_PING = b"draining"
_ALIVE_PING = b"alive..?"


class Calls(Protocol):
    """Who answers: the server."""

    keepalive_s: float
    """After how long a silent peer is asked whether it is there, in seconds."""
    keepalive_timeout_s: float
    """How long that may take, in seconds."""
    max_streams: int
    """How many calls a connection may have at once."""
    max_message_bytes: int
    """The largest message that is taken."""
    stall_s: float
    """How long an answer may wait for its caller to read, in seconds."""

    def begin(self, call: ServerCall, head: RequestHead) -> None:
        """Begins a call."""
        ...

    def add(self, connection: Connection) -> None:
        """Takes note of a connection."""
        ...

    def discard(self, connection: Connection) -> None:
        """Takes note that it is gone."""
        ...


class Connection(asyncio.Protocol):
    """One client's connection.

    Args:
        calls: who answers.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.loop = asyncio.get_running_loop()
        self.peer = ""
        self.send_window = frames.DEFAULT_WINDOW
        self.largest_frame = frames.DEFAULT_FRAME_BYTES
        self.open: dict[int, ServerCall] = {}
        self._initial_window = frames.DEFAULT_WINDOW
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._started = False
        self._headers = HeaderReader()
        self._block: tuple[int, int, bytearray] | None = None
        """A stream, its flags, and the part of its headers that has come."""
        self._last_stream = 0
        self._uncredited = 0
        self._received = frames.DEFAULT_WINDOW
        """How many more bytes the peer may send."""
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._flushing = False
        self._paused = False
        self._waiting: dict[ServerCall, None] = {}
        """Those that have something to send, and room for it in their own windows."""
        self._unfinished = 0
        """How many calls that their callers gave up are still being taken down."""
        self._heard = False
        self._timer: asyncio.TimerHandle | None = None
        self.draining = False
        """Whether its peer was asked to make no more calls here."""
        self._final_stream: int | None = None
        """The last stream that is taken, once that is settled."""
        self.refusing: asyncio.Future[None] = self.loop.create_future()
        """Done once it takes no more calls."""
        self._ended = False
        self._calm = _CALM
        self._calm_at = self.loop.time()
        self.closed: asyncio.Future[None] = self.loop.create_future()
        """Done once the connection is gone."""
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            frames.RST_STREAM: self._on_reset,
            frames.SETTINGS: self._on_settings,
            frames.PUSH_PROMISE: self._on_push,
            frames.PING: self._on_ping,
            frames.WINDOW_UPDATE: self._on_window,
            frames.CONTINUATION: self._on_continuation,
        }
        """By kinds of frames; what others say means nothing to a server."""

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greets the peer."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self.peer = _peer_of(transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self.calls.add(self)
        self.send(
            frames.settings(
                {
                    frames.MAX_CONCURRENT_STREAMS: self.calls.max_streams,
                    frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                    frames.MAX_FRAME_SIZE: FRAME_BYTES,
                    frames.MAX_HEADER_LIST_SIZE: headers.MAX_LIST_BYTES,
                }
            )
            + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        )
        self._received = CONNECTION_WINDOW
        self._timer = self.loop.call_later(_HANDSHAKE_S, self._on_silence)

    def data_received(self, data: bytes) -> None:
        """Takes frames apart."""
        if self._ended:
            return
        self._heard = True
        buffer = self._buffer + data if self._buffer else data
        try:
            self._buffer = buffer[self._take(buffer) :]
        except ProtocolError as error:
            _log.debug("%s: %s", self.peer, error)
            self.end(error.code, str(error))
        except Exception:
            _log.exception("%s: its frames could not be taken apart", self.peer)
            self.end(frames.INTERNAL_ERROR, "internal error")

    def pause_writing(self) -> None:
        """Keeps answers back: the peer does not read what there is."""
        self._paused = True

    def resume_writing(self) -> None:
        """Goes on answering."""
        self._paused = False
        self.send_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives up all calls."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        for call in list(self.open.values()):
            call.give_up()
        self.open.clear()
        self._waiting.clear()
        self._out.clear()
        self.calls.discard(self)
        for done in (self.refusing, self.closed):
            if not done.done():
                done.set_result(None)

    # What comes in.

    def _take(self, buffer: bytes) -> int:
        """Handles whole frames and returns how many bytes they had."""
        start, end = 0, len(buffer)
        if not self._started:
            if not frames.PREFACE.startswith(buffer[: len(frames.PREFACE)]):
                raise ProtocolError(frames.PROTOCOL_ERROR, "this is no HTTP/2")
            if end < len(frames.PREFACE):
                return 0
            self._started = True
            self._keep_alive()
            start = len(frames.PREFACE)
        while end - start >= frames.HEAD_BYTES and not self._ended:
            length = buffer[start] << 16 | buffer[start + 1] << 8 | buffer[start + 2]
            if length > FRAME_BYTES:
                raise ProtocolError(frames.FRAME_SIZE_ERROR, "a frame that is too large")
            first = start + frames.HEAD_BYTES
            after = first + length
            if after > end:
                break
            kind, flags = buffer[start + 3], buffer[start + 4]
            stream = int.from_bytes(buffer[start + 5 : first], "big") & frames.MAX_STREAM
            if self._block is not None and kind != frames.CONTINUATION:
                raise ProtocolError(frames.PROTOCOL_ERROR, "headers that do not go on")
            if kind == frames.DATA:
                self._on_data(stream, flags, buffer, first, after)
            elif kind == frames.HEADERS:
                self._on_headers(stream, flags, buffer[first:after])
            elif (handler := self._handlers.get(kind)) is not None:
                handler(stream, flags, buffer[first:after])
            start = after
        return start

    def _on_data(self, stream: int, flags: int, buffer: bytes, first: int, after: int) -> None:
        length = after - first
        self._received -= length
        if self._received < 0:
            raise ProtocolError(frames.FLOW_CONTROL_ERROR, "more bytes than there is room for")
        self._uncredited += length
        if self._uncredited >= CONNECTION_WINDOW // 2:
            self.send(frames.window_update(0, self._uncredited))
            self._received += self._uncredited
            self._uncredited = 0
        if not length and not flags & frames.END_STREAM:
            self.spend(1)
        padding = 0
        if flags & frames.PADDED:
            if not length or (padding := buffer[first]) >= length:
                raise ProtocolError(frames.PROTOCOL_ERROR, "more padding than there are bytes")
            first += 1
        call = self.open.get(stream)
        if call is not None:
            call.on_data(buffer, first, after - padding, length, ended=bool(flags & frames.END_STREAM))
        elif not stream or stream > self._last_stream:
            raise ProtocolError(frames.PROTOCOL_ERROR, "data before headers")

    def _on_headers(self, stream: int, flags: int, payload: bytes) -> None:
        if not stream % 2:
            raise ProtocolError(frames.PROTOCOL_ERROR, "a stream that clients don't open")
        if flags & (frames.PADDED | frames.WITH_PRIORITY):
            payload = _unpadded(flags, payload)
        if flags & frames.END_HEADERS:
            self._on_block(stream, flags, payload)
        else:
            _check_size(payload)
            self._block = stream, flags, bytearray(payload)

    def _on_continuation(self, stream: int, flags: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream:
            raise ProtocolError(frames.PROTOCOL_ERROR, "headers that go on without a beginning")
        _, first_flags, block = self._block
        block += payload
        self.spend(1)
        _check_size(block)
        if flags & frames.END_HEADERS:
            self._block = None
            self._on_block(stream, first_flags, bytes(block))

    def _on_block(self, stream: int, flags: int, block: bytes) -> None:
        _check_size(block)
        head = self._headers.read(block)  # in any case: later ones build on it
        if stream <= self._last_stream:
            self.spend(1)
            call = self.open.get(stream)
            if call is not None:  # trailers, which say nothing to a server
                call.on_data(b"", 0, 0, 0, ended=True)
            return
        self._last_stream = stream
        most = self.calls.max_streams
        if self.refusing.done() or len(self.open) >= most or len(self.open) + self._unfinished >= 2 * most:
            self.spend(1)
            self.send(frames.reset(stream, frames.REFUSED_STREAM))
            return
        call = ServerCall(self, stream, self._initial_window, half_closed=bool(flags & frames.END_STREAM))
        self.open[stream] = call
        self.calls.begin(call, head)

    def _on_reset(self, stream: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(frames.FRAME_SIZE_ERROR, "RST_STREAM of a wrong length")
        if not stream or stream > self._last_stream:
            raise ProtocolError(frames.PROTOCOL_ERROR, "a reset before headers")
        call = self.open.pop(stream, None)
        if call is not None:
            call.give_up()
        self.spend(1 if call is None else _RESET_COST)

    def _on_settings(self, stream: int, flags: int, payload: bytes) -> None:
        if stream:
            raise ProtocolError(frames.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & frames.ACK:
            return
        self.spend(1 + len(self.open) / 100)  # each has to be gone through
        for name, value in dict(frames.read_settings(payload)).items():
            if name == frames.INITIAL_WINDOW_SIZE:
                if not all(call.widen(value - self._initial_window) for call in self.open.values()):
                    raise ProtocolError(frames.FLOW_CONTROL_ERROR, "a window that is too large")
                self._initial_window = value
            elif name == frames.MAX_FRAME_SIZE:
                self.largest_frame = min(value, FRAME_BYTES)
        # First: a peer counts what comes before as under its old settings, and would not take it.
        self.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        for call in list(self.open.values()):
            self.send_all_of(call)

    def _on_push(self, stream: int, flags: int, payload: bytes) -> None:
        raise ProtocolError(frames.PROTOCOL_ERROR, "a push from a client")

    def _on_ping(self, stream: int, flags: int, payload: bytes) -> None:
        if stream or len(payload) != 8:
            raise ProtocolError(frames.PROTOCOL_ERROR, "a PING that can't be")
        if not flags & frames.ACK:
            self.spend(1)
            self.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == _DRAIN_PING and self.draining:
            self._refuse()

    def _on_window(self, stream: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong length")
        self.spend(0.5)
        size = int.from_bytes(payload, "big") & frames.MAX_WINDOW
        if not stream:
            self.send_window += size
            if not size:
                raise ProtocolError(frames.PROTOCOL_ERROR, "a window that does not grow")
            if self.send_window > frames.MAX_WINDOW:
                raise ProtocolError(frames.FLOW_CONTROL_ERROR, "a window that is too large")
            self.send_waiting()
        elif (call := self.open.get(stream)) is not None:
            if not size:
                call.reset(frames.PROTOCOL_ERROR)
            elif not call.widen(size):
                call.reset(frames.FLOW_CONTROL_ERROR)
            else:
                self.send_all_of(call)
        elif stream > self._last_stream:
            raise ProtocolError(frames.PROTOCOL_ERROR, "a window before headers")

    def spend(self, cost: float) -> None:
        """Counts what a peer asks for; one that asks for too much of what brings no answer has to go."""
        self._calm -= cost
        if self._calm < 0:
            now = self.loop.time()
            self._calm = min(_CALM, self._calm + (now - self._calm_at) * _CALM_PER_S)
            self._calm_at = now
            if self._calm < 0:
                raise ProtocolError(frames.ENHANCE_YOUR_CALM, "too many frames that bring nothing")

    # What goes out.

    def send(self, *pieces: bytes | memoryview) -> None:
        """Sends frames, together with others of this turn of the event loop; the pieces of one belong into one call.

        To write may have other calls go on, whose frames must not come between.
        """
        if self._ended:
            return
        self._out += pieces
        self._out_bytes += sum(map(len, pieces))
        if self._out_bytes >= _FLUSHED_BYTES:
            self._flush()  # which says when there are too many
            if self._paused and self.unsent_bytes > _UNREAD_BYTES:
                self.abort()
        elif not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush_turn)

    def _flush_turn(self) -> None:
        self._flushing = False
        self._flush()

    def _flush(self) -> None:
        out, self._out, self._out_bytes = self._out, [], 0  # first: to write may call resume_writing
        if out and self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(out)

    @property
    def unsent_bytes(self) -> int:
        """How much waits for its peer to read."""
        return self._out_bytes + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    @property
    def takes_data(self) -> bool:
        """Whether data may be sent at all."""
        return self.send_window > 0 and not self._paused and not self._ended

    def sent_data(self) -> None:
        """Takes note that a frame of an answer has gone out."""
        self._calm = min(_CALM, self._calm + _CALM_FOR_DATA)

    def send_all_of(self, call: ServerCall) -> None:
        """Lets a call send what it has, now or once there is room for it."""
        if call.may_send:
            self._waiting.setdefault(call)
            self.send_waiting()

    def send_waiting(self) -> None:
        """Lets those that wait send a frame each, in turns, while there is room."""
        while self._waiting and self.takes_data:
            call = next(iter(self._waiting))
            del self._waiting[call]
            call.send_some()
            if call.may_send:
                self._waiting[call] = None

    def forget(self, call: ServerCall) -> None:
        """Lets go of a call that has ended, or that can't be answered any more."""
        self.open.pop(call.stream, None)
        self._waiting.pop(call, None)
        if self.refusing.done() and not self.open:
            self.end(frames.NO_ERROR, "")

    def count_unfinished(self, change: int) -> None:
        """Counts a call that was given up, and whose handler has not ended."""
        self._unfinished += change

    # How it ends.

    def _keep_alive(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._heard = False
        self._timer = self.loop.call_later(self.calls.keepalive_s, self._on_quiet)

    def _on_quiet(self) -> None:
        if self._heard:
            self._keep_alive()
            return
        self.send(frames.frame(frames.PING, 0, 0, _ALIVE_PING))
        self._timer = self.loop.call_later(self.calls.keepalive_timeout_s, self._on_silence)

    def _on_silence(self) -> None:
        if self._heard and self._started:
            self._keep_alive()
        else:
            self.abort()

    def drain(self) -> None:
        """Asks the peer to open no more calls here; those that are on their way are taken."""
        if self.draining or self._ended:
            return
        self.draining = True
        self.send(frames.goaway(frames.MAX_STREAM, frames.NO_ERROR) + frames.frame(frames.PING, 0, 0, _DRAIN_PING))

    def _refuse(self) -> None:
        """Takes no more calls, and closes the connection once those that it has are answered."""
        if not self.refusing.done() and not self._ended:
            self.refusing.set_result(None)
            self._final_stream = self._last_stream
            self.send(frames.goaway(self._last_stream, frames.NO_ERROR))
            if not self.open:
                self.end(frames.NO_ERROR, "")

    def end(self, code: int, text: str) -> None:
        """Closes the connection once what was sent has gone out."""
        if self._ended or self._transport is None:
            return
        last = self._last_stream if self._final_stream is None else self._final_stream
        self._out.append(frames.goaway(last, code, text))
        self._flush()
        self._ended = True
        for call in list(self.open.values()):
            call.give_up()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_CLOSING_S, self.abort)
        if code == frames.NO_ERROR and self._transport.can_write_eof():
            self._transport.write_eof()  # closed at once it would cut off what its peer has not read yet
        else:
            self._transport.close()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._ended = True
        if self._transport is not None:
            self._transport.abort()


def _check_size(block: bytes | bytearray) -> None:
    if len(block) > headers.MAX_BLOCK_BYTES:
        raise ProtocolError(frames.ENHANCE_YOUR_CALM, "headers that are too large")


def _unpadded(flags: int, payload: bytes) -> bytes:
    start = padding = 0
    if flags & frames.PADDED:
        padding = payload[0] if payload else 0
        start = 1
    if flags & frames.WITH_PRIORITY:
        start += 5
    if start + padding > len(payload):
        raise ProtocolError(frames.PROTOCOL_ERROR, "more padding than there are bytes")
    return payload[start : len(payload) - padding]


def _peer_of(transport: asyncio.BaseTransport) -> str:
    """Returns who calls, as gRPC names it."""
    name: Any = transport.get_extra_info("peername")
    if not name or isinstance(name, (str, bytes)):
        return "unix:"
    host, port = str(name[0]), int(name[1])
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
