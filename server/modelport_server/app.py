"""The server as a whole: wires its parts, starts them, and takes them down in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from modelport.v1 import model_pb2, prediction_pb2, rollout_pb2
from modelport_registry import Registry
from modelport_server.engines.ahead import Ahead
from modelport_server.errors import StartError, cannot_listen
from modelport_server.http2.server import GrpcServer, Limits
from modelport_server.options import RpcOptions, ServerOptions
from modelport_server.rollout.manager import RolloutManager
from modelport_server.rollout.status import StatusBoard
from modelport_server.routing import Router
from modelport_server.rpc import models, prediction, rollouts
from modelport_server.rpc.health import Health

_log = logging.getLogger(__name__)

_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""As many as asyncio's own pool, for what may block: reading the registry, and waiting for processes that end."""
_HARD_EXIT_S = 2.0
_TELL_S = 0.25
"""How long those who watch the server's health may take to be told that it stops."""
_SECOND_SIGNAL_STATUS = 1
_HUNG_STATUS = 1


class Server:
    """One front process.

    Args:
        options: everything that can be set.
        on_listening: called with the port (0 for a Unix socket) once calls are taken.
        ahead: processes for engines that have been begun already.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        on_listening: Callable[[int], None] | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self._options = options
        self._on_listening = on_listening
        self._router = Router()
        self._board = StatusBoard()
        self._manager = RolloutManager(options, self._router, self._board, ahead)
        self._health = Health(self._board)
        self._models = models.ModelService(self._board)
        self._rollouts = rollouts.RolloutService(
            self._board, Registry(options.registry), allow_changes=options.changes_allowed
        )
        self._prediction = prediction.PredictionService(self._router, options.rpc)
        self._grpc = GrpcServer(limits_of(options.rpc))
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None

    async def serve(self) -> None:
        """Starts, serves until SIGTERM or SIGINT, and stops.

        Raises:
            StartError: if the port is taken or the address is wrong.
        """
        loop = asyncio.get_running_loop()
        loop.set_default_executor(_ready_threads())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        await self.start()
        gc.collect()
        gc.freeze()  # else calls wait some 20 ms now and then while modules and classes are gone through
        try:
            await self._stop.wait()
        finally:
            await self.shut_down()
        if self._failure is not None:
            raise StartError("a part of the server died; its log says which") from self._failure

    async def start(self) -> None:
        """Listens and begins to load what the registry asks for."""
        self._add_services()
        await self._health.start()
        if self._options.metrics_address:
            await self._serve_metrics()
        port = await self._listen()
        self._spawn(self._manager.run())
        self._spawn(self._health.follow())
        _log.info(
            "listening on %s, registry %s",
            _shown_address(self._options.address, port),
            self._options.registry,
        )
        if self._on_listening is not None:
            self._on_listening(port)

    def _add_services(self) -> None:
        from grpc_health.v1 import health, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

        add_health: Any = health_pb2_grpc.add_HealthServicer_to_server
        add_health(self._health.servicer, self._grpc)
        services = (self._prediction, self._models, self._rollouts)
        self._grpc.add_generic_rpc_handlers(tuple(service.handlers() for service in services))
        names = [
            prediction_pb2.DESCRIPTOR.services_by_name["PredictionService"].full_name,
            model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
            rollout_pb2.DESCRIPTOR.services_by_name["RolloutService"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        ]
        add_reflection: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        reflection_api: Any = reflection
        add_reflection(reflection_api.aio.ReflectionServicer(names), self._grpc)

    async def _listen(self) -> int:
        try:
            return await self._grpc.start(self._options.address)
        except (OSError, UnicodeError) as error:  # the latter for names that can't be looked up
            raise StartError(cannot_listen(self._options.address, error, "--address")) from error

    async def _serve_metrics(self) -> None:
        from modelport_server import metrics

        told = metrics.ServerMetrics(
            self._board,
            self._router,
            lambda: self._manager.servables,
            lambda: self._manager.desired,
            lambda: list(self._grpc.ended.items()),
        )
        port = await metrics.serve_metrics(self._options.metrics_address, told)
        _log.info("metrics at http://%s/metrics", _shown_address(self._options.metrics_address, port))

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._on_task_done)
        self._tasks.append(task)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("a part of the server died; it stops", exc_info=error)
            self._failure = error
            self._stop.set()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            _log.warning("second signal: out at once")
            os._exit(_SECOND_SIGNAL_STATUS)
        self._stop.set()

    async def shut_down(self) -> None:
        """Turns NOT_SERVING, answers what has been accepted, and ends every process.

        Takes no longer than the lame duck and the grace; two seconds later the process is gone whatever
        hangs.
        """
        options = self._options
        _log.info("stopping: not serving, new calls are taken for another %g s", options.lame_duck_s)
        limit_s = options.lame_duck_s + options.grace_s + _HARD_EXIT_S
        _exit_after(limit_s)
        telling = asyncio.get_running_loop().create_task(self._health.shut_down())
        self._tasks.append(telling)
        await asyncio.wait({telling}, timeout=_TELL_S)  # it waits for each who watches, and goes on
        await asyncio.sleep(options.lame_duck_s)
        self._models.drain()
        self._rollouts.drain()
        self._prediction.drain()
        await self._grpc.finish(options.grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(self._grpc.close(), self._manager.stop())
        _log.info("stopped")


def limits_of(options: RpcOptions) -> Limits:
    """Returns the gRPC server's bounds."""
    return Limits(
        max_message_bytes=options.max_message_bytes,
        max_concurrent_calls=options.max_concurrent_calls,
        max_streams_per_connection=options.max_streams_per_connection,
        stall_s=options.stream_stall_s,
        reuse_port=options.reuse_port,
        endless=frozenset({"/grpc.health.v1.Health/Watch"}),
    )


def _exit_after(limit_s: float) -> None:
    """Ends the process ``limit_s`` seconds from now if it is still there, even if the event loop hangs."""

    def leave() -> None:
        _log.error("something hangs past the grace; out at once")
        os._exit(_HUNG_STATUS)

    timer = threading.Timer(limit_s, leave)
    timer.daemon = True
    timer.start()


def _shown_address(address: str, port: int) -> str:
    return f"{address.rsplit(':', 1)[0]}:{port}" if port and not address.startswith("unix:") else address


def run(
    options: ServerOptions, *, on_listening: Callable[[int], None] | None = None, ahead: Ahead | None = None
) -> None:
    """Runs a server until it is told to stop, on uvloop where that is installed.

    Args:
        options: everything that can be set.
        on_listening: called with the port (0 for a Unix socket) once calls are taken.
        ahead: processes for engines that have been begun already.

    Raises:
        StartError: if it can't start.
    """
    runner = asyncio.Runner(loop_factory=_loop_factory())
    with runner:
        runner.run(_serve(options, on_listening, ahead))


async def _serve(options: ServerOptions, on_listening: Callable[[int], None] | None, ahead: Ahead | None) -> None:
    await Server(options, on_listening=on_listening, ahead=ahead).serve()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _ready_threads() -> ThreadPoolExecutor:
    """Returns a pool whose threads are all there: made when many things end at once, they would look like a leak."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="modelport")
    together = threading.Barrier(_THREADS)
    for _ in range(_THREADS):
        pool.submit(together.wait)
    return pool
