"""The gRPC server on HTTP/2, by a client that sends frames by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport_server.http2 import connection, frames
from modelport_server.http2.call import END_OF_STREAM, STREAM_WINDOW, CallEndedError, ServerCall
from modelport_server.http2.server import GrpcServer, Limits
from tests.support.http2 import ECHO, RawClient, eventually, prefixed, raw_client

insecure_channel: Any = grpc.aio.insecure_channel
STREAM = "/test.Echo/Stream"
HANG = "/test.Echo/Hang"
KIB = 1024


class Echo:
    """A service; what it saw."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.contexts: list[ServerCall] = []
        self.remaining_s: float | None = None
        self.release = asyncio.Event()
        self.read = asyncio.Event()

    async def unary(self, message: bytes, context: ServerCall) -> bytes:
        self.contexts.append(context)
        return message

    async def stream(self, _: object, context: ServerCall) -> None:
        while (message := await context.read()) is not END_OF_STREAM:
            await context.write(message)

    async def counted(self, message: bytes, context: ServerCall) -> AsyncIterator[bytes]:
        for number in range(int(message)):
            yield b"%d" % number

    async def hang(self, message: bytes, context: ServerCall) -> bytes:
        self.begun += 1
        self.contexts.append(context)
        self.remaining_s = context.time_remaining()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return message

    async def unread(self, _: object, context: ServerCall) -> None:
        await self.read.wait()
        while (message := await context.read()) is not END_OF_STREAM:
            await context.write(b"%d" % len(message))

    async def late(self, message: bytes, context: ServerCall) -> None:
        try:
            for _ in range(1000):
                await context.write(message)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def sized(self, message: bytes, context: ServerCall) -> bytes:
        self.begun += 1
        return bytes(int(message))

    def taskless(self, message: bytes, context: ServerCall) -> None:
        self.contexts.append(context)
        if message == b"raise":
            raise ValueError("secret")

    async def lengthy(self, message: bytes, context: ServerCall) -> None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no " * 300)

    async def refuse(self, message: bytes, context: ServerCall) -> None:
        metadata = (("grpc-retry-pushback-ms", "250"),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "voll: 100% ø ü\n", trailing_metadata=metadata)

    async def fail(self, message: bytes, context: ServerCall) -> bytes:
        raise ValueError("secret")

    def handler(self) -> Any:
        api: Any = grpc
        methods = {
            "Unary": api.unary_unary_rpc_method_handler(self.unary),
            "Stream": api.stream_stream_rpc_method_handler(self.stream),
            "Count": api.unary_stream_rpc_method_handler(self.counted),
            "Hang": api.unary_unary_rpc_method_handler(self.hang),
            "Unread": api.stream_stream_rpc_method_handler(self.unread),
            "Late": api.unary_stream_rpc_method_handler(self.late),
            "Sized": api.unary_unary_rpc_method_handler(self.sized),
            "Taskless": api.unary_unary_rpc_method_handler(self.taskless),
            "Lengthy": api.unary_unary_rpc_method_handler(self.lengthy),
            "Refuse": api.unary_unary_rpc_method_handler(self.refuse),
            "Fail": api.unary_unary_rpc_method_handler(self.fail),
        }
        return api.method_handlers_generic_handler("test.Echo", methods)


@asynccontextmanager
async def serving(**limits: Any) -> AsyncGenerator[tuple[int, Echo, GrpcServer]]:
    echo, server = Echo(), GrpcServer(Limits(**limits))
    server.add_generic_rpc_handlers([echo.handler()])
    port = await server.start("127.0.0.1:0")
    try:
        yield port, echo, server
    finally:
        await server.stop()


# Calls.


