"""gRPC's headers in HTTP/2."""

from __future__ import annotations

from urllib.parse import unquote

import grpc
import pytest
from hpack import Decoder, Encoder
from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from modelport_server.http2 import headers
from modelport_server.http2.frames import ProtocolError
from modelport_server.http2.headers import HeaderReader, RequestHead

PATHS = ["/a.B/C", "/a.B/D", "/" + "x" * 300]
TABLES = [None, 0, 100, 4096]
TIMEOUTS = [None, "1S", "20m", "1234567u", "7H"]


def _fields(path: str, timeout: str | None, *, indexed: bool) -> list[HeaderTuple]:
    kind = HeaderTuple if indexed else NeverIndexedHeaderTuple
    fields = {":method": "POST", ":path": path, "content-type": "application/grpc", "user-agent": "me"}
    if timeout is not None:
        fields["grpc-timeout"] = timeout
    return [kind(name, value) for name, value in fields.items()]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(PATHS), st.sampled_from(TIMEOUTS), st.booleans(), st.sampled_from([None, 0, 100, 4096])
        ),
        max_size=30,
    )
)
def test_what_was_read_before_is_what_it_would_be_read_as_now(
    calls: list[tuple[str, str | None, bool, int | None]],
) -> None:
    encoder, reader = Encoder(), HeaderReader()
    for path, timeout, indexed, table_bytes in calls:
        if table_bytes is not None:
            encoder.header_table_size = table_bytes
        for _ in range(3):
            head = reader.read(encoder.encode(_fields(path, timeout, indexed=indexed)))
            seconds = {None: None, "1S": 1.0, "20m": 0.02, "1234567u": 1.234567, "7H": 25200.0}[timeout]
            assert head.path == path
            assert head.timeout_s == pytest.approx(seconds)


def test_a_block_that_repeats_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, reader = Encoder(), HeaderReader()
    reader.read(encoder.encode(_fields("/a.B/C", "1S", indexed=True)))
    block = encoder.encode(_fields("/a.B/C", "1S", indexed=True))
    head = reader.read(block)

    def anew(found: object) -> RequestHead:
        return RequestHead("read anew")

    monkeypatch.setattr(headers, "_request_head", anew)
    assert reader.read(block) is head
    assert reader.read(encoder.encode(_fields("/a.B/D", "1S", indexed=True))).path == "read anew"
    assert reader.read(block).path == "read anew"  # the table has changed meanwhile


def test_headers_that_are_too_large() -> None:
    reader, encoder = HeaderReader(), Encoder()
    head = reader.read(encoder.encode([*_fields("/a.B/C", None, indexed=True), *[("x", "y" * 1000)] * 20]))
    assert head.too_large
    assert not reader.read(encoder.encode(_fields("/a.B/C", None, indexed=True))).too_large
    with pytest.raises(ProtocolError, match="OversizedHeaderListError"):
        reader.read(encoder.encode([("x", "y" * 1000)] * 300))


@pytest.mark.parametrize("details", ["", "plain", "100% ø ü\n", "x" * 1000, "é" * 500])
def test_trailers(details: str) -> None:
    block = headers.trailers(grpc.StatusCode.ABORTED, details, (("grpc-retry-pushback-ms", "7"),))
    found = {str(name): str(value) for name, value in Decoder().decode(block)}
    assert found.pop("grpc-status") == "10"
    assert found.pop("grpc-retry-pushback-ms") == "7"
    assert unquote(found.pop("grpc-message", "")) == details
    assert not found
