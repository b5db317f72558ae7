"""Metrics over HTTP, in the formats of Prometheus and OpenMetrics. Imported only where they are asked for.

What they tell is what the status board, the servables and the rollouts hold anyway: nothing is done for them while
calls are answered but to count. A scrape reads that in a thread of its own. Of rollouts it reads what the registry asks
for, which never changes once it is there: a verdict is worked out from figures that the event loop adds to.
"""

from __future__ import annotations

import asyncio
import io
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import grpc
from prometheus_client import CollectorRegistry, ProcessCollector, exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from modelport_registry import State as Desired
from modelport_server.batching.counts import BOUNDS_S, Counts
from modelport_server.errors import StartError, cannot_listen
from modelport_server.options import split_host_port
from modelport_server.rollout.status import StatusBoard
from modelport_server.routing import Router
from modelport_server.rpc.status import CALL_CODES, code_of
from modelport_server.servable import Servable

_log = logging.getLogger(__name__)

Ended = Iterable[tuple[tuple[str, grpc.StatusCode], int]]
"""How many calls have ended, by method and code."""
_VERSION = ("model", "version")
_MOST_SCRAPES = 4
"""How many are answered at the same time."""
_SCRAPE_TIMEOUT_S = 2.0
"""How long a peer may keep a thread waiting for its next bytes, or to take some, in seconds."""


