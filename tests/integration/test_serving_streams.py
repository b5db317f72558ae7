"""Streams of Predict: order, names left out, versions that change meanwhile, and peers that do not read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from modelport.tensors import decode
from modelport.v1 import prediction_pb2 as pb
from modelport_registry import Golden, Registry
from tests.conftest import versioned_golden
from tests.support.rollouts import AT_ONCE
from tests.support.rpc import Stream, call, engines, footprint, open_channel, request, wait_back
from tests.support.server import ServerProcess, run_server, wait_for

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
MIB = 1 << 20
PINNED_LIMIT_S = 8.0

Publish = Callable[[str, int], None]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def publish(scratch: Path, saved_models: Path) -> Publish:
    def publish(model: str, tag: int) -> None:
        golden: list[Golden] = [versioned_golden(tag)]
        Registry(scratch / "registry").publish(model, saved_models / f"versioned-{tag}", golden=golden)

    return publish


@pytest.fixture(scope="module")
def server(scratch: Path, publish: Publish) -> Generator[ServerProcess]:
    publish("toy", 1)
    limit = ("--pinned-stream-limit", str(PINNED_LIMIT_S))
    with run_server(scratch / "registry", scratch, "--threads", "1", *limit) as server:
        server.wait_serving("toy", 1)
        yield server
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]
    assert "never retrieved" not in log, log[-4000:]


@pytest.fixture
def channel(server: ServerProcess) -> Generator[grpc.Channel]:
    with open_channel(server.address) as channel:
        yield channel


def _message(number: int, model: str = "", rows: int = 1) -> pb.PredictRequest:
    return request(model, {"x": np.full((rows, 4), number, np.float32)}, sequence=number)


def _check(answer: pb.PredictStreamResponse, number: int, version: int = 1) -> None:
    response = answer.response
    assert answer.WhichOneof("kind") == "response", answer
    assert (response.model, response.version, response.sequence) != ("", 0, 0)
    assert response.sequence == number
    assert response.version == version
    outputs = {tensor.name: decode(tensor) for tensor in response.outputs}
    assert (outputs["y"] == number * 2).all()


def test_a_stream_closed_without_a_message_is_ok(channel: grpc.Channel) -> None:
    with Stream(channel) as stream:
        stream.close()
        assert stream.rest() == []
        assert stream.code() is OK


def test_five_thousand_messages_come_back_in_order(channel: grpc.Channel) -> None:
    count = 5000
    with Stream(channel, timeout_s=250) as stream:
        stream.send(_message(1, "toy"))
        for number in range(2, count + 1):
            stream.send(_message(number, rows=1 + number % 5))
        stream.close()
        answers = stream.rest()
        assert len(answers) == count
        for number, answer in enumerate(answers, 1):
            _check(answer, number)
        assert stream.code() is OK


def test_names_may_be_left_out_after_the_first_message(channel: grpc.Channel) -> None:
    x = np.ones((1, 4), np.float32)
    with Stream(channel) as stream:
        first = request("toy", {"x": x}, version=1, signature="serving_default", outputs=["y"])
        answers = [stream.ask(first).response, stream.ask(request("", {"x": x})).response]
        assert [answer.model for answer in answers] == ["toy", "toy"]
        assert [[tensor.name for tensor in answer.outputs] for answer in answers] == [["y"], ["version", "y"]]


def test_a_message_that_names_another_version_of_a_pinned_stream_is_wrong(channel: grpc.Channel) -> None:
    x = np.ones((1, 4), np.float32)
    with Stream(channel) as stream:
        _check(stream.ask(_message(1, "toy")), 1)
        for message in (
            request("other", {"x": x}, sequence=2),
            request("toy", {"x": x}, sequence=3, version=7),
            request("toy", {"x": x}, sequence=4, alias="stable"),
        ):
            error = stream.ask(message).error
            assert (error.code, error.sequence) == (INVALID, message.sequence)
            assert "version 1 of 'toy'" in error.message
        _check(stream.ask(_message(5, "toy")), 5)


def test_a_first_message_that_fails_does_not_end_the_stream(channel: grpc.Channel) -> None:
    with Stream(channel) as stream:
        assert stream.ask(_message(1, "nothing")).error.code == NOT_FOUND
        assert stream.ask(_message(2)).error.code == NOT_FOUND
        _check(stream.ask(_message(3, "toy")), 3)
        _check(stream.ask(_message(4, "toy")), 4)


def test_errors_keep_their_place_among_answers(channel: grpc.Channel) -> None:
    with Stream(channel) as stream:
        stream.send(_message(1, "toy"))
        for number in range(2, 200):
            stream.send(b"\xff\xff" if number % 7 == 0 else _message(number))
        stream.close()
        for number, answer in enumerate(stream.rest(), 1):
            if number % 7 == 0:
                assert answer.error.code == INVALID
            else:
                _check(answer, number)


def test_a_call_larger_than_a_batch_in_a_stream(channel: grpc.Channel) -> None:
    with Stream(channel) as stream:
        _check(stream.ask(_message(1, "toy", rows=5000)), 1)
        _check(stream.ask(_message(2, rows=1)), 2)


def test_pinned_streams_stay_and_followers_move(server: ServerProcess, scratch: Path, publish: Publish) -> None:
    publish("moving", 1)
    Registry(scratch / "registry").set_policy("moving", AT_ONCE)
    server.wait_serving("moving", 1)
    with (
        open_channel(server.address) as channel,
        Stream(channel) as pinned,
        Stream(channel) as named,
        Stream(channel) as follower,
    ):
        for stream in (pinned, follower):
            _check(stream.ask(_message(1, "moving"), follow=stream is follower), 1)
        first = _message(1, "moving")
        first.version = 1
        _check(named.ask(first), 1)
        publish("moving", 2)
        server.wait_serving("moving", 2)
        _check(follower.ask(_message(2)), 2, version=2)
        _check(pinned.ask(_message(2)), 2, version=1)
        _check(named.ask(_message(2)), 2, version=1)
        with Stream(channel) as new:
            _check(new.ask(_message(1, "moving")), 1, version=2)
        assert call(channel, _message(1, "moving")).response.version == 2
        _check_ends_in_band(pinned)
        _check_ends_in_band(named)
        server.wait_state("moving", 1, "RETIRED")
        _check(follower.ask(_message(3)), 3, version=2)
        follower.close()
        assert follower.rest() == []
        assert follower.code() is OK
    front = psutil.Process(server.process.pid)
    wait_for(lambda: len(engines(front)) == 2, "the old version's engine to end")


def _check_ends_in_band(stream: Stream) -> None:
    """Goes on asking: everything is answered by version 1 until the stream says that it is retired."""
    number = 3
    while (answer := stream.ask(_message(number))).HasField("response"):
        _check(answer, number, version=1)
        number += 1
    assert answer.notice.reason == pb.StreamNotice.REASON_VERSION_RETIRED
    assert answer.notice.version == 1
    assert stream.rest() == []
    assert stream.code() is OK


class Sender(threading.Thread):
    """Sends without reading, as far as the server lets it, and counts."""

    def __init__(self, channel: grpc.Channel, count: int, rows: int) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self._count = count
        self._rows = rows
        method = getattr(channel, "stream_stream")  # noqa: B009 - the type stubs ask for a serialiser
        self.call = method("/modelport.v1.PredictionService/PredictStream")(self._messages(), timeout=250)

    def _messages(self) -> Generator[bytes]:
        for number in range(1, self._count + 1):
            self.sent = number
            message = _message(number, "toy", self._rows)
            yield pb.PredictStreamRequest(request=message).SerializeToString()


def _sent_when_it_stops(sender: Sender) -> int:
    """Returns how many messages were sent once no more are taken."""
    seen = [-1]

    def stopped() -> bool:
        seen.append(sender.sent)
        return len(seen) > 50 and seen[-1] == seen[-50]

    wait_for(stopped, "the stream to be held back")
    return sender.sent


def test_a_stream_that_does_not_read_is_held_back(server: ServerProcess) -> None:
    front = psutil.Process(server.process.pid)
    rows, count = 6400, 800  # 100 KB a message, 80 MB in all
    with open_channel(server.address) as other:
        before = footprint(front)
        with open_channel(server.address) as channel:
            sender = Sender(channel, count, rows)
            _check(pb.PredictStreamResponse.FromString(next(sender.call)), 1)
            sent = _sent_when_it_stops(sender)
            assert sent < 300
            assert footprint(front).rss < before.rss + 50 * MIB
            _check(pb.PredictStreamResponse(response=call(other, _message(1, "toy")).response), 1)
            for number in range(2, count + 1):
                _check(pb.PredictStreamResponse.FromString(next(sender.call)), number)
            assert sender.call.code() is OK
        wait_back(front, before, rss_bytes=50 * MIB, fds=1, threads=2)


def test_streams_that_are_cut_leave_nothing_behind(server: ServerProcess) -> None:
    front = psutil.Process(server.process.pid)

    def cut(count: int) -> None:
        for _ in range(count):
            with open_channel(server.address) as channel, Stream(channel) as stream:
                _check(stream.ask(_message(1, "toy")), 1)
                for number in range(2, 20):
                    stream.send(_message(number))
                stream.next()

    cut(20)
    before = footprint(front)
    cut(100)
    wait_back(front, before, rss_bytes=4 * MIB, fds=1, threads=1)
    toy = server.version("toy", 1)
    assert toy.state == toy.STATE_AVAILABLE