async def test_a_call() -> None:
    async with serving() as (port, echo, _), raw_client(port) as client:
        assert await client.echo(1, b"hello") == b"hello"
        assert client.streams[1].headers == {
            ":status": "200",
            "content-type": "application/grpc",
            "grpc-status": "0",
        }
        assert client.streams[1].reset is None
        assert echo.contexts[0].peer().startswith("ipv4:127.0.0.1:")
        assert echo.contexts[0].time_remaining() is None


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 700), max_size=12), sizes=st.lists(st.integers(0, 200), min_size=1, max_size=4))
def test_frames_may_come_in_any_pieces(cuts: list[int], sizes: list[int]) -> None:
    async def main() -> None:
        async with serving() as (port, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            client = RawClient(reader, writer)
            sent: list[bytes] = []
            client.send = sent.append  # type: ignore[method-assign,assignment]
            client.greet()
            for number, size in enumerate(sizes):
                client.call(2 * number + 1)
                client.message(2 * number + 1, bytes([number]) * size)
            everything, start = b"".join(sent), 0
            for end in sorted({*cuts, len(everything)}):
                writer.write(everything[start:end])
                await writer.drain()
                await asyncio.sleep(0)
                start = max(start, end)
            for number, size in enumerate(sizes):
                assert (await client.answer(2 * number + 1)).messages == [bytes([number]) * size]
            writer.close()

    asyncio.run(main())


@settings(max_examples=40, deadline=None)
@given(messages=st.lists(st.binary(max_size=3000), max_size=8), cuts=st.lists(st.integers(1, 9000), max_size=8))
def test_messages_may_come_in_any_frames(messages: list[bytes], cuts: list[int]) -> None:
    async def main() -> None:
        async with serving() as (port, _, _), raw_client(port) as client:
            client.call(1, STREAM)
            data, start = b"".join(map(prefixed, messages)), 0
            for end in sorted({*(cut for cut in cuts if cut < len(data)), len(data)}):
                client.data(1, data[start:end])
                start = end
            client.data(1, b"", ended=True)
            found = await client.answer(1)
            assert (found.messages, found.status) == (messages, 0)

    asyncio.run(main())


async def test_padding_priority_and_continued_headers() -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        block = client.block()
        payload = b"\x04" + bytes(5) + block[:7] + bytes(4)
        client.send(frames.frame(frames.HEADERS, frames.PADDED | frames.WITH_PRIORITY, 1, payload))
        client.send(frames.frame(frames.CONTINUATION, 0, 1, block[7:9]))
        client.send(frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[9:]))
        client.send(frames.frame(frames.DATA, frames.PADDED, 1, b"\x03" + prefixed(b"padded")[:4] + bytes(3)))
        client.send(frames.frame(frames.PRIORITY, 0, 1, bytes(5)))
        client.send(frames.frame(0xBE, 0xFF, 7, b"of a kind that nobody knows"))
        client.data(1, prefixed(b"padded")[4:], ended=True)
        assert (await client.answer(1)).messages == [b"padded"]


async def test_a_handler_without_a_task_ends_its_call_when_it_likes(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (port, echo, server), raw_client(port) as client:
        for stream in (1, 3, 5, 7):
            client.call(stream, "/test.Echo/Taskless")
            client.message(stream, b"raise" if stream == 7 else b"x")
        found = await client.answer(7)
        assert (found.status, "secret" in caplog.text) == (13, True)
        assert server.calls_under_way == 3
        echo.contexts[1].fail(grpc.StatusCode.NOT_FOUND, "gone")
        echo.contexts[0].answer(b"one")
        client.send(frames.reset(5, frames.CANCEL))
        assert (await client.answer(3)).status == 5
        assert (await client.answer(1)).messages == [b"one"]
        await eventually(lambda: not server.calls_under_way)
        echo.contexts[2].answer(b"too late")
        echo.contexts[0].fail(grpc.StatusCode.NOT_FOUND, "too late")
        assert await client.echo(9, b"on it goes") == b"on it goes"
        assert client.streams[5].data == b""


async def test_trailers_of_a_caller_end_its_side() -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, STREAM)
        client.data(1, prefixed(b"one"))
        client.send(frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, client.block(x="y")))
        assert (await client.answer(1)).messages == [b"one"]


async def test_answers_of_one_call_for_all_of_a_generator() -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, "/test.Echo/Count")
        client.message(1, b"3")
        assert (await client.answer(1)).messages == [b"0", b"1", b"2"]


async def test_a_status_with_text_and_metadata() -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, "/test.Echo/Refuse")
        client.message(1, b"")
        found = await client.answer(1)
    assert found.headers == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-status": "8",
        "grpc-message": "voll: 100%25 %C3%B8 %C3%BC%0A",
        "grpc-retry-pushback-ms": "250",
    }


async def test_what_a_handler_raises_stays_here(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, "/test.Echo/Fail")
        client.message(1, b"")
        found = await client.answer(1)
        assert (found.status, found.headers["grpc-message"]) == (13, "internal error; the server's log says more")
        assert "secret" in caplog.text
        assert await client.echo(3, b"on it goes") == b"on it goes"


