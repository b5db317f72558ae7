"""HTTP/2's windows, with a peer that counts as strictly as one may: nothing too early, nothing held back for ever."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import cycle
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport_server.http2 import call as calls
from modelport_server.http2 import connection, frames
from modelport_server.http2.call import END_OF_STREAM, ServerCall
from modelport_server.http2.connection import Connection
from modelport_server.http2.headers import RequestHead
from tests.support.http2 import RawClient, prefixed

STREAMS = (1, 3, 5)
ROOM = 100_000
"""Of a connection and of a call of this server, in bytes; far fewer than it has, to be used up soon."""
FRAME_BYTES = 128 * 1024
"""The largest frame that the peer takes."""
HIGH, LOW = 30_000, 7_000
"""When a transport asks for less, and for more."""


class Calls:
    """Who answers: nobody, by itself."""

    keepalive_s = keepalive_timeout_s = stall_s = 1e6
    max_streams = 100
    max_message_bytes = 1 << 30

    def __init__(self) -> None:
        self.begun: dict[int, ServerCall] = {}

    def begin(self, call: ServerCall, head: RequestHead) -> None:
        self.begun[call.stream] = call

    def add(self, connection: Connection) -> None:
        pass

    def discard(self, connection: Connection) -> None:
        pass


class Wire:
    """A transport that delivers when it is told to, and with each write as much as it is told to, in turns."""

    def __init__(self, at_once: list[int]) -> None:
        self.protocol: Connection | None = None
        self.delivered = bytearray()
        self._at_once = cycle(at_once)
        self._kept = bytearray()
        self._paused = False

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return "127.0.0.1", 1

    def get_write_buffer_size(self) -> int:
        return len(self._kept)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        raise AssertionError("the server found fault with a peer that made none")

    abort = close

    def writelines(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._kept += b"".join(pieces)
        self.deliver(next(self._at_once))

    def deliver(self, size: int) -> None:
        self.delivered += self._kept[:size]
        del self._kept[:size]
        assert self.protocol is not None
        if len(self._kept) > HIGH and not self._paused:
            self._paused = True
            self.protocol.pause_writing()
        elif len(self._kept) <= LOW and self._paused:
            self._paused = False
            self.protocol.resume_writing()


class Peer:
    """A client that takes nothing which it has not made room for, by what the server has acknowledged."""

    def __init__(self, at_once: list[int]) -> None:
        self.calls = Calls()
        self.wire = Wire(at_once)
        self.server = Connection(self.calls)
        self.wire.protocol = self.server
        self.server.connection_made(cast("Any", self.wire))
        self.ended: set[int] = set()
        self.received: defaultdict[int, bytes] = defaultdict(bytes)
        self.sent: defaultdict[int, int] = defaultdict(int)
        """How many bytes the server was given to send, by stream."""
        self.waiting: defaultdict[int, bytes] = defaultdict(bytes)
        """What is still to be sent to the server."""
        self.got: defaultdict[int, list[int]] = defaultdict(list)
        """How long the messages were that the server read."""
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._unacknowledged: deque[int] = deque()
        self._initial = frames.DEFAULT_WINDOW
        self._windows: dict[int, int] = dict.fromkeys((0, *STREAMS), frames.DEFAULT_WINDOW)
        self._theirs: dict[int, int] = dict.fromkeys((0, *STREAMS), frames.DEFAULT_WINDOW)
        head = RawClient(cast("Any", None), cast("Any", None)).block
        self.server.data_received(frames.PREFACE + frames.settings({frames.MAX_FRAME_SIZE: FRAME_BYTES}))
        self._unacknowledged.append(self._initial)
        for stream in STREAMS:
            self.server.data_received(frames.frame(frames.HEADERS, frames.END_HEADERS, stream, head()))

    def set_window(self, size: int) -> None:
        self._unacknowledged.append(size)
        self.server.data_received(frames.settings({frames.INITIAL_WINDOW_SIZE: size}))

    def grow(self, stream: int, size: int) -> None:
        self._windows[stream] += size
        self.server.data_received(frames.window_update(stream, size))

    def answer(self, stream: int, size: int) -> None:
        message = bytes([stream]) * size
        self.sent[stream] += len(prefixed(message))
        self.calls.begun[stream].send(message)

    def ask(self, stream: int, size: int) -> None:
        self.waiting[stream] += prefixed(bytes(size))

    async def _read(self, call: ServerCall) -> None:
        while (message := await call.read()) is not END_OF_STREAM:
            self.got[call.stream].append(len(message))

    def begin_reading(self, stream: int) -> None:
        if stream not in self._readers:
            self._readers[stream] = asyncio.get_running_loop().create_task(self._read(self.calls.begun[stream]))

    def push(self) -> bool:
        """Sends what the server has room for; returns whether that was anything."""
        pushed = False
        for stream in STREAMS:
            while (piece := self.waiting[stream][: self._room(stream)]) != b"":
                self.waiting[stream] = self.waiting[stream][len(piece) :]
                self._theirs[stream] -= len(piece)
                self._theirs[0] -= len(piece)
                self.server.data_received(frames.frame(frames.DATA, 0, stream, piece))
                pushed = True
        return pushed

    def _room(self, stream: int) -> int:
        return max(min(self._theirs[0], self._theirs[stream], frames.DEFAULT_FRAME_BYTES), 0)

    def take(self) -> None:
        """Takes in what has been delivered."""
        data = self.wire.delivered
        while len(data) >= frames.HEAD_BYTES:
            after = frames.HEAD_BYTES + int.from_bytes(data[:3], "big")
            if len(data) < after:
                return
            payload = bytes(data[frames.HEAD_BYTES : after])
            kind, flags, stream = data[3], data[4], int.from_bytes(data[5:9], "big")
            del data[:after]
            self._take(kind, flags, stream, payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.DATA:
            assert len(payload) <= min(self._windows[0], self._windows[stream], FRAME_BYTES)
            self._windows[0] -= len(payload)
            self._windows[stream] -= len(payload)
            self.received[stream] += payload
        elif kind == frames.HEADERS:
            if flags & frames.END_STREAM:
                self.ended.add(stream)
        elif kind == frames.SETTINGS and flags & frames.ACK:
            new = self._unacknowledged.popleft()
            for one in STREAMS:
                self._windows[one] += new - self._initial
            self._initial = new
        elif kind == frames.SETTINGS:
            theirs = dict(frames.read_settings(payload))[frames.INITIAL_WINDOW_SIZE]
            for one in STREAMS:
                self._theirs[one] += theirs - frames.DEFAULT_WINDOW
        else:
            assert kind == frames.WINDOW_UPDATE
            self._theirs[stream] += int.from_bytes(payload, "big")

    async def settle(self, *, pushing: bool = False) -> None:
        """Delivers everything until nothing more comes."""
        quiet = 0
        while quiet < 3:
            before = sum(map(len, self.received.values()))
            self.wire.deliver(1 << 30)
            self.take()
            pushed = pushing and self.push()
            await asyncio.sleep(0)
            quiet = 0 if pushed or sum(map(len, self.received.values())) > before else quiet + 1

    async def finish(self) -> None:
        """Makes room for all that there is, and checks that it comes."""
        for stream in STREAMS:
            self.begin_reading(stream)
        self.set_window(frames.DEFAULT_WINDOW)
        for stream in (*STREAMS, 0):
            self.grow(stream, 10_000_000)
        await self.settle(pushing=True)
        assert not any(self.waiting.values())
        for stream in STREAMS:
            self.server.data_received(frames.frame(frames.DATA, frames.END_STREAM, stream))
        await asyncio.gather(*self._readers.values())
        for call in self.calls.begun.values():
            call.end()
        await self.settle()
        self.server.connection_lost(None)


Step = tuple[str, int, int, int | None]
"""What happens, to which stream, its size, and how many bytes are delivered after a turn of the event loop."""


def steps() -> st.SearchStrategy[list[Step]]:
    streams = st.sampled_from(STREAMS)
    sizes = st.sampled_from((0, 10, 1_000, 30_000, 90_000))
    delivered = st.sampled_from((None, 0, 5_000, 1 << 30, 1 << 30))
    step = st.one_of(
        st.tuples(st.just("answer"), streams, sizes, delivered),
        st.tuples(st.just("ask"), streams, sizes, delivered),
        st.tuples(st.just("grow"), st.sampled_from((0, *STREAMS)), st.sampled_from((1, 1_000, 50_000)), delivered),
        st.tuples(st.just("window"), st.just(0), st.sampled_from((0, 1, 100, 20_000, 70_000, 500_000)), delivered),
        st.tuples(st.just("read"), streams, st.just(0), delivered),
    )
    return st.lists(step, min_size=1, max_size=30)


async def _go(todo: list[Step], at_once: list[int]) -> None:
    peer = Peer(at_once)
    asked: defaultdict[int, list[int]] = defaultdict(list)
    for what, stream, size, delivered in todo:
        if what == "answer":
            peer.answer(stream, size)
        elif what == "ask":
            asked[stream].append(size)
            peer.ask(stream, size)
        elif what == "grow":
            peer.grow(stream, size)
        elif what == "window":
            peer.set_window(size)
        else:
            peer.begin_reading(stream)
        if delivered is not None:
            await asyncio.sleep(0)
            peer.wire.deliver(delivered)
            peer.take()
            peer.push()
    await peer.finish()
    for stream in STREAMS:
        answers = [size for what, one, size, _ in todo if (what, one) == ("answer", stream)]
        assert peer.received[stream] == b"".join(prefixed(bytes([stream]) * size) for size in answers)
        assert peer.got[stream] == asked[stream]
    assert peer.ended == set(STREAMS)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calls, connection):
        monkeypatch.setattr(module, "STREAM_WINDOW", ROOM)
    monkeypatch.setattr(connection, "CONNECTION_WINDOW", ROOM)


@settings(max_examples=300, deadline=None)
@given(todo=steps(), at_once=st.lists(st.sampled_from((0, 10_000, 100_000, 1 << 30)), min_size=1, max_size=4))
def test_everything_comes_whole_and_within_the_windows(todo: list[Step], at_once: list[int]) -> None:
    asyncio.run(_go(todo, at_once))
