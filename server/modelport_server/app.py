"""The server as a whole: wires its parts, starts them, and takes them down in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modelport.v1 import model_pb2, prediction_pb2, rollout_pb2
from modelport_registry import Registry
from modelport_server.engines.ahead import Ahead
from modelport_server.errors import StartError
from modelport_server.options import RpcOptions, ServerOptions
from modelport_server.rollout.manager import RolloutManager
from modelport_server.rollout.status import StatusBoard
from modelport_server.routing import Router
from modelport_server.rpc import models, prediction, rollouts
from modelport_server.rpc._grpc import new_server
from modelport_server.rpc.health import Health

_log = logging.getLogger(__name__)

_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""As many as asyncio's own pool, for what may block: reading the registry, and waiting for processes that end."""
_HARD_EXIT_S = 2.0
_SECOND_SIGNAL_STATUS = 1
_HUNG_STATUS = 1
_HANDLER_START_S = 0.05
_NEVER_S = 1e6
"""What ``grpc.aio.Server.stop`` is to wait for calls: ``Server.shut_down`` decides when it has been long enough."""


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
        self._grpc = new_server(channel_options(options.rpc), options.rpc.max_concurrent_calls)
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
        port = self._bind()
        await self._grpc.start()
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
        from grpc_reflection.v1alpha import reflection

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
        reflection.enable_server_reflection(names, self._grpc)

    def _bind(self) -> int:
        try:
            return int(self._grpc.add_insecure_port(self._options.address))
        except RuntimeError:
            raise StartError(
                f"can't listen on {self._options.address}: {_why_not(self._options.address)}; "
                "choose another with --address HOST:PORT"
            ) from None

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
        await self._health.shut_down()
        await asyncio.sleep(options.lame_duck_s)
        self._models.drain()
        self._rollouts.drain()
        self._prediction.drain()
        # One stop at a time: a second one may use what the first has just freed, and the process ends by SIGSEGV.
        stopping = asyncio.get_running_loop().create_task(self._grpc.stop(_NEVER_S))
        await asyncio.sleep(_HANDLER_START_S)  # what core has accepted by now gets its handler
        idle = asyncio.get_running_loop().create_task(self._prediction.wait_idle())
        await asyncio.wait({stopping, idle}, timeout=options.grace_s, return_when=asyncio.FIRST_COMPLETED)
        self._prediction.refuse()
        idle.cancel()
        stopping.cancel()
        await asyncio.wait({stopping})
        if not stopping.cancelled() and (error := stopping.exception()) is not None:
            _log.error("the gRPC server could not be stopped in order", exc_info=error)
        await self._grpc.stop(None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._manager.stop()
        _log.info("stopped")


def channel_options(options: RpcOptions) -> list[tuple[str, int]]:
    """Returns gRPC's own settings: finite messages and streams, keepalive, no compression, an own port."""
    return [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.max_concurrent_streams", options.max_streams_per_connection),
        # Else it refuses calls while others that have been answered are being taken down (docs/adr/0057).
        ("grpc.http.overload_protection", 0),
        ("grpc.so_reuseport", int(options.reuse_port)),
        # Else of 1000 calls that have come faster than they are taken core ends some at random, as CANCELLED.
        ("grpc.server.max_pending_requests", options.max_concurrent_calls),
        ("grpc.server.max_pending_requests_hard_limit", options.max_concurrent_calls),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),  # else a minute, whatever the line above says
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _exit_after(limit_s: float) -> None:
    """Ends the process ``limit_s`` seconds from now if it is still there, even if the event loop hangs."""

    def leave() -> None:
        _log.error("something hangs past the grace; out at once")
        os._exit(_HUNG_STATUS)

    timer = threading.Timer(limit_s, leave)
    timer.daemon = True
    timer.start()


def _why_not(address: str) -> str:
    """Returns why nobody can listen on an address, which gRPC does not say."""
    if address.startswith("unix:"):
        folder = Path(address.removeprefix("unix:")).parent
        return "it is taken, or nothing can be made in that folder" if folder.is_dir() else "there is no such folder"
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.removeprefix("[").removesuffix("]"), int(port), type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(place)
                one.listen()
    except OSError as error:
        return error.strerror or str(error)
    return "it is wrong or taken"


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
