"""A server that gives back what it gets, by one of three ways to answer gRPC in Python; ``bench transport`` runs it.

Arguments: ``grpc.aio``, ``h2`` or ``modelport``, and a port of this machine.
"""

from __future__ import annotations

import asyncio
import sys
from importlib import import_module
from typing import Any

METHOD = "Predict"
SERVICE = "modelport.v1.PredictionService"


async def echo(message: bytes, context: object) -> bytes:
    """Answers a call."""
    return message


def handler() -> Any:
    """Returns the service."""
    import grpc

    api: Any = grpc
    return api.method_handlers_generic_handler(SERVICE, {METHOD: api.unary_unary_rpc_method_handler(echo)})


async def by_grpc(port: int) -> None:
    """Answers by gRPC's own server for asyncio."""
    import grpc.aio

    api: Any = grpc.aio
    server = api.server()
    server.add_generic_rpc_handlers((handler(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def by_modelport(port: int) -> None:
    """Answers by ours."""
    from modelport_server.http2.server import GrpcServer, Limits

    server = GrpcServer(Limits())
    server.add_generic_rpc_handlers([handler()])
    await server.start(f"127.0.0.1:{port}")
    await asyncio.Event().wait()


async def by_h2(port: int) -> None:
    """Answers by the library h2, its checks of headers off, and with no more of gRPC than an echo takes."""
    config, connection, events = (import_module(f"h2.{name}") for name in ("config", "connection", "events"))
    options = config.H2Configuration(
        client_side=False,
        header_encoding=None,
        validate_inbound_headers=False,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.messages: dict[int, bytes] = {}
            self.h2 = connection.H2Connection(options)
            self.h2.initiate_connection()
            transport.write(self.h2.data_to_send())

        def data_received(self, data: bytes) -> None:
            for event in self.h2.receive_data(data):
                if isinstance(event, events.DataReceived):
                    self.messages[event.stream_id] = self.messages.get(event.stream_id, b"") + event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, events.StreamEnded):
                    self.answer(event.stream_id)
            self.transport.write(self.h2.data_to_send())

        def answer(self, stream: int) -> None:
            self.h2.send_headers(stream, [(b":status", b"200"), (b"content-type", b"application/grpc")])
            self.h2.send_data(stream, self.messages.pop(stream))
            self.h2.send_headers(stream, [(b"grpc-status", b"0")], end_stream=True)

    await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port)
    await asyncio.Event().wait()


WAYS = {"grpc.aio": by_grpc, "h2": by_h2, "modelport": by_modelport}


def main() -> None:
    """Answers until it is ended."""
    import uvloop

    uvloop.run(WAYS[sys.argv[1]](int(sys.argv[2])))


if __name__ == "__main__":
    main()
