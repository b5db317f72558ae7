"""One call: what has come of it, what goes out, and how it ends. What ``grpc.aio`` calls a context."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from modelport_server.http2 import frames, headers

if TYPE_CHECKING:
    from modelport_server.http2.connection import Connection

_aio: Any = grpc.aio
END_OF_STREAM: object = _aio.EOF
"""What ``ServerCall.read`` returns when the caller has closed its side."""

STREAM_WINDOW = 512 * 1024
"""How many bytes of a call may come that its handler has not taken, besides the message that it waits for."""
_PREFIX_BYTES = 5


class CallEndedError(Exception):
    """The call has ended: nothing can be sent any more."""


class ServerCall:
    """A call that a client makes.

    Args:
        connection: where it came from.
        stream: its number there.
        send_window: how many bytes its caller takes.
        half_closed: whether its caller will send nothing.
    """

    __slots__ = (
        "_callbacks",
        "_connection",
        "_credit",
        "_ended",
        "_half_closed",
        "_head_sent",
        "_messages",
        "_on_complete",
        "_outgoing",
        "_partial",
        "_queued",
        "_reader",
        "_room",
        "_send_window",
        "_sent",
        "_stall",
        "_stall_s",
        "_timer",
        "_trailers",
        "_writers",
        "code",
        "deadline",
        "method",
        "stream",
        "task",
    )

    def __init__(self, connection: Connection, stream: int, send_window: int, *, half_closed: bool) -> None:
        self.stream = stream
        self.deadline = math.inf
        """When it expires, on the monotonic clock."""
        self.task: asyncio.Task[None] | None = None
        """Its handler's."""
        self.method = ""
        """Its path, if the server has such a method."""
        self.code = grpc.StatusCode.CANCELLED
        """What its caller is told at the end; CANCELLED if it gave up before."""
        self._connection = connection
        self._half_closed = half_closed
        self._room = STREAM_WINDOW
        """How many more bytes the caller may send."""
        self._credit = 0
        """How many bytes have come for which it was not given room again."""
        self._partial = bytearray()
        """The beginning of a message."""
        self._messages: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._on_complete: Callable[[ServerCall], None] | None = None
        self._send_window = send_window
        self._outgoing: deque[memoryview] = deque()
        self._queued = 0
        self._sent = 0
        """How many bytes of those that had to be queued have been sent."""
        self._writers: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._head_sent = False
        self._trailers = b""
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._stall_s = math.inf
        self._callbacks: list[Callable[[Any], None]] = []

    # What comes.

    def on_data(self, buffer: bytes, first: int, after: int, size: int, *, ended: bool) -> None:
        """Takes a part of what the caller sends.

        Args:
            buffer: where it lies.
            first: its first byte.
            after: the first byte that is not of it.
            size: how much of the caller's window it took.
            ended: whether it was the last one.
        """
        if self._half_closed:
            self._connection.spend(1)
            self.fail(grpc.StatusCode.INTERNAL, "the caller went on after its end")
            return
        self._room -= size
        self._credit += size
        if self._room < 0:
            self._connection.spend(1)
            self.reset(frames.FLOW_CONTROL_ERROR)
            return
        if after > first:
            if not self._partial and self._is_whole(buffer, first, after):
                self._messages.append(buffer[first + _PREFIX_BYTES : after])
            else:
                self._partial += buffer[first:after]
                self._take_messages()
            if self._on_complete is not None and len(self._messages) > 1:
                self.fail(grpc.StatusCode.INTERNAL, "the call has more messages than the one that is wanted")
            if self._ended:
                return
        if ended:
            self._half_closed = True
            if self._partial:
                self.fail(grpc.StatusCode.INTERNAL, "the caller ended within a message")
                return
            if self._on_complete is not None:
                self._on_complete(self)
                return
        else:
            self._give_credit()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _is_whole(self, buffer: bytes, first: int, after: int) -> bool:
        """Whether it is one message, neither more nor less, that may be taken as it is."""
        size = after - first - _PREFIX_BYTES
        prefix = buffer[first : first + _PREFIX_BYTES]
        return 0 <= size <= self._connection.calls.max_message_bytes and prefix == b"\0" + size.to_bytes(4, "big")

    def _take_messages(self) -> None:
        """Takes whole messages out of what has come; ends the call if one can't be taken."""
        while len(self._partial) >= _PREFIX_BYTES:
            size = int.from_bytes(self._partial[1:_PREFIX_BYTES], "big")
            most = self._connection.calls.max_message_bytes
            if self._partial[0]:
                self.fail(grpc.StatusCode.INTERNAL, "a message is compressed, and the headers do not say how")
                return
            if size > most:
                text = f"SERVER: Received message larger than max ({size} vs. {most})"
                self.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
                return
            if len(self._partial) < _PREFIX_BYTES + size:
                return
            with memoryview(self._partial) as view:
                self._messages.append(bytes(view[_PREFIX_BYTES : _PREFIX_BYTES + size]))
            del self._partial[: _PREFIX_BYTES + size]

    def _give_credit(self) -> None:
        """Lets the caller send more, unless a whole message waits to be read."""
        if self._credit >= STREAM_WINDOW // 2 and not self._messages and not self._half_closed and not self._ended:
            self._connection.send(frames.window_update(self.stream, self._credit))
            self._room += self._credit
            self._credit = 0

    def when_complete(self, callback: Callable[[ServerCall], None]) -> None:
        """Has ``callback`` called once the caller has sent all that it will."""
        if self._half_closed:
            callback(self)
        else:
            self._on_complete = callback

    def take_all(self) -> list[bytes]:
        """Returns the messages that are there."""
        messages = list(self._messages)
        self._messages.clear()
        return messages

    async def read(self) -> Any:
        """Returns the next message, or ``END_OF_STREAM``.

        Raises:
            asyncio.CancelledError: if the call has ended, before or meanwhile.
        """
        while not self._messages:
            if self._ended:
                raise asyncio.CancelledError
            if self._half_closed:
                return END_OF_STREAM
            self._reader = self._connection.loop.create_future()
            await self._reader
        message = self._messages.popleft()
        self._give_credit()
        return message

    # What goes out.

    async def write(self, message: bytes, *, stall_s: float = math.inf) -> None:
        """Sends a message; returns once it is on its way.

        Args:
            message: what is sent.
            stall_s: how long it may wait for its caller to read before the call is ended, in seconds, if that is less
                than the server's own limit.

        Raises:
            CallEndedError: if the call has ended, before or meanwhile.
        """
        sent = self.send(message)
        if sent is not None:
            self._limit(stall_s)
            try:
                await sent
            finally:
                self._unlimit()

    def send(self, message: bytes) -> asyncio.Future[None] | None:
        """Sends a message; returns what is done once it is on its way, or None if it is already.

        Raises:
            CallEndedError: if the call has ended; what is returned raises it, too.
        """
        if self._ended:
            raise CallEndedError("the call has ended")
        self._send(message)
        if not self._outgoing:
            return None
        sent = self._connection.loop.create_future()
        self._writers.append((self._queued, sent))
        return sent

    def answer(self, message: bytes) -> None:
        """Sends the only message and ends the call well."""
        if not self._ended:
            self.code = grpc.StatusCode.OK
            self._send(message, headers.OK)

    def _send(self, message: bytes, trailers: bytes = b"") -> None:
        size = len(message)
        prefix = b"\0" + size.to_bytes(4, "big")
        size += _PREFIX_BYTES
        connection = self._connection
        room = min(self._send_window, connection.send_window, connection.largest_frame)
        if self._outgoing or size > room or not connection.takes_data:
            self._outgoing += (memoryview(piece) for piece in (prefix, message) if piece)
            self._queued += size
            if trailers:
                self._trailers = trailers
                self._limit()
            connection.send_all_of(self)
            return
        self._send_window -= size
        connection.send_window -= size
        parts = [self._head(), frames.head(size, frames.DATA, 0, self.stream), prefix, message]
        if trailers:
            parts.append(self._last(trailers))
        connection.send(b"".join(parts))
        connection.sent_data()
        if trailers:
            self._close()

    @property
    def may_send(self) -> bool:
        """Whether there is something to send, and its caller takes more."""
        return bool(self._outgoing) and self._send_window > 0

    def send_some(self) -> None:
        """Sends a frame, if it may."""
        connection = self._connection
        room = min(self._send_window, connection.send_window, connection.largest_frame, self._queued - self._sent)
        if room <= 0:
            return
        self._send_window -= room
        connection.send_window -= room
        self._sent += room
        pieces: list[bytes | memoryview] = [self._head() + frames.head(room, frames.DATA, 0, self.stream)]
        while room:
            piece = self._outgoing.popleft()
            if len(piece) > room:
                self._outgoing.appendleft(piece[room:])
                piece = piece[:room]
            pieces.append(piece)
            room -= len(piece)
        connection.send(*pieces)
        connection.sent_data()
        while self._writers and self._writers[0][0] <= self._sent:
            _, sent = self._writers.popleft()
            if not sent.done():
                sent.set_result(None)
        if not self._outgoing and self._trailers:
            self._finish(self._trailers)
        elif self._outgoing and self._stall is not None:  # it does read, if slowly
            self._unlimit()
            self._limit(self._stall_s)

    def widen(self, size: int) -> bool:
        """Takes note that the caller takes so many more bytes; fewer, if it is negative. Returns whether it may."""
        self._send_window += size
        return self._send_window <= frames.MAX_WINDOW

    def _head(self) -> bytes:
        """Returns the headers, if they have not been sent."""
        if self._head_sent:
            return b""
        self._head_sent = True
        return frames.frame(frames.HEADERS, frames.END_HEADERS, self.stream, headers.HEAD)

    def _last(self, trailers: bytes) -> bytes:
        block = trailers if self._head_sent else headers.HEAD + trailers
        self._head_sent = True
        last = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, self.stream, block)
        return last if self._half_closed else last + frames.reset(self.stream, frames.NO_ERROR)

    # How it ends.

    def end(self) -> None:
        """Ends the call well, once what was written is on its way."""
        if self._ended:
            return
        self.code = grpc.StatusCode.OK
        if self._outgoing:
            self._trailers = headers.OK
            self._limit()
        else:
            self._finish(headers.OK)

    def fail(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        """Ends the call with a status; what was written and is not on its way is dropped."""
        if not self._ended:
            self.code = code
            self._finish(headers.trailers(code, details, metadata))
            self._cancel_handler()

    def refuse(self, http_status: int) -> None:
        """Answers what is no call of gRPC."""
        flags = frames.END_HEADERS | frames.END_STREAM
        last = frames.frame(frames.HEADERS, flags, self.stream, headers.plain(http_status))
        self._connection.send(last if self._half_closed else last + frames.reset(self.stream, frames.NO_ERROR))
        self._close()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Ends the call with a status; raises, so that its handler ends.

        Raises:
            grpc.aio.AbortError: always.
        """
        if not self._ended:
            self.code = code
            self._finish(headers.trailers(code, details, tuple(trailing_metadata)))
        raise _aio.AbortError

    def give_up(self) -> None:
        """Ends a call whose caller does not want it any more, or is gone."""
        if not self._ended:
            self.code = grpc.StatusCode.CANCELLED
            self._close()
            self._cancel_handler()

    def expire_in(self, duration_s: float) -> None:
        """Has the call end after so many seconds, if it has not by then."""
        self.deadline = monotonic() + duration_s
        self._timer = self._connection.loop.call_later(duration_s, self._expire)

    def _expire(self) -> None:
        self.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _finish(self, trailers: bytes) -> None:
        self._drop_outgoing()  # first: to write may have calls go on that were held back
        self._connection.send(self._last(trailers))
        self._close()

    def _drop_outgoing(self) -> None:
        self._outgoing.clear()
        self._sent = self._queued

    def _limit(self, stall_s: float = math.inf) -> None:
        """Ends the call if what is to be sent has to wait for too long."""
        if self._stall is None:
            self._stall_s = min(stall_s, self._connection.calls.stall_s)
            self._stall = self._connection.loop.call_later(self._stall_s, self._on_stall)

    def _unlimit(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _on_stall(self) -> None:
        self.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, f"answers were not read for {self._stall_s:g} s")

    def reset(self, code: int) -> None:
        """Ends the call without a status."""
        self._drop_outgoing()
        self._connection.send(frames.reset(self.stream, code))
        self.give_up()

    def _cancel_handler(self) -> None:
        if self.task is not None and not self.task.done() and self.task is not asyncio.current_task():
            self._connection.count_unfinished(1)
            self.task.add_done_callback(lambda _: self._connection.count_unfinished(-1))
            self.task.cancel()

    def _close(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unlimit()
        self._messages.clear()
        self._partial.clear()
        self._drop_outgoing()
        self._on_complete = None
        if self._reader is not None:
            self._reader.cancel()
        while self._writers:
            _, sent = self._writers.popleft()
            if not sent.done():
                sent.set_exception(CallEndedError("the call has ended"))
                sent.exception()  # seen, though nobody may be left to hear of it
        self._connection.forget(self)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    # What handlers ask.

    @property
    def ended(self) -> bool:
        """Whether its caller has been told how it ended, or has given it up."""
        return self._ended

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Has ``callback`` called once the call has ended; at once if it has."""
        if self._ended:
            callback(self)
        else:
            self._callbacks.append(callback)

    def peer(self) -> str:
        """Returns who calls, as gRPC names it: ``ipv4:ADDRESS:PORT``, ``ipv6:[ADDRESS]:PORT`` or ``unix:``."""
        return self._connection.peer

    def time_remaining(self) -> float | None:
        """Returns the seconds until the call's deadline; None if it has none."""
        return None if self.deadline == math.inf else max(0.0, self.deadline - monotonic())
