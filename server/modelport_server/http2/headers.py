"""What gRPC has in HTTP/2's headers: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from hpack import Decoder, HPACKError
from hpack.table import HeaderTable

from modelport_server.http2.frames import COMPRESSION_ERROR, ProtocolError

if TYPE_CHECKING:
    import grpc

MAX_LIST_BYTES = 16 * 1024
"""The largest list of headers that a call may have, counted as HTTP/2 does."""
MAX_BLOCK_BYTES = 64 * 1024
"""The most that its frames may have together."""

_READ_BYTES = 256 * 1024
"""The largest list that is read at all: beyond that the connection ends, and not the call alone."""
_HEADER_BYTES = 32
"""What each header counts besides its name and value."""
_KNOWN_BLOCKS = 64
_KNOWN_BYTES = 2048
"""The largest block that is kept."""
_CONTENT_TYPE = re.compile(rb"application/grpc([+;].*)?")
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What a server has to know of a call's headers."""

    path: str
    timeout_s: float | None = None
    http_status: int = 200
    """What the caller is answered with in HTTP, if this is no gRPC."""
    malformed: str = ""
    """What is wrong with a header of gRPC's."""
    too_large: bool = False
    """Whether there is more of them than is taken."""
    encoding: str = "identity"
    """How the caller compresses messages."""


class _Table(HeaderTable):
    """A table of headers that says whether it has changed."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)


class HeaderReader:
    """Reads one connection's blocks of headers.

    Callers send the same block again and again: what one came to is kept until another one changes the table that
    both refer to.
    """

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=_READ_BYTES)
        self._table = _Table()
        self._decoder.header_table = self._table
        self._known: dict[bytes, RequestHead] = {}

    @property
    def _state(self) -> tuple[int, int, int]:
        """Differs once the table has changed: by a header that was added, or by others that had to go."""
        return self._table.changes, self._table.maxsize, len(self._table.dynamic_entries)

    def read(self, block: bytes) -> RequestHead:
        """Returns what a block says.

        Raises:
            ProtocolError: if it can't be decoded, or is too large.
        """
        found = self._known.get(block)
        if found is not None:
            return found
        before = self._state
        try:
            headers = self._decoder.decode(block, raw=True)
        except HPACKError as error:
            raise ProtocolError(COMPRESSION_ERROR, f"headers that can't be read: {type(error).__name__}") from error
        found = _request_head(list(headers))
        if self._state != before:
            self._known.clear()
        elif len(self._known) < _KNOWN_BLOCKS and len(block) <= _KNOWN_BYTES:
            self._known[block] = found
        return found


def _request_head(headers: Collection[tuple[bytes, bytes]]) -> RequestHead:
    if sum(len(name) + len(value) + _HEADER_BYTES for name, value in headers) > MAX_LIST_BYTES:
        return RequestHead("", too_large=True)
    values = dict(headers)
    if values.get(b":method") != b"POST":
        return RequestHead("", http_status=405)
    if _CONTENT_TYPE.fullmatch(values.get(b"content-type", b"")) is None:
        return RequestHead("", http_status=415)
    path = values.get(b":path", b"").decode("latin-1")
    encoding = values.get(b"grpc-encoding", b"identity").decode("latin-1")
    text = values.get(b"grpc-timeout")
    if text is None:
        return RequestHead(path, encoding=encoding)
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        return RequestHead(path, malformed="grpc-timeout is no time")
    return RequestHead(path, int(match[1]) * _UNITS_S[match[2]], encoding=encoding)


def _length(value: int, bits: int, first: int = 0) -> bytes:
    """Returns a number as HPACK has it, https://www.rfc-editor.org/rfc/rfc7541#section-5.1."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((first | value,))
    encoded = bytearray((first | most,))
    value -= most
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(name: str, value: str) -> bytes:
    """Returns a header that neither side has to remember."""
    key, text = name.encode(), value.encode("latin-1")
    return b"\x00" + _length(len(key), 7) + key + _length(len(text), 7) + text


HEAD = b"\x88" + _field("content-type", "application/grpc")
"""The headers that every answer begins with: 200, whatever becomes of the call."""
OK = _field("grpc-status", "0")
"""The trailers of a call that went well."""


def plain(status: int) -> bytes:
    """Returns the headers of an answer to what is no gRPC."""
    return _field(":status", str(status))


def trailers(code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
    """Returns the trailers of a call that ended with a status."""
    number: int = code.value[0]
    block = _field("grpc-status", str(number))
    if details:
        block += _field("grpc-message", quote(details, safe=_PRINTABLE))
    return block + b"".join(_field(name, value) for name, value in metadata)
