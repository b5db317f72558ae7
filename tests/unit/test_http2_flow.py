"""HTTP/2's windows, with a peer that counts as strictly as one may: nothing too early, nothing held back for ever."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any, cast

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport_server.http2 import call as calls
from modelport_server.http2 import connection, frames
from modelport_server.http2.call import END_OF_STREAM, ServerCall
from modelport_server.http2.connection import Connection
from modelport_server.http2.headers import RequestHead
from tests.support.http2 import prefixed, request_block

STREAMS = (1, 3)
ROOM = 100_000
"""Of a connection and of a call of this server, in bytes; far fewer than it has, to be used up soon."""
FRAME_BYTES = 128 * 1024
"""The largest frame that the peer takes."""
HIGH, LOW = 30_000, 7_000
"""When a transport asks for less, and for more."""
PLENTY = 1 << 30


class Calls:
    """Who answers: nobody, by itself."""

    keepalive_s = keepalive_timeout_s = stall_s = 1e6
    max_streams = 100
    max_message_bytes = PLENTY

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
        self.paused = False
        self._at_once = cycle(at_once)
        self._kept = bytearray()

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
        if len(self._kept) > HIGH and not self.paused:
            self.paused = True
            self.protocol.pause_writing()
        elif len(self._kept) <= LOW and self.paused:
            self.paused = False
            self.protocol.resume_writing()


class Peer:
    """A client that takes nothing which it has not made room for, by what the server has acknowledged."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.calls = Calls()
        self.server = Connection(self.calls)
        self.given: defaultdict[int, bytes] = defaultdict(bytes)
        """What the server was given to send, by stream."""
        self.received: defaultdict[int, bytes] = defaultdict(bytes)
        self.asked: defaultdict[int, list[int]] = defaultdict(list)
        """How long the messages are that the server is to read."""
        self.read: defaultdict[int, list[int]] = defaultdict(list)
        self.well: set[int] = set()
        """Streams that the server has been told to end well."""
        self.broken: set[int] = set()
        """Those that either side has broken off."""
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._given_up: set[int] = set()
        """Those that the peer has reset: what was on its way may still come."""
        self._unsent: defaultdict[int, bytes] = defaultdict(bytes)
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._unacknowledged: deque[int] = deque()
        self._initial = frames.DEFAULT_WINDOW
        self._windows: dict[int, int] = dict.fromkeys((0, *STREAMS), frames.DEFAULT_WINDOW)
        self._theirs: dict[int, int] = dict.fromkeys((0, *STREAMS), frames.DEFAULT_WINDOW)

    def connect(self) -> None:
        """Greets the server and opens all streams."""
        self.wire.protocol = self.server
        self.server.connection_made(cast("Any", self.wire))
        self._unacknowledged.append(self._initial)
        self.server.data_received(frames.PREFACE + frames.settings({frames.MAX_FRAME_SIZE: FRAME_BYTES}))
        block = request_block()
        for stream in STREAMS:
            self.server.data_received(frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block))

    # What can happen.

    def set_window(self, _: int, size: int) -> None:
        self._unacknowledged.append(size)
        self.server.data_received(frames.settings({frames.INITIAL_WINDOW_SIZE: size}))

    def grow(self, stream: int, size: int) -> None:
        self._windows[stream] += size
        self.server.data_received(frames.window_update(stream, size))

    def answer(self, stream: int, size: int) -> None:
        if stream not in self.well | self.broken:
            message = bytes([stream]) * size
            self.given[stream] += prefixed(message)
            self.calls.begun[stream].send(message)

    def ask(self, stream: int, size: int) -> None:
        if stream not in self.well | self.broken:
            self.asked[stream].append(size)
            self._unsent[stream] += prefixed(bytes(size))

    def begin_reading(self, stream: int, _: int = 0) -> None:
        if stream not in self._readers:
            self._readers[stream] = asyncio.get_running_loop().create_task(self._read(self.calls.begun[stream]))

    async def _read(self, call: ServerCall) -> None:
        while (message := await call.read()) is not END_OF_STREAM:
            self.read[call.stream].append(len(message))

    def end(self, stream: int, _: int = 0) -> None:
        if stream not in self.well | self.broken:
            self.well.add(stream)
            self.calls.begun[stream].end()

    def fail(self, stream: int, _: int) -> None:
        self.broken.add(stream)
        self.calls.begun[stream].fail(grpc.StatusCode.UNAVAILABLE, "it broke")

    def give_up(self, stream: int, _: int) -> None:
        if stream not in self._ended:
            self.broken.add(stream)
            self._ended.add(stream)
            self._given_up.add(stream)
            self.server.data_received(frames.reset(stream, frames.CANCEL))

    # What follows from that.

    def push(self) -> bool:
        """Sends what the server has room for; returns whether that was anything."""
        pushed = False
        for stream in set(STREAMS) - self._ended:
            while piece := self._unsent[stream][: self._room(stream)]:
                self._unsent[stream] = self._unsent[stream][len(piece) :]
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
            kind, flags, stream = data[3], data[4], int.from_bytes(data[5:9], "big")
            payload = bytes(data[frames.HEAD_BYTES : after])
            del data[:after]
            self._take(kind, flags, stream, payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.DATA:
            assert len(payload) <= min(self._windows[0], self._windows[stream], FRAME_BYTES)
            assert stream in self._begun
            assert stream not in self._ended or stream in self._given_up
            self._windows[0] -= len(payload)
            self._windows[stream] -= len(payload)
            self.received[stream] += payload
        elif kind == frames.HEADERS:
            self._begun.add(stream)
            if flags & frames.END_STREAM:
                self._ended.add(stream)
        elif kind == frames.RST_STREAM:
            assert stream in self._ended  # it has its answer, and need not send the rest
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

    async def settle(self) -> None:
        """Delivers everything until nothing more comes."""
        quiet = 0
        while quiet < 3:
            before = sum(map(len, self.received.values()))
            self.wire.deliver(PLENTY)
            self.take()
            pushed = self.push()
            await asyncio.sleep(0)
            quiet = 0 if pushed or sum(map(len, self.received.values())) > before else quiet + 1

    def check_nothing_is_held_back(self) -> None:
        """Checks that what is missing is missing for want of room, and what has all come has ended."""
        for stream in set(STREAMS) - self.broken:
            if len(self.received[stream]) < len(self.given[stream]):
                assert min(self._windows[0], self._windows[stream]) <= 0
            elif stream in self.well:
                assert stream in self._ended

    async def finish(self) -> None:
        """Reads and ends everything that is open, and makes room for it."""
        await self.settle()
        self.check_nothing_is_held_back()
        for stream in STREAMS:
            self.begin_reading(stream)
        self.set_window(0, frames.DEFAULT_WINDOW)
        for stream in (*STREAMS, 0):
            self.grow(stream, 10_000_000)
        await self.settle()
        for stream in set(STREAMS) - self.well - self.broken:
            assert not self._unsent[stream]
            self.server.data_received(frames.frame(frames.DATA, frames.END_STREAM, stream))
            async with asyncio.timeout(5.0):
                await self._readers[stream]
            assert self.read[stream] == self.asked[stream]
            self.end(stream)
        await self.settle()
        self.check_nothing_is_held_back()
        for stream in STREAMS:
            if stream in self.broken:
                assert self.given[stream].startswith(self.received[stream])
            else:
                assert self.received[stream] == self.given[stream]
        async with asyncio.timeout(5.0):
            await asyncio.gather(*self._readers.values(), return_exceptions=True)
        self.server.connection_lost(None)


Step = tuple[Callable[[Peer, int, int], None], int, int, int | None]
"""What happens, to which stream, its size, and how many bytes are delivered after a turn of the event loop."""


def steps() -> st.SearchStrategy[list[Step]]:
    streams = st.sampled_from(STREAMS)
    sizes = st.sampled_from((0, 10, 1_000, 30_000, 90_000))
    delivered = st.sampled_from((None, 0, 5_000, PLENTY, PLENTY))
    windows = st.sampled_from((0, 100, 70_000, 500_000))
    growth = st.sampled_from((1, 1_000, 50_000))
    often = st.one_of(
        st.tuples(st.just(Peer.answer), streams, sizes, delivered),
        st.tuples(st.just(Peer.ask), streams, sizes, delivered),
        st.tuples(st.just(Peer.grow), st.sampled_from((0, *STREAMS)), growth, delivered),
        st.tuples(st.just(Peer.set_window), st.just(0), windows, delivered),
        st.tuples(st.just(Peer.begin_reading), streams, st.just(0), delivered),
    )
    ends = st.sampled_from((Peer.end, Peer.fail, Peer.give_up))
    seldom = st.tuples(ends, streams, st.just(0), delivered)
    return st.lists(st.one_of(often, often, often, seldom), min_size=1, max_size=30)


async def _go(todo: list[Step], at_once: list[int]) -> None:
    peer = Peer(Wire(at_once))
    peer.connect()
    for happen, stream, size, delivered in todo:
        happen(peer, stream, size)
        if delivered is not None:
            await asyncio.sleep(0)
            peer.wire.deliver(delivered)
            peer.take()
            peer.push()
    await peer.finish()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calls, connection):
        monkeypatch.setattr(module, "STREAM_WINDOW", ROOM)
    monkeypatch.setattr(connection, "CONNECTION_WINDOW", ROOM)


@settings(max_examples=600, deadline=None)
@given(todo=steps(), at_once=st.lists(st.sampled_from((0, 10_000, 100_000, PLENTY)), min_size=1, max_size=4))
def test_everything_comes_whole_and_within_the_windows(todo: list[Step], at_once: list[int]) -> None:
    asyncio.run(_go(todo, at_once))