class ServerMetrics(Collector):
    """Reads what there is to tell.

    Args:
        board: the state of every version.
        router: says how calls are shared out.
        servables: returns those that are loaded.
        desired: returns what the registry asks of each model.
        ended: returns what has become of the calls of each gRPC method.
    """

    def __init__(
        self,
        board: StatusBoard,
        router: Router,
        servables: Callable[[], Sequence[Servable]],
        desired: Callable[[], Mapping[str, Desired]],
        ended: Callable[[], Ended],
    ) -> None:
        self._board = board
        self._router = router
        self._servables = servables
        self._desired = desired
        self._ended = ended

    def collect(self) -> Iterator[Metric]:
        """Yields every metric as it is now."""
        yield from self._of_versions()
        yield self._shares()
        yield from self._of_rollouts()
        yield from self._of_calls()
        yield self._handled()

    def _of_versions(self) -> Iterator[Metric]:
        serving = GaugeMetricFamily(
            "modelport_serving_version", "The version that answers calls which name none.", labels=["model"]
        )
        state = GaugeMetricFamily(
            "modelport_version_state", "1 for the state that a version is in.", labels=[*_VERSION, "state"]
        )
        engine = InfoMetricFamily("modelport_engine", "What a version runs on.", labels=[*_VERSION])
        choice = InfoMetricFamily(
            "modelport_engine_choice",
            "How each engine did that was tried: the reason is empty for the one that was taken.",
            labels=[*_VERSION],
        )
        row = GaugeMetricFamily(
            "modelport_engine_choice_row_seconds",
            "What a row took in the median when engines were compared, by the size of the batch in rows.",
            labels=[*_VERSION, "engine", "parallelism", "rows"],
        )
        instances = _gauge("modelport_engine_instances", "How many batches of a version run at once.")
        threads = _gauge("modelport_engine_threads", "How many threads each of them has.")
        largest = _gauge("modelport_max_batch_size", "The most rows that run together.")
        golden = _gauge("modelport_golden_examples", "How many golden examples a version reproduced here.")
        for model in self._board.models():
            if model.serving is not None:
                serving.add_metric([model.name], model.serving)
            for version in model.versions:
                labels = [model.name, str(version.version)]
                state.add_metric([*labels, version.state.value], 1)
                if version.engine:
                    engine.add_metric(labels, {"engine": version.engine})
                    largest.add_metric(labels, version.max_batch_size)
                    golden.add_metric(labels, version.golden_examples)
                if version.parallelism is not None:
                    instances.add_metric(labels, version.parallelism.instances)
                    threads.add_metric(labels, version.parallelism.threads)
                for number, attempt in enumerate(version.engines):
                    told = {"attempt": str(number), "engine": attempt.engine, "reason": attempt.reason}
                    choice.add_metric(labels, {**told, "parallelism": attempt.parallelism})
                    for rows, ms in attempt.row_ms.items():
                        row.add_metric([*labels, attempt.engine, attempt.parallelism, str(rows)], ms / 1e3)
        return iter([serving, state, engine, choice, row, instances, threads, largest, golden])

    def _shares(self) -> Metric:
        share = _gauge("modelport_traffic_share", "The share of the calls that name no version, 0 to 1.")
        for model, shares in self._router.shares().items():
            for version, part in shares.items():
                share.add_metric([model, str(version)], part)
        return share

    def _of_rollouts(self) -> Iterator[Metric]:
        phase = GaugeMetricFamily(
            "modelport_rollout_phase",
            "1 for the phase that the rollout under way is in.",
            labels=[*_VERSION, "phase", "step_kind"],
        )
        step = _gauge("modelport_rollout_step", "The number of the step that it is in, from 1; 0 in other phases.")
        steps = _gauge("modelport_rollout_steps", "How many steps its plan has.")
        paused = _gauge("modelport_rollout_paused", "1 while it is paused, else 0.")
        end = GaugeMetricFamily(
            "modelport_last_rollout_end_time_seconds",
            "When the last rollout ended, in seconds since 1970.",
            labels=[*_VERSION, "outcome"],
        )
        for model, desired in self._desired().items():
            if (rollout := desired.rollout) is not None:
                labels, current = [model, str(rollout.version)], rollout.current
                phase.add_metric([*labels, rollout.phase.value, current.kind.value if current is not None else ""], 1)
                step.add_metric(labels, rollout.step + 1 if current is not None else 0)
                steps.add_metric(labels, len(rollout.steps))
                paused.add_metric(labels, rollout.paused)
            if (ended := desired.last) is not None:
                end.add_metric([model, str(ended.version), ended.outcome], ended.at.timestamp())
        return iter([phase, step, steps, paused, end])

    def _of_calls(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            "modelport_calls",
            "Calls and messages of streams that reached a version, by how it ended them.",
            labels=[*_VERSION, "grpc_code"],
        )
        seconds = HistogramMetricFamily(
            "modelport_call_seconds", "From when a call was queued to its answer.", labels=[*_VERSION]
        )
        rows = _counter("modelport_rows", "Rows that the engine has run.")
        batches = _counter("modelport_batches", "Batches that the engine has run.")
        busy = _counter("modelport_engine_seconds", "How long the engine took for them, all instances together.")
        deaths = _counter("modelport_engine_deaths", "How often the engine process has died.")
        up = _gauge("modelport_engine_up", "1 while the engine process runs, 0 from its death until it is back.")
        waiting = _gauge("modelport_waiting_rows", "Rows that wait for the engine.")
        under_way = _gauge("modelport_calls_under_way", "Calls that have no answer yet.")
        for servable in self._servables():
            labels = [servable.model, str(servable.version)]
            counts = servable.counts
            below = _below(counts)
            calls.add_metric([*labels, grpc.StatusCode.OK.name], below[-1][1])
            for name, number in _failed(counts):
                calls.add_metric([*labels, name], number)
            seconds.add_metric(labels, below, counts.answered_s)
            rows.add_metric(labels, counts.rows)
            batches.add_metric(labels, counts.batches)
            busy.add_metric(labels, counts.engine_time_us / 1e6)
            deaths.add_metric(labels, servable.engine_deaths)
            up.add_metric(labels, servable.is_up)
            waiting.add_metric(labels, servable.waiting_rows)
            under_way.add_metric(labels, servable.leases)
        return iter([calls, seconds, rows, batches, busy, deaths, up, waiting, under_way])

    def _handled(self) -> Metric:
        handled = CounterMetricFamily(
            "grpc_server_handled",
            "RPCs that have ended, whatever they were; a stream is one.",
            labels=["grpc_service", "grpc_method", "grpc_code"],
        )
        for (path, code), number in self._ended():
            service, _, method = path.removeprefix("/").rpartition("/")
            handled.add_metric([service or "unknown", method or "unknown", code.name], number)
        return handled


