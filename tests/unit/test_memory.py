"""Memory that two processes share, and the messages that say what lies in it."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest

from modelport.tensors import DTYPES, STRING, pack_strings
from modelport_server.engines import _messages as messages
from modelport_server.engines._memory import ALIGNMENT, Region, aligned
from modelport_server.tensors import RawTensor


def _raw(name: str, dtype: str, *numbers: int) -> RawTensor:
    kind = DTYPES[dtype]
    return RawTensor(name, kind, (len(numbers),), np.array(numbers, kind.storage).tobytes())


TENSORS = (
    _raw("a", "float32", 1, 2, 3),
    _raw("b", "int8", 4),
    RawTensor("none", DTYPES["int64"], (0,), b""),
    RawTensor("text", STRING, (2,), pack_strings([b"ab", b""])),
)


def test_what_one_side_writes_the_other_reads() -> None:
    ours = Region.create("test")
    theirs = Region(os.dup(ours.fd))
    entries, size = messages.describe(TENSORS)
    messages.write(ours, TENSORS, entries, size)
    got = messages.read(theirs, entries, size)
    assert [(t.name, t.dtype, t.shape, bytes(t.data)) for t in got] == [
        (t.name, t.dtype, t.shape, bytes(t.data)) for t in TENSORS
    ]
    assert all(entry[3] % ALIGNMENT == 0 for entry in entries)
    del got
    for region in (ours, theirs):
        region.close()


def test_a_region_grows_under_views_that_are_held() -> None:
    region = Region.create("test")
    before = region.at_least(10)
    before[:3] = b"abc"
    after = region.at_least(1_000_000)
    assert bytes(after[:3]) == b"abc"
    after[:3] = b"xyz"
    assert bytes(before[:3]) == b"xyz"
    assert len(region.at_least(5)) >= 1_000_000
    region.close()
    assert bytes(before[:3]) == b"xyz"


def test_closing_gives_the_file_back() -> None:
    region = Region.create("test")
    region.at_least(1)
    region.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(region.fd)


@pytest.mark.parametrize(("offset", "start"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_tensors_start_at_cache_lines(offset: int, start: int) -> None:
    assert aligned(offset) == start


def test_messages_arrive_whole_and_in_order() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        sent: list[messages.Message] = [{"op": "run", "id": number, "inputs": []} for number in range(5)]
        for message in sent:
            left.send(messages.pack(message))
        assert [messages.receive(right) for _ in sent] == sent
        left.close()
        assert messages.receive(right) is None
