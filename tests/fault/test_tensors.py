"""Every mistake that a tensor can hold: what its caller is told, and that nobody else notices."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Generator

import grpc
import numpy as np
import psutil
import pytest

from modelport.tensors import DTYPES, encode, pack_strings
from modelport.v1 import prediction_pb2 as pb
from modelport.v1 import tensor_pb2
from tests.support.rpc import (
    Canary,
    Outcome,
    Stream,
    call,
    canary,
    footprint,
    open_channel,
    request,
    tensor,
    wait_back,
)
from tests.support.zoo import Zoo

INVALID = grpc.StatusCode.INVALID_ARGUMENT
OK = grpc.StatusCode.OK
MIB = 1 << 20
FLOAT32, FLOAT64, INT32, STRING, BFLOAT16, BOOL = (
    DTYPES[name].number for name in ("float32", "float64", "int32", "string", "bfloat16", "bool")
)
LEAKS = re.compile(r"Traceback|File \"|\.py\b|/tmp|/root|/work|/home|site-packages|\bpid\b|0x[0-9a-f]{6,}")


@pytest.fixture(scope="module")
def process(zoo: Zoo) -> Generator[psutil.Process]:
    """The front; in the end the same process must live and hold what it held."""
    children = {child.pid for child in zoo.process.children()}
    before = footprint(zoo.process)
    yield zoo.process
    assert zoo.process.is_running()
    assert {child.pid for child in zoo.process.children()} == children
    mapped_on_first_use = 4 * len(children)  # regions of shared memory, each with a file descriptor
    wait_back(zoo.process, before, rss_bytes=64 * MIB, fds=2 + mapped_on_first_use, threads=2)


@pytest.fixture(scope="module")
def bird(zoo: Zoo, process: psutil.Process) -> Generator[Canary]:
    """A caller beside all of these tests."""
    with canary(zoo.server.address, "canary", 1) as bird:
        yield bird


@pytest.fixture
def channel(zoo: Zoo, bird: Canary) -> Generator[grpc.Channel]:
    with open_channel(zoo.server.address) as channel:
        yield channel


def _one(model: str, *inputs: tensor_pb2.Tensor, **fields: object) -> pb.PredictRequest:
    return pb.PredictRequest(model=model, inputs=inputs, **fields)  # type: ignore[arg-type]


def _x(dtype: int, shape: list[int], data: bytes = b"") -> pb.PredictRequest:
    """Returns a call of the canary's model: x float32 [n, 4]."""
    return _one("canary", tensor("x", dtype, shape, data))


def _text(shape: list[int], data: bytes) -> pb.PredictRequest:
    return _one("strings", tensor("text", STRING, shape, data))


def _offsets(*numbers: int, rest: bytes = b"") -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers) + rest


A, B = np.ones((2, 3), np.float32), np.ones(2, np.int32)
GOOD = request("canary", {"x": np.ones((1, 4), np.float32)})

