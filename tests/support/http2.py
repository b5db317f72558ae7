"""A client that speaks HTTP/2 by hand, so that it can say what no library would."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hpack import Decoder, Encoder

from modelport_server.http2 import frames

ECHO = "/test.Echo/Unary"


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that came."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> int:
        """The error code of a GOAWAY or RST_STREAM frame."""
        return int.from_bytes(self.payload[4:8] if self.kind == frames.GOAWAY else self.payload[:4], "big")


@dataclass(slots=True)
class Answered:
    """What has come of one stream."""

    headers: dict[str, str] = field(default_factory=dict[str, str])
    """Headers and trailers."""
    data: bytes = b""
    frame_sizes: list[int] = field(default_factory=list[int])
    ended: bool = False
    reset: int | None = None

    @property
    def messages(self) -> list[bytes]:
        """The messages, taken apart."""
        found: list[bytes] = []
        rest = self.data
        while rest:
            size = int.from_bytes(rest[1:5], "big")
            assert rest[0] == 0
            assert len(rest) >= 5 + size
            found.append(rest[5 : 5 + size])
            rest = rest[5 + size :]
        return found

    @property
    def status(self) -> int:
        """gRPC's status."""
        return int(self.headers["grpc-status"])


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.streams: defaultdict[int, Answered] = defaultdict(Answered)
        self.frames: list[Frame] = []
        self.closed = False
        self._encoder, self._decoder = Encoder(), Decoder()
        self._block = b""

    def send(self, data: bytes) -> None:
        """Sends bytes."""
        self.writer.write(data)

    def greet(self, **settings: int) -> None:
        """Sends the preface, with settings by the names that ``frames`` has."""
        self.send(frames.PREFACE + frames.settings({getattr(frames, name): value for name, value in settings.items()}))

    def block(self, path: str = ECHO, **more: str) -> bytes:
        """Returns the headers of a call; a value that is empty leaves a header out."""
        return request_block(path, self._encoder, **more)

    def call(self, stream: int, path: str = ECHO, ended: bool = False, **more: str) -> None:
        """Sends the headers of a call."""
        flags = frames.END_HEADERS | (frames.END_STREAM if ended else 0)
        self.send(frames.frame(frames.HEADERS, flags, stream, self.block(path, **more)))

    def message(self, stream: int, message: bytes, *, ended: bool = True) -> None:
        """Sends a message in one frame."""
        self.data(stream, prefixed(message), ended=ended)

    def data(self, stream: int, data: bytes, *, ended: bool = False) -> None:
        """Sends bytes of a stream."""
        self.send(frames.frame(frames.DATA, frames.END_STREAM if ended else 0, stream, data))

    async def next_frame(self) -> Frame | None:
        """Returns the next frame, which is taken note of; None at the end of the connection."""
        try:
            head = await self.reader.readexactly(frames.HEAD_BYTES)
            payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed = True
            return None
        frame = Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        self.frames.append(frame)
        stream = self.streams[frame.stream]
        if frame.kind == frames.DATA:
            stream.data += payload
            stream.frame_sizes.append(len(payload))
        elif frame.kind == frames.HEADERS:
            assert frame.flags & frames.END_HEADERS
            stream.headers |= {str(name): str(value) for name, value in self._decoder.decode(payload)}
        elif frame.kind == frames.RST_STREAM:
            stream.reset = frame.code
        if frame.kind in (frames.DATA, frames.HEADERS):
            stream.ended |= bool(frame.flags & frames.END_STREAM)
        return frame

    async def answer(self, stream: int) -> Answered:
        """Returns what came of a stream once it has ended."""
        found = self.streams[stream]
        while not found.ended and found.reset is None:
            assert await self.next_frame() is not None, "the connection ended"
        return found

    async def echo(self, stream: int, message: bytes, path: str = ECHO) -> bytes:
        """Makes a call that has to go well, and returns its answer."""
        self.call(stream, path)
        self.message(stream, message)
        found = await self.answer(stream)
        assert (found.status, len(found.messages)) == (0, 1), found.headers
        return found.messages[0]

    async def until(self, kind: int, *, ack: bool = False) -> Frame:
        """Returns the next frame of a kind."""
        while (frame := await self.next_frame()) is not None:
            if frame.kind == kind and (kind != frames.PING or bool(frame.flags & frames.ACK) == ack):
                return frame
        raise AssertionError(f"the connection ended without a frame of kind {kind}")

    async def rest(self) -> list[Frame]:
        """Returns what comes until the connection ends."""
        first = len(self.frames)
        while await self.next_frame() is not None:
            pass
        return self.frames[first:]


def request_block(path: str = ECHO, encoder: Encoder | None = None, **more: str) -> bytes:
    """Returns the headers of a call; a value that is empty leaves a header out."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, "te": "trailers", "content-type": "application/grpc"}
    fields |= {name.replace("_", "-"): value for name, value in more.items()}
    return bytes((encoder or Encoder()).encode([(name, value) for name, value in fields.items() if value]))


async def eventually(condition: Callable[[], object]) -> None:
    """Returns once a condition holds."""
    async with asyncio.timeout(20.0):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


def prefixed(message: bytes) -> bytes:
    """Returns a message as gRPC sends it, uncompressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


@asynccontextmanager
async def raw_client(port: int, settings: Mapping[str, int] | None = None) -> AsyncGenerator[RawClient]:
    """Gives a connection that has been greeted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = RawClient(reader, writer)
    client.greet(**(settings or {}))
    try:
        yield client
    finally:
        writer.close()