@pytest.mark.parametrize(
    ("headers", "path", "status", "text"),
    [
        ({}, "/test.Echo/Nothing", 12, "Method not found!"),
        ({}, "test.Echo/Unary", 12, "Method not found!"),
        ({}, "/test.echo/unary", 12, "Method not found!"),
        ({"grpc_encoding": "gzip"}, ECHO, 12, "messages must not be compressed"),
        ({"grpc_timeout": "soon"}, ECHO, 3, "grpc-timeout is no time"),
        ({"grpc_timeout": "123456789S"}, ECHO, 3, "grpc-timeout is no time"),
        ({"grpc_timeout": "0n"}, HANG, 4, "Deadline Exceeded"),
        ({"grpc_timeout": "20m"}, HANG, 4, "Deadline Exceeded"),
    ],
)
async def test_what_calls_are_refused(headers: dict[str, str], path: str, status: int, text: str) -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, path, False, **headers)
        client.message(1, b"x")
        found = await client.answer(1)
        assert (found.status, found.headers["grpc-message"]) == (status, text)
        assert await client.echo(3, b"on it goes") == b"on it goes"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({":method": "GET"}, "405"),
        ({"content_type": "application/json"}, "415"),
        ({"content_type": ""}, "415"),
        ({"content_type": "application/grpc-web"}, "415"),
    ],
)
async def test_what_is_no_call_is_answered_in_http(headers: dict[str, str], status: str) -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, ECHO, True, **headers)
        found = await client.answer(1)
        assert found.headers == {":status": status}
        assert await client.echo(3, b"on it goes") == b"on it goes"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the call has 0 messages; one is wanted"),
        (prefixed(b"a") + prefixed(b"b"), "the call has more messages than the one that is wanted"),
        (prefixed(b"abc")[:-1], "the caller ended within a message"),
        (b"\0\0", "the caller ended within a message"),
        (b"\1" + prefixed(b"abc")[1:], "a message is compressed, and the headers do not say how"),
    ],
)
async def test_messages_of_a_call_that_takes_one(data: bytes, text: str) -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1)
        client.data(1, data, ended=True)
        found = await client.answer(1)
        assert (found.status, found.headers["grpc-message"]) == (13, text)
        assert await client.echo(3, b"on it goes") == b"on it goes"


async def test_headers_that_are_too_large_fail_their_call_alone() -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, ECHO, True, cookie="x" * 20_000)
        found = await client.answer(1)
        assert (found.status, found.headers["grpc-message"]) == (8, "the headers are too large")
        assert await client.echo(3, b"on it goes") == b"on it goes"


async def test_a_message_that_is_too_large_is_refused_by_its_length() -> None:
    async with serving(max_message_bytes=100) as (port, _, _), raw_client(port) as client:
        assert await client.echo(1, bytes(100)) == bytes(100)
        client.call(3)
        client.data(3, b"\0\xff\xff\xff\xff")
        found = await client.answer(3)
        assert (found.status, found.headers["grpc-message"].split()[0:2]) == (8, ["SERVER:", "Received"])
        assert (await client.until(frames.RST_STREAM)).code == frames.NO_ERROR
        client.data(3, bytes(1000))  # it was on its way
        assert await client.echo(5, b"on it goes") == b"on it goes"


# How many.


async def test_more_calls_than_a_connection_may_have_are_refused_to_be_made_elsewhere() -> None:
    async with serving(max_streams_per_connection=2) as (port, echo, _), raw_client(port) as client:
        greeting = await client.until(frames.SETTINGS)
        assert dict(frames.read_settings(greeting.payload))[frames.MAX_CONCURRENT_STREAMS] == 2
        for stream in (1, 3, 5):
            client.call(stream, HANG)
            client.message(stream, b"x")
        assert (await client.answer(5)).reset == frames.REFUSED_STREAM
        echo.release.set()
        assert [(await client.answer(stream)).status for stream in (1, 3)] == [0, 0]
        assert await client.echo(7, b"room again") == b"room again"


async def test_more_calls_than_there_may_be_are_refused() -> None:
    async with serving(max_concurrent_calls=2) as (port, echo, _), raw_client(port) as one, raw_client(port) as other:
        for client in (one, other):
            client.call(1, HANG)
            client.message(1, b"x")
        await eventually(lambda: echo.begun == 2)
        other.call(3, HANG, ended=True)
        found = await other.answer(3)
        assert (found.status, found.headers["grpc-message"]) == (8, "2 calls are under way, which is the most")
        echo.release.set()
        assert (await one.answer(1)).status == 0
        assert (await other.answer(1)).status == 0
        assert await other.echo(5, b"room again") == b"room again"


