"""What the front and an engine process say to each other over their socket pair.

Each message is one JSON object in one packet; tensors lie in the shared memory of the slot that the
message names. The front sends ``load`` once, with the order in the first slot's memory, then ``run`` for
each batch, and ``compare`` for each copy of a call, with the answer that the call got. The engine process
answers with ``begin`` and ``end`` for each gate and then, if all were passed, ``ready``, or ``unreadable``;
with ``done`` or ``failed`` for each ``run``, and ``compared`` or ``failed`` for each ``compare``. A ``warning``
may come at any time.
"""

from __future__ import annotations

import json
import mmap
import socket
import threading
from collections.abc import Sequence
from typing import Any

from modelport.tensors import DTYPES_BY_NUMBER
from modelport_server.engines._memory import Region, aligned
from modelport_server.tensors import Gathered, RawTensor

MAX_MESSAGE_BYTES = 160_000
Message = dict[str, Any]
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder()


class MessageTooLargeError(ValueError):
    """A message names too many tensors to fit into a packet."""


def pack(message: Message) -> bytes:
    """Returns ``message`` as a packet.

    Raises:
        MessageTooLargeError: if it takes more than ``MAX_MESSAGE_BYTES``.
    """
    packet = _ENCODER.encode(message).encode()
    if len(packet) > MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(f"a message of {len(packet)} bytes is too large; at most {MAX_MESSAGE_BYTES} fit")
    return packet


def unpack(packet: bytes | memoryview) -> Message:
    """Returns the message in a packet."""
    message: Message = _DECODER.decode(str(packet, "utf-8"))
    return message


class _Room(threading.local):
    """Where a thread receives packets: to make room for the largest each time takes longer than to receive one."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, MAX_MESSAGE_BYTES, access=mmap.ACCESS_COPY))  # a fork has its own


_room = _Room()


def receive(channel: socket.socket) -> Message | None:
    """Returns the next message; None when the other side is gone."""
    size = channel.recv_into(_room.memory)
    return unpack(_room.memory[:size]) if size else None


def write_document(region: Region, document: Message) -> int:
    """Puts a JSON object of any size into shared memory, and returns its size in bytes."""
    data = json.dumps(document).encode()
    region.at_least(len(data))[: len(data)] = data
    return len(data)


def read_document(region: Region, size: int) -> Message:
    """Returns the JSON object that the other side put there."""
    return unpack(bytes(region.at_least(size)[:size]))


def describe(tensors: Sequence[RawTensor | Gathered]) -> tuple[list[list[Any]], int]:
    """Returns where ``tensors`` lie when they are put one after another, and the bytes that they take."""
    entries: list[list[Any]] = []
    end = 0
    for tensor in tensors:
        start = aligned(end)
        end = start + sum(map(len, tensor.pieces))
        entries.append([tensor.name, tensor.dtype.number, tensor.shape, start, end - start])
    return entries, end


def write(region: Region, tensors: Sequence[RawTensor | Gathered], entries: Sequence[Sequence[Any]], size: int) -> None:
    """Copies ``tensors`` to the places that ``describe`` gave."""
    memory = region.at_least(size)
    for tensor, entry in zip(tensors, entries, strict=True):
        at = entry[3]
        for piece in tensor.pieces:
            memory[at : at + len(piece)] = piece
            at += len(piece)


def read(region: Region, entries: Sequence[Sequence[Any]], size: int) -> tuple[RawTensor, ...]:
    """Returns the tensors that the other side wrote, as views of the shared memory."""
    memory = region.at_least(size)
    return tuple(
        RawTensor(name, DTYPES_BY_NUMBER[number], tuple(shape), memory[start : start + length])
        for name, number, shape, start, length in entries
    )