def _gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=[*_VERSION])


def _counter(name: str, text: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=[*_VERSION])


def _below(counts: Counts) -> list[tuple[str, float]]:
    """Returns how many calls took no longer, by each bound."""
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(counts.answered), strict=True))


def _failed(counts: Counts) -> list[tuple[str, int]]:
    """Returns how many calls failed, by the name of the code."""
    # Those that may come are there from the start: from nothing to a number there is no rate.
    by_code = {code.name: 0 for code in CALL_CODES}
    for failure, number in list(counts.failed.items()):
        name = code_of(failure.kind, caller_fault=failure.caller_fault).name
        by_code[name] = by_code.get(name, 0) + number
    return sorted(by_code.items())


class MetricsServer(ThreadingMixIn, WSGIServer):
    """Answers scrapes at any path, in a thread each, of which there are only so many at a time.

    It ends with the process: to wait for its threads would make the server's end depend on who scrapes it.

    Args:
        family: the kind of the address, such as ``socket.AF_INET``.
        place: host and port to listen at, as ``bind`` takes them.
        metrics: what is told, besides what the operating system knows of this process.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, family: int, place: Any, metrics: ServerMetrics) -> None:
        self.address_family = family
        self._room = threading.BoundedSemaphore(_MOST_SCRAPES)
        super().__init__(place, _Handler, bind_and_activate=False)
        registry = CollectorRegistry()
        registry.register(metrics)
        ProcessCollector(registry=registry)
        typed: Any = exposition  # what it returns takes anything
        self.set_app(typed.make_wsgi_app(registry))

    def start(self) -> int:
        """Listens, answers from now on, and returns the port.

        Raises:
            OSError: if it can't listen there.
        """
        try:
            self.server_bind()
            self.server_activate()
        except BaseException:
            self.server_close()
            raise
        threading.Thread(target=self._serve, name="metrics", daemon=True).start()
        return self.server_port

    def _serve(self) -> None:
        try:
            self.serve_forever()
        except Exception:
            _log.exception("nobody tells metrics any more")

    def server_bind(self) -> None:
        """Binds, and does not ask what the address is called, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread; while there are too many of them others wait to be accepted."""
        self._room.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers, and makes room for another one."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in the log what failed, unless it was the peer."""
        if isinstance(sys.exception(), OSError):
            _log.debug("a scrape broke off", exc_info=True)
        else:
            _log.error("a scrape failed", exc_info=True)


class _ToLog(io.StringIO):
    """Where the standard library writes what failed while an answer was made or sent."""

    def flush(self) -> None:
        """Puts what was written into the log."""
        if text := self.getvalue().strip():
            self.seek(0)
            self.truncate()
            _log.warning("a scrape failed: %s", text)


class _Handler(WSGIRequestHandler):
    timeout = _SCRAPE_TIMEOUT_S

    def get_stderr(self) -> io.StringIO:
        """Returns where errors go."""
        return _ToLog()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the standard library
        """Says nothing of each scrape."""


async def serve_metrics(address: str, metrics: ServerMetrics) -> int:
    """Answers scrapes at ``http://HOST:PORT/metrics`` from now on, and returns the port.

    Args:
        address: ``host:port``, port 0 for any free one. Of a name's addresses it takes one, of IPv4 if there is any.
        metrics: what is told.

    Raises:
        StartError: if it can't listen there.
    """
    host, port = split_host_port(address)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, *_, place = min(found, key=lambda one: one[0] != socket.AF_INET)
        return MetricsServer(family, place, metrics).start()
    except (OSError, UnicodeError) as error:  # the latter for names that can't be looked up
        raise StartError(cannot_listen(address, error, "--metrics-address")) from error