# How much.


async def test_answers_wait_for_windows() -> None:
    window = {"INITIAL_WINDOW_SIZE": 10}
    async with serving() as (port, _, _), raw_client(port, window) as client:
        client.call(1)
        client.message(1, bytes(range(30)))
        while len(client.streams[1].data) < 10:
            await client.next_frame()
        client.call(3)
        client.message(3, b"small")  # beside one that waits
        assert (await client.answer(3)).messages == [b"small"]
        assert len(client.streams[1].data) == 10
        for _ in range(5):
            client.send(frames.window_update(1, 5))
        found = await client.answer(1)
        assert (found.messages, found.status) == ([bytes(range(30))], 0)
        assert max(found.frame_sizes) <= 10


async def test_a_window_that_shrinks_below_nothing() -> None:
    async with serving() as (port, _, _), raw_client(port, {"INITIAL_WINDOW_SIZE": 20}) as client:
        client.call(1)
        client.message(1, bytes(50))
        while len(client.streams[1].data) < 20:
            await client.next_frame()
        client.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 5}) + frames.window_update(1, 15))  # 0 in all
        client.send(frames.frame(frames.PING, 0, 0, b"whatever"))
        await client.until(frames.PING, ack=True)
        assert len(client.streams[1].data) == 20
        client.send(frames.window_update(1, 100))
        assert (await client.answer(1)).messages == [bytes(50)]


async def test_what_new_settings_make_room_for_comes_after_their_acknowledgement() -> None:
    async with serving() as (port, _, _), raw_client(port, {"INITIAL_WINDOW_SIZE": 20}) as client:
        client.call(1)
        client.message(1, bytes(50))
        while len(client.streams[1].data) < 20:
            await client.next_frame()
        client.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 100}))
        kinds: list[int] = []
        while frames.DATA not in kinds:  # a peer that still counts with its old settings would not take it
            frame = await client.next_frame()
            assert frame is not None
            kinds.append(frame.kind)
        assert kinds == [frames.SETTINGS, frames.DATA]
        assert (await client.answer(1)).messages == [bytes(50)]


async def test_the_connection_s_window_is_shared() -> None:
    size = 40 * KIB
    window = {"INITIAL_WINDOW_SIZE": 1 << 20}
    async with serving() as (port, _, _), raw_client(port, window) as client:
        for stream in (1, 3, 5):
            client.call(stream)
            client.message(stream, bytes(size))
        while sum(len(client.streams[stream].data) for stream in (1, 3, 5)) < frames.DEFAULT_WINDOW:
            await client.next_frame()
        client.send(frames.window_update(0, 3 * size))
        for stream in (1, 3, 5):
            found = await client.answer(stream)
            assert found.messages == [bytes(size)]
            assert max(found.frame_sizes) <= frames.DEFAULT_FRAME_BYTES


async def test_a_large_message_gets_the_room_that_it_takes() -> None:
    size = 40 << 20
    async with serving(max_message_bytes=64 << 20) as (port, echo, _), raw_client(port) as client:
        echo.read.set()
        client.call(1, "/test.Echo/Unread")
        data = prefixed(bytes(size))
        sent, windows = 0, {0: frames.DEFAULT_WINDOW, 1: frames.DEFAULT_WINDOW}
        grown = {0: False, 1: False}
        while sent < len(data):
            room = min(*windows.values(), frames.DEFAULT_FRAME_BYTES, len(data) - sent)
            if room:
                client.data(1, data[sent : sent + room], ended=sent + room == len(data))
                await client.writer.drain()
                sent += room
                windows[0] -= room
                windows[1] -= room
                continue
            frame = await client.next_frame()
            assert frame is not None
            if frame.kind == frames.SETTINGS and not frame.flags:
                new = dict(frames.read_settings(frame.payload))[frames.INITIAL_WINDOW_SIZE]
                windows[1] += new - frames.DEFAULT_WINDOW
            elif frame.kind == frames.WINDOW_UPDATE:
                windows[frame.stream] += int.from_bytes(frame.payload, "big")
                grown[frame.stream] = True
        assert (await client.answer(1)).messages == [b"%d" % size]
        assert grown == {0: True, 1: True}