MISTAKES: dict[str, tuple[pb.PredictRequest, list[str]]] = {
    "2^31 by 2^31": (_x(FLOAT32, [2**31, 2**31], bytes(4)), ["'x'", "2147483648"]),
    "a product that wraps to 0": (_x(FLOAT32, [2**32, 2**32]), ["'x'", "over 10^19"]),
    "a product that wraps to 4 bytes": (_x(FLOAT32, [2**62 + 1, 4], bytes(16)), ["'x'"]),
    "nothing of a huge shape": (_x(FLOAT32, [2**40, 0]), ["'x'", "[?, 4]"]),
    "nothing of a shape larger than any array": (_x(FLOAT32, [2**62, 2**62, 0]), ["'x'", "larger than any array"]),
    "a negative dim": (_x(FLOAT32, [-1, 4], bytes(16)), ["'x'", "negative", "-1"]),
    "two negative dims": (_x(FLOAT32, [-1, -4], bytes(16)), ["'x'", "negative"]),
    "rank 255": (_x(FLOAT32, [1] * 255, bytes(4)), ["'x'", "255"]),
    "rank 1,000,000": (_x(FLOAT32, [1] * 1_000_000, bytes(4)), ["'x'", "1000000"]),
    "a dtype that is none": (_x(0, [1, 4], bytes(16)), ["'x'", "data type 0"]),
    "a dtype of the future": (_x(99, [1, 4], bytes(16)), ["'x'", "99"]),
    "resource, as TensorFlow numbers it": (_x(20, [1, 4], bytes(16)), ["'x'", "20"]),
    "variant, as TensorFlow numbers it": (_x(21, [1, 4], bytes(16)), ["'x'", "21"]),
    "no elements of a bad dtype": (_x(99, [0, 4]), ["'x'", "99"]),
    "float64 for float32": (request("canary", {"x": np.ones((1, 4))}), ["'x'", "float32", "float64"]),
    "int32 for float32": (request("canary", {"x": np.ones((1, 4), np.int32)}), ["'x'", "float32", "int32"]),
    "float32 for bfloat16": (request("bfloat16", {"x": np.ones((1, 2), np.float32)}), ["'x'", "bfloat16"]),
    "strings for numbers": (request("canary", {"x": np.array([["a"] * 4])}), ["'x'", "float32", "string"]),
    "numbers for strings": (request("strings", {"text": np.ones(2, np.uint8)}), ["'text'", "string", "uint8"]),
    "rank too low": (request("canary", {"x": np.ones(4, np.float32)}), ["'x'", "[?, 4]", "[4]"]),
    "rank too high": (request("canary", {"x": np.ones((1, 4, 1), np.float32)}), ["'x'", "[?, 4]", "[1, 4, 1]"]),
    "a scalar": (request("canary", {"x": np.ones((), np.float32)}), ["'x'", "[?, 4]", "[]"]),
    "inner dim": (request("canary", {"x": np.ones((1, 5), np.float32)}), ["'x'", "[?, 4]", "[1, 5]"]),
    "fixed first dim": (request("no_batch", {"matrix": np.ones((2, 3), np.float32)}), ["'matrix'", "[3, 3]"]),
    "a byte short": (_x(FLOAT32, [1, 4], bytes(15)), ["'x'", "16", "15"]),
    "a byte long": (_x(FLOAT32, [1, 4], bytes(17)), ["'x'", "16", "17"]),
    "no data": (_x(FLOAT32, [1, 4]), ["'x'", "16", "0"]),
    "no input": (_one("canary"), ["'x'", "missing"]),
    "a missing input": (request("two_inputs", {"a": A}), ["'b'", "missing"]),
    "an extra input": (request("canary", {"x": A[:, :1].repeat(4, 1), "z": B}), ["'z'", "'x'"]),
    "an input twice": (_one("two_inputs", encode("a", A), encode("a", A), encode("b", B)), ["'a'", "twice"]),
    "an input with a name of 1 MB": (_one("canary", tensor("x" * MIB, FLOAT32, [1, 4], bytes(16))), ["no input 'xxx"]),
    "an unknown output": (request("canary", {"x": A}, outputs=["nope"]), ["'nope'", "'version', 'y'"]),
    "an unknown signature": (request("canary", {"x": A}, signature="nope"), ["nope", "'serving_default'"]),
    "a signature of 1 MB": (request("canary", {"x": A}, signature="s" * MIB), ["signature"]),
    "inputs that disagree on rows": (request("two_inputs", {"a": A, "b": B[:1]}), ["'a' and 'b'", "2 and 1"]),
    "no rows beside one": (request("two_inputs", {"a": A[:0], "b": B[:1]}), ["'a' and 'b'", "0 and 1"]),
    "offsets that do not start at 0": (_text([1], _offsets(1, 2, rest=b"ab")), ["'text'", "offsets"]),
    "offsets that fall": (_text([2], _offsets(0, 2, 1, rest=b"a")), ["'text'", "offsets"]),
    "offsets past the end": (_text([1], _offsets(0, 9, rest=b"ab")), ["'text'", "offsets"]),
    "offsets before the end": (_text([1], _offsets(0, 1, rest=b"ab")), ["'text'", "offsets"]),
    "offsets of 4 GiB": (_text([1], _offsets(0, 2**32 - 1)), ["'text'", "offsets"]),
    "too few offsets": (_text([4], _offsets(0, 0)), ["'text'", "20", "8"]),
    "no offsets for no strings": (_text([0], b""), ["'text'", "4", "0"]),
    "2^62 strings": (_text([2**62], _offsets(0, 0)), ["'text'"]),
    "model ../x": (_one("../x"), ["../x", "model name"]),
    "model a/b": (_one("a/b"), ["a/b", "model name"]),
    "model ..\\x": (_one("..\\x"), ["model name"]),
    "model %252e": (_one("%252e"), ["%252e", "model name"]),
    "model with NUL": (_one("canary\0"), ["model name"]),
    "model with lines": (_one("a\nb\r\x1b[31m"), ["model name"]),
    "model of 1 MB": (_one("m" * MIB), ["model name"]),
    "no model": (_one(""), ["model name"]),
    "alias ../x": (_one("canary", alias="../x"), ["../x", "alias"]),
    "a negative row for a model that takes none": (request("bad_rows", {"x": np.array([-1.0], np.float32)}), ["x is"]),
}


def _check(outcome: Outcome, words: list[str]) -> None:
    """The oracle's part on messages."""
    assert outcome.code is INVALID, (outcome.code, outcome.message)
    for word in words:
        assert word in outcome.message
    assert 0 < len(outcome.message.encode()) <= 1024
    assert "\n" not in outcome.message
    assert not LEAKS.search(outcome.message), outcome.message


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_the_callers_alone(channel: grpc.Channel, name: str) -> None:
    message, words = MISTAKES[name]
    _check(call(channel, message), words)


def test_the_same_mistakes_in_a_stream_are_answered_in_it_and_it_goes_on(channel: grpc.Channel) -> None:
    with Stream(channel) as stream:
        answer = stream.ask(GOOD, follow=True)
        assert answer.WhichOneof("kind") == "response", answer
        for number, (message, words) in enumerate(MISTAKES.values()):
            message = pb.PredictRequest.FromString(message.SerializeToString())
            message.sequence = number + 1
            if not message.model:
                continue  # may be left out in a stream
            error = stream.ask(message).error
            assert error.sequence == number + 1
            _check(Outcome(_code(error.code), error.message), words)
        answer = stream.ask(GOOD)
        assert answer.WhichOneof("kind") == "response"
        stream.close()
        assert stream.rest() == []
        assert stream.code() is OK


