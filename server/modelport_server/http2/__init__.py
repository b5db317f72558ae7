"""gRPC over HTTP/2 on asyncio, as much of it as a server needs (``docs/adr/0058``)."""