async def test_an_empty_answer_waits_for_a_window_too() -> None:
    async with serving() as (port, _, _), raw_client(port, {"INITIAL_WINDOW_SIZE": 3}) as client:
        client.call(1)
        client.message(1, b"")
        while len(client.streams[1].data) < 3:
            await client.next_frame()
        client.send(frames.window_update(1, 2))
        found = await client.answer(1)
        assert (found.messages, found.status) == ([b""], 0)


async def test_those_that_wait_go_on_in_turns() -> None:
    size = 200 * KIB
    async with serving() as (port, _, _), raw_client(port, {"INITIAL_WINDOW_SIZE": 1 << 20}) as client:
        for stream in (1, 3):
            client.call(stream)
            client.data(stream, prefixed(bytes(size))[: 100 * KIB])
            client.data(stream, prefixed(bytes(size))[100 * KIB :], ended=True)
        while sum(len(client.streams[stream].data) for stream in (1, 3)) < frames.DEFAULT_WINDOW:
            await client.next_frame()
        before = {stream: len(client.streams[stream].data) for stream in (1, 3)}
        client.send(frames.window_update(0, 100 * KIB))
        while sum(len(client.streams[stream].data) for stream in (1, 3)) < frames.DEFAULT_WINDOW + 100 * KIB:
            await client.next_frame()
        assert all(len(client.streams[stream].data) - before[stream] > 30 * KIB for stream in (1, 3))


@pytest.mark.parametrize("path", [ECHO, "/test.Echo/Late", "/test.Echo/Count"])
async def test_who_does_not_read_an_answer_does_not_get_it_for_ever(path: str) -> None:
    async with serving(stall_s=0.1) as (port, _, server), raw_client(port, {"INITIAL_WINDOW_SIZE": 3}) as client:
        client.call(1, path)
        client.message(1, b"5")
        found = await client.answer(1)
        assert (found.status, found.headers["grpc-message"]) == (8, "answers were not read for 0.1 s")
        await eventually(lambda: not server.calls_under_way)


async def test_what_nobody_reads_is_bounded() -> None:
    async with serving() as (port, echo, _), raw_client(port) as client:
        client.call(1, "/test.Echo/Unread")
        piece = prefixed(bytes(60 * KIB))
        pieces = STREAM_WINDOW // len(piece)
        for _ in range(pieces):
            client.data(1, piece)
        client.send(frames.frame(frames.PING, 0, 0, b"whatever"))
        await client.until(frames.PING, ack=True)
        assert not [frame for frame in client.frames if frame.kind == frames.WINDOW_UPDATE and frame.stream == 1]
        echo.read.set()
        assert int.from_bytes((await client.until(frames.WINDOW_UPDATE)).payload, "big") <= pieces * len(piece)
        client.data(1, b"", ended=True)
        assert (await client.answer(1)).messages == [b"%d" % (60 * KIB)] * pieces