def _code(number: int) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == number)


UNDECODABLE = {
    "noise": b"\xff\xff\xff\xff",
    "a length past the end": b"\x0a\x7f",
    "a field cut short": GOOD.SerializeToString()[:-3],
    "text that is not UTF-8": b"\x0a\x02\xff\xfe",
    "groups nested 10,000 deep": b"\x7b" * 10_000 + b"\x7c" * 10_000,
    "tensors nested 10,000 deep": b"\x2a\x80\x80\x01" * 10_000,
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_undecodable_bytes(channel: grpc.Channel, name: str) -> None:
    _check(call(channel, UNDECODABLE[name]), ["PredictRequest"])


def test_undecodable_bytes_in_a_stream(channel: grpc.Channel) -> None:
    with Stream(channel) as stream:
        for raw in UNDECODABLE.values():
            error = stream.ask(raw).error
            assert error.sequence == 0
            _check(Outcome(_code(error.code), error.message), [])
        assert stream.ask(GOOD).response.version == 1


@pytest.mark.parametrize("name", ["unknown", "x" * 64, "con", "zoo"])
def test_a_legal_name_of_nothing_is_not_found(channel: grpc.Channel, name: str) -> None:
    outcome = call(channel, _one(name))
    assert outcome.code is grpc.StatusCode.NOT_FOUND
    assert name[:20] in outcome.message


def test_unknown_versions_and_aliases_are_not_found(channel: grpc.Channel) -> None:
    for fields in ({"version": 99}, {"version": 0}, {"version": 2**64 - 1}, {"alias": "nope"}):
        outcome = call(channel, _one("canary", **fields))
        assert outcome.code is grpc.StatusCode.NOT_FOUND, fields


def test_names_open_no_file(channel: grpc.Channel, zoo: Zoo) -> None:
    """Reading a folder for the first time since it was written changes its access time, even under relatime."""
    outside = zoo.registry.root.parent / "outside"
    version = outside / "1"
    version.mkdir(parents=True)
    before = [path.stat().st_atime_ns for path in (outside, version)]
    for name in ("../outside", "../outside/1", "..", ".", "../registry/canary", "/etc/passwd", "canary/1", "./canary"):
        _check(call(channel, _one(name)), ["model name"])
    assert [path.stat().st_atime_ns for path in (outside, version)] == before
    assert not any(str(outside) in file.path for file in zoo.process.open_files())


@pytest.mark.parametrize(
    "items",
    [[b""] * 20_000, [b"\xff\xfe\x00", b"\x80"], ["\u00e4\u4e2d".encode()], [b"x" * MIB]],
    ids=["empty ones", "not UTF-8", "UTF-8", "a large one"],
)
def test_strings_are_bytes(channel: grpc.Channel, items: list[bytes]) -> None:
    outcome = call(channel, _text([len(items)], pack_strings(items)))
    assert outcome.code is OK, outcome.message
    assert outcome.outputs["doubled"].tolist() == [item * 2 for item in items]


@pytest.mark.slow
def test_a_million_empty_strings(channel: grpc.Channel) -> None:
    outcome = call(channel, _text([1_000_000], pack_strings([b""] * 1_000_000)), timeout_s=250)
    assert outcome.code is OK, outcome.message
    assert outcome.outputs["length"].shape == (1_000_000,)
    assert not outcome.outputs["length"].any()


HUGE_CLAIMS: dict[str, Callable[[], pb.PredictRequest]] = {
    "2^31 by 2^31": lambda: _x(FLOAT32, [2**31, 2**31], bytes(4)),
    "wraps": lambda: _x(FLOAT32, [2**32, 2**32]),
    "strings": lambda: _text([2**40], _offsets(0, 0)),
    "rank": lambda: _x(FLOAT32, [1] * 255, bytes(4)),
    "nothing, but many rows": lambda: _x(FLOAT32, [2**40, 0]),
}


@pytest.mark.parametrize("name", HUGE_CLAIMS)
def test_a_claim_allocates_nothing(channel: grpc.Channel, zoo: Zoo, name: str) -> None:
    message = HUGE_CLAIMS[name]()
    for _ in range(200):
        assert call(channel, message).code is INVALID
    before = footprint(zoo.process)
    for _ in range(200):
        call(channel, message)
    wait_back(zoo.process, before, rss_bytes=MIB, fds=1, threads=1)


def test_many_mistakes_leave_nothing_behind(channel: grpc.Channel, zoo: Zoo) -> None:
    small = [message for message, _ in MISTAKES.values() if message.ByteSize() < 10_000]
    for message in small * 3:
        call(channel, message)
    before = footprint(zoo.process)
    for message in small * 20:
        assert call(channel, message).code is INVALID
    wait_back(zoo.process, before, rss_bytes=4 * MIB, fds=1, threads=1)
