"""``grpc.health.v1``: the server as a whole, its services, and each model by name."""

from __future__ import annotations

from typing import Any

from modelport_server.rollout.status import StatusBoard
from modelport_server.rpc import models, prediction


class Health:
    """Keeps the health service in step with the status board.

    The server serves once every model that it found has come to an end of its loading, one way or the
    other, and at least one of them answers; from then on, as long as one answers.

    Args:
        board: what there is to know.
    """

    def __init__(self, board: StatusBoard) -> None:
        from grpc_health.v1 import health, health_pb2

        api: Any = health
        self._board = board
        self._pb: Any = health_pb2
        self._ready = False
        self.servicer: Any = api.aio.HealthServicer()

    async def start(self) -> None:
        """Sets everything to NOT_SERVING."""
        await self._set_server(serving=False)

    async def follow(self) -> None:
        """Works until it is cancelled."""
        known: set[str] = set()
        edition = 0
        while True:
            edition = self._board.edition
            statuses = self._board.models()
            for status in statuses:
                await self._set(status.name, serving=status.serving is not None)
            for name in known - {status.name for status in statuses}:
                await self._set(name, serving=False)
            known = {status.name for status in statuses}
            serving = any(status.serving is not None for status in statuses)
            self._ready = serving and (self._ready or all(status.settled for status in statuses))
            await self._set_server(serving=self._ready)
            await self._board.wait(edition)

    async def shut_down(self) -> None:
        """Sets everything to NOT_SERVING for good."""
        await self.servicer.enter_graceful_shutdown()

    async def _set_server(self, *, serving: bool) -> None:
        for service in ("", prediction.SERVICE, models.SERVICE):
            await self._set(service, serving=serving)

    async def _set(self, service: str, *, serving: bool) -> None:
        status = self._pb.HealthCheckResponse
        await self.servicer.set(service, status.SERVING if serving else status.NOT_SERVING)