async def test_who_sends_more_than_there_is_room_for_is_cut_off() -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, "/test.Echo/Unread")
        piece = prefixed(bytes(60 * KIB))
        for _ in range(STREAM_WINDOW // len(piece) + 1):
            client.data(1, piece)
        assert (await client.answer(1)).reset == frames.FLOW_CONTROL_ERROR
        assert await client.echo(3, b"on it goes") == b"on it goes"


async def test_a_peer_that_reads_nothing_holds_answers_back() -> None:
    window = {"INITIAL_WINDOW_SIZE": frames.MAX_WINDOW}
    async with serving() as (port, echo, server), raw_client(port, window) as client:
        client.send(frames.window_update(0, frames.MAX_WINDOW - frames.DEFAULT_WINDOW))
        client.call(1, "/test.Echo/Late")
        client.message(1, bytes(100 * KIB))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        one = await _connection(server)
        await eventually(lambda: one.unsent_bytes > 200 * KIB)
        for _ in range(20):
            await asyncio.sleep(0)
        assert one.unsent_bytes < 1 << 20  # of a hundred times as much
        client.writer.transport.abort()
        await one.closed
        await eventually(lambda: echo.cancelled)


# How it ends.


async def test_who_resets_a_call_cancels_it() -> None:
    async with serving() as (port, echo, server), raw_client(port) as client:
        ended: list[object] = []
        client.call(1, HANG)
        client.message(1, b"x")
        await eventually(lambda: echo.begun)
        echo.contexts[0].add_done_callback(ended.append)
        client.send(frames.reset(1, frames.CANCEL))
        await eventually(lambda: echo.cancelled)
        assert ended == [echo.contexts[0]]
        echo.contexts[0].add_done_callback(ended.append)
        assert ended == [echo.contexts[0]] * 2
        with pytest.raises(CallEndedError):
            await echo.contexts[0].write(b"late")
        assert await client.echo(3, b"on it goes") == b"on it goes"
        assert client.streams[1].ended is False
        assert not server.calls_under_way


async def test_who_is_gone_cancels_its_calls() -> None:
    async with serving() as (port, echo, server):
        async with raw_client(port) as client:
            for stream in (1, 3):
                client.call(stream, HANG)
                client.message(stream, b"x")
            await eventually(lambda: echo.begun == 2)
        await eventually(lambda: echo.cancelled == 2 and not server.calls_under_way and not server.connections)


async def test_a_handler_is_cancelled_at_the_deadline() -> None:
    async with serving() as (port, echo, _), raw_client(port) as client:
        client.call(1, HANG, grpc_timeout="500m")
        client.message(1, b"x")
        await eventually(lambda: echo.begun)
        assert echo.remaining_s is not None
        assert 0 < echo.remaining_s <= 0.5
        assert (await client.answer(1)).status == 4
        await eventually(lambda: echo.cancelled)


async def test_draining_answers_what_has_come_and_what_is_on_its_way() -> None:
    async with serving() as (port, echo, server), raw_client(port) as client:
        client.call(1, HANG)
        client.message(1, b"x")
        await eventually(lambda: echo.begun)
        stopping = asyncio.create_task(server.stop(30.0))
        first = await client.until(frames.GOAWAY)
        assert (int.from_bytes(first.payload[:4], "big"), first.code) == (frames.MAX_STREAM, frames.NO_ERROR)
        assert await client.echo(3, b"was on its way") == b"was on its way"
        ping = next((frame for frame in client.frames if frame.kind == frames.PING), None)
        ping = ping or await client.until(frames.PING)
        client.send(frames.frame(frames.PING, frames.ACK, 0, ping.payload))
        second = await client.until(frames.GOAWAY)
        assert (int.from_bytes(second.payload[:4], "big"), second.code) == (3, frames.NO_ERROR)
        # What is refused later does not change that.
        client.call(5, HANG)
        assert (await client.answer(5)).reset == frames.REFUSED_STREAM
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        echo.release.set()
        assert (await client.answer(1)).status == 0
        rest = await client.rest()
        assert [int.from_bytes(one.payload[:4], "big") for one in rest if one.kind == frames.GOAWAY] == [3]
        await stopping


async def test_who_has_not_heard_that_it_drains_is_answered() -> None:
    async with serving() as (port, _, server), raw_client(port) as client:
        await client.echo(1, b"x")
        stopping = asyncio.create_task(server.stop(30.0))
        await client.until(frames.GOAWAY)
        assert await client.echo(3, b"was on its way") == b"was on its way"
        ping = next((frame for frame in client.frames if frame.kind == frames.PING), None)
        ping = ping or await client.until(frames.PING)
        client.send(frames.frame(frames.PING, frames.ACK, 0, ping.payload))
        await client.rest()
        await stopping


async def test_the_last_answers_are_not_cut_off_by_what_is_still_asked() -> None:
    size = 2 << 20
    async with serving() as (port, echo, server), raw_client(port, {"INITIAL_WINDOW_SIZE": 4 << 20}) as client:
        client.send(frames.window_update(0, 4 << 20))
        client.call(1, "/test.Echo/Sized")
        client.message(1, b"%d" % size)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        one = await _connection(server)
        await eventually(lambda: echo.begun)
        stopping = asyncio.create_task(server.stop(30.0))
        for number in range(200):
            client.send(frames.frame(frames.PING, 0, 0, number.to_bytes(8, "big")))
        await eventually(lambda: one.draining)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert (await client.answer(1)).messages == [bytes(size)]
        await client.rest()
        await stopping


async def test_what_does_not_end_in_time_is_told_that_the_server_stops() -> None:
    async with serving() as (port, echo, server), raw_client(port) as client:
        client.call(1, HANG)
        client.message(1, b"x")
        await eventually(lambda: echo.begun)
        await server.stop(0.05)
        found = await client.answer(1)
        assert (found.status, found.headers["grpc-message"]) == (14, "the server is stopping")
        assert echo.cancelled
        await client.rest()


# What peers must not do.


def _raw(*made: bytes) -> Callable[[RawClient], None]:
    return lambda client: client.send(b"".join(made))


def _after_a_call(*made: bytes) -> Callable[[RawClient], None]:
    def send(client: RawClient) -> None:
        client.call(1, STREAM)
        _raw(*made)(client)

    return send


@pytest.mark.parametrize(
    ("send", "code"),
    [
        (_raw(frames.frame(frames.HEADERS, frames.END_HEADERS, 2, b"\x82")), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.HEADERS, frames.END_HEADERS, 0, b"\x82")), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\xff\xff")), frames.COMPRESSION_ERROR),
        (_raw(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xc1")), frames.COMPRESSION_ERROR),
        (_raw(frames.frame(frames.HEADERS, frames.PADDED, 1, b"\x09\0")), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.DATA, 0, 1, b"x")), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.DATA, 0, 0, b"x")), frames.PROTOCOL_ERROR),
        (_after_a_call(frames.frame(frames.DATA, frames.PADDED, 1, b"\x04abc")), frames.PROTOCOL_ERROR),
        (_after_a_call(frames.frame(frames.DATA, frames.PADDED, 1, b"")), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.CONTINUATION, 0, 1, b"")), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.HEADERS, 0, 1) + frames.frame(frames.PING, 0, 0, bytes(8))), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.HEADERS, 0, 1) + frames.frame(frames.CONTINUATION, 0, 3)), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.RST_STREAM, 0, 1, bytes(4))), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.RST_STREAM, 0, 1, bytes(3))), frames.FRAME_SIZE_ERROR),
        (_raw(frames.frame(frames.SETTINGS, 0, 0, bytes(5))), frames.FRAME_SIZE_ERROR),
        (_raw(frames.frame(frames.SETTINGS, 0, 1)), frames.PROTOCOL_ERROR),
        (_raw(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 31})), frames.FLOW_CONTROL_ERROR),
        (_raw(frames.settings({frames.MAX_FRAME_SIZE: 100})), frames.PROTOCOL_ERROR),
        (
            _after_a_call(
                frames.window_update(1, 1 << 30), frames.settings({frames.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
            ),
            frames.FLOW_CONTROL_ERROR,
        ),
        (_raw(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, bytes(100 * KIB))), frames.ENHANCE_YOUR_CALM),
        (_raw(frames.frame(frames.PING, 0, 0, bytes(7))), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.PING, 0, 1, bytes(8))), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.PUSH_PROMISE, 0, 1, bytes(4))), frames.PROTOCOL_ERROR),
        (_raw(frames.window_update(0, 0)), frames.PROTOCOL_ERROR),
        (_raw(frames.window_update(0, frames.MAX_WINDOW)), frames.FLOW_CONTROL_ERROR),
        (_raw(frames.window_update(1, 1)), frames.PROTOCOL_ERROR),
        (_raw(frames.frame(frames.WINDOW_UPDATE, 0, 0, bytes(3))), frames.FRAME_SIZE_ERROR),
        (_raw(frames.head(connection.FRAME_BYTES + 1, frames.DATA, 0, 1)), frames.FRAME_SIZE_ERROR),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_told_how(send: Callable[[RawClient], None], code: int) -> None:
    async with serving() as (port, _, server), raw_client(port) as client:
        send(client)
        rest = await client.rest()
        assert [frame.code for frame in rest if frame.kind == frames.GOAWAY] == [code]
        await eventually(lambda: not server.connections)
        async with raw_client(port) as other:
            assert await other.echo(1, b"on it goes") == b"on it goes"


async def test_a_stream_s_window_may_not_grow_too_large_either() -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        client.call(1, STREAM)
        client.send(frames.window_update(1, frames.MAX_WINDOW))
        assert (await client.answer(1)).reset == frames.FLOW_CONTROL_ERROR
        assert await client.echo(3, b"on it goes") == b"on it goes"


@pytest.mark.parametrize(
    "greeting", [b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0", b"PRI * HTTP/1"]
)
async def test_what_is_no_http2_is_hung_up_on(greeting: bytes) -> None:
    async with serving() as (port, _, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(greeting)
        assert frames.goaway(0, frames.PROTOCOL_ERROR, "this is no HTTP/2") in await reader.read()
        writer.close()


async def test_who_never_greets_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HANDSHAKE_S", 0.05)
    async with serving() as (port, _, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(frames.PREFACE[:10])
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()


def _reset_at_once(client: RawClient, number: int) -> None:
    client.call(2 * number + 1, HANG)
    client.send(frames.reset(2 * number + 1, frames.CANCEL))


def _headers_for_ever(client: RawClient, number: int) -> None:
    kind = frames.CONTINUATION if number else frames.HEADERS
    client.send(frames.frame(kind, 0, 1, b"\0\1a\1b" * 20 if number % 2 else b""))


def _pings(client: RawClient, number: int) -> None:
    client.send(frames.frame(frames.PING, 0, 0, number.to_bytes(8, "big")))


def _settings(client: RawClient, number: int) -> None:
    client.send(frames.settings({frames.INITIAL_WINDOW_SIZE: number}))


def _empty_data(client: RawClient, number: int) -> None:
    if number:
        client.data(1, b"")
    else:
        client.call(1, STREAM)


@pytest.mark.parametrize("send", [_reset_at_once, _headers_for_ever, _pings, _settings, _empty_data])
async def test_who_asks_for_much_and_wants_nothing_is_hung_up_on(send: Callable[[RawClient, int], None]) -> None:
    async with serving() as (port, _, server), raw_client(port) as client:
        one = await _connection(server)
        sent = 0
        while not one.closed.done():
            assert sent < 100_000
            for _ in range(500):
                send(client, sent)
                sent += 1
            await asyncio.sleep(0.001)
        await client.rest()
        async with raw_client(port) as other:
            assert await other.echo(1, b"on it goes") == b"on it goes"
        await eventually(lambda: not server.calls_under_way)


async def test_who_gets_answers_may_ask_for_much() -> None:
    async with serving() as (port, _, _), raw_client(port) as client:
        for number in range(8_000):
            stream = 2 * number + 1
            client.call(stream)
            client.data(stream, prefixed(b"x"))
            client.data(stream, b"", ended=True)
            client.send(frames.frame(frames.PING, 0, 0, bytes(8)) + frames.window_update(0, 6))
            if number % 100 == 99:
                assert (await client.answer(stream)).status == 0


async def test_a_peer_that_reads_nothing_does_not_get_refusals_for_ever() -> None:
    async with serving() as (port, _, server), raw_client(port) as client:
        one = await _connection(server)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        most, stream = 0, 1
        while not one.closed.done():
            assert stream < 100_000
            for _ in range(100):
                client.call(stream, "/test.Echo/Lengthy")
                client.message(stream, b"")
                stream += 2
            await asyncio.sleep(0.001)
            most = max(most, one.unsent_bytes)
        assert most < 5 << 20
        async with raw_client(port) as other:
            assert await other.echo(1, b"on it goes") == b"on it goes"


async def _connection(server: GrpcServer) -> connection.Connection:
    await eventually(lambda: server.connections)
    (one,) = server.connections
    return one


async def test_a_silent_peer_is_asked_and_left() -> None:
    async with serving(keepalive_s=0.05, keepalive_timeout_s=1.0) as (port, _, _), raw_client(port) as client:
        for _ in range(3):
            ping = await client.until(frames.PING)
            client.send(frames.frame(frames.PING, frames.ACK, 0, ping.payload))
        await client.until(frames.PING)
        assert all(frame.kind == frames.PING for frame in await client.rest())


# Where it listens.


async def test_it_listens_on_each_kind_of_address(tmp_path: Path) -> None:
    for address in ("localhost:0", "[::]:0", f"unix:{tmp_path / 'socket'}"):
        server = GrpcServer(Limits())
        server.add_generic_rpc_handlers([Echo().handler()])
        port = await server.start(address)
        target = address if not port else f"127.0.0.1:{port}"
        async with insecure_channel(target) as channel:
            assert await channel.unary_unary(ECHO)(b"hello") == b"hello"
        await server.stop()
        assert not (tmp_path / "socket").exists()


async def test_a_port_is_had_once_or_shared() -> None:
    async with serving(reuse_port=True) as (port, _, _):
        for reuse_port in (True, False):
            other = GrpcServer(Limits(reuse_port=reuse_port))
            if reuse_port:
                assert await other.start(f"127.0.0.1:{port}") == port
            else:
                with pytest.raises(OSError, match="in use"):
                    await other.start(f"127.0.0.1:{port}")
            await other.stop()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        await GrpcServer(Limits()).start(f"127.0.0.1:{taken.getsockname()[1]}")
