"""The blocking client: the asynchronous one, run in a thread."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Iterator, Sequence
from types import TracebackType

from modelport._async_client import AsyncClient, OnError, make_target, stream_options
from modelport._bulk import BulkCall
from modelport._inputs import Inputs, needs_signature
from modelport._models import ModelChange, ModelInfo
from modelport._options import MIB, Keepalive, RetryPolicy, StreamOptions, Target, Tls
from modelport._results import Prediction, StreamResult
from modelport._rollouts import Rollouts
from modelport._threads import LoopThread, ThreadedIterator
from modelport.exceptions import InvalidArgumentError

_RESULTS_AT_ONCE = 4
"""How many results of a stream cross from thread to thread together, if that many are there."""


class Client:
    """Calls models on one or several servers.

    May be used by several threads at once. Use it as ``with`` or call ``close``. Arguments and errors
    are those of ``AsyncClient``, which does the work in a thread that starts with the first call.

    Args:
        address: ``host:port`` or ``unix:path``, or several ``host:port`` between which calls are
            shared out among those that are up and ready. Of several, hosts given by name are looked up
            once, with the first call; a single one whenever a connection is made.
        timeout_s: how long a call may take, with all its attempts, in seconds.
        retry: when and how often a call is tried again.
        keepalive: how connections that went dead are noticed.
        tls: encryption; None for none.
        max_message_bytes: the largest message in either direction; larger batches go in parts.

    Raises:
        InputError: if an address or an option can't be what it is.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        keepalive: Keepalive | None = None,
        tls: Tls | None = None,
        max_message_bytes: int = 64 * MIB,
    ) -> None:
        self._client = AsyncClient(
            address,
            timeout_s=timeout_s,
            retry=retry,
            keepalive=keepalive,
            tls=tls,
            max_message_bytes=max_message_bytes,
        )
        self._loop = LoopThread("modelport-client")
        self._under_way: set[object] = set()  # calls of predict; a number would not survive two threads
        self.rollouts = Rollouts(self._client.rollouts, self._loop)
        """How versions come into service, and how people steer that."""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way and closes all connections; closing twice does nothing more."""
        self._loop.close(self._client.close)

    def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: int | None = None,
        alias: str | None = None,
        signature: str = "",
        outputs: Iterable[str] | None = None,
        routing_key: str = "",
        timeout_s: float | None = None,
    ) -> Prediction:
        """Returns a model's answer to ``inputs``; see ``AsyncClient.predict``."""
        target = make_target(model, version, alias, signature, outputs, routing_key)
        call = object()
        self._under_way.add(call)
        try:
            if len(self._under_way) > 1 and not self._loop.is_here:
                answer = self._joined(target, inputs, timeout_s)
                if answer is not None:
                    return answer
            return self._loop.run(
                self._client.predict(
                    model,
                    inputs,
                    version=version,
                    alias=alias,
                    signature=signature,
                    outputs=target.outputs,
                    routing_key=routing_key,
                    timeout_s=timeout_s,
                )
            )
        finally:
            self._under_way.discard(call)

    def predict_stream(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        version: int | None = None,
        alias: str | None = None,
        signature: str = "",
        outputs: Iterable[str] | None = None,
        routing_key: str = "",
        follow: bool = False,
        window: int = 8,
        on_error: OnError = "raise",
        timeout_s: float = 120.0,
        resume_timeout_s: float = 30.0,
    ) -> Generator[StreamResult, None, None]:
        """Yields a model's answer to each of ``batches``, in order; see ``AsyncClient.predict_stream``.

        ``batches`` is iterated in a thread of its own, so that it may wait for its next item without
        holding back the answers to those before it.
        """
        target = make_target(model, version, alias, signature, outputs, routing_key)
        options = stream_options(follow, window, on_error, timeout_s, resume_timeout_s)
        return self._results(target, batches, options)

    def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Returns every model that the server serves or tries to serve, by name."""
        return self._loop.run(self._client.models(timeout_s=timeout_s))

    def model(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """Returns one model with its versions; raises NotFoundError if the server has it not."""
        return self._loop.run(self._client.model(name, timeout_s=timeout_s))

    def watch(self, model: str = "") -> Iterator[ModelChange]:
        """Yields every model at once and then each whenever it has changed; see ``AsyncClient.watch``."""
        return self._loop.iterate(self._client.watch(model))

    def is_ready(self, *, model: str = "", timeout_s: float | None = None) -> bool:
        """Returns whether the server takes calls, or the one model can answer."""
        return self._loop.run(self._client.is_ready(model=model, timeout_s=timeout_s))

    def wait_ready(self, *, model: str = "", timeout_s: float = 60.0) -> None:
        """Waits until the server takes calls, or the one model can answer; see ``AsyncClient.wait_ready``."""
        self._loop.run(self._client.wait_ready(model=model, timeout_s=timeout_s))

    def _joined(self, target: Target, inputs: Inputs, timeout_s: float | None) -> Prediction | None:
        """Makes a call together with those of other threads; returns None where it had better be made by itself."""
        message = self._client.joinable(target, inputs)
        if message is None:
            return None
        try:
            response = self._client.hand_over(message, timeout_s, self._loop.call_soon)
        except InvalidArgumentError:
            if not needs_signature(inputs):
                raise
            return None  # perhaps the model is called otherwise by now, which the whole call finds out
        return self._client.answered(target, response)

    def _results(
        self, target: Target, batches: Iterable[Inputs], options: StreamOptions
    ) -> Generator[StreamResult, None, None]:
        source = ThreadedIterator(batches, options.window)
        bulk_call = self._loop.run(_begun(self._client, target, source, options))
        at_once = min(_RESULTS_AT_ONCE, options.window)
        ahead = self._loop.run_ahead(functools.partial(bulk_call.results, at_once))  # of batches that had room
        try:
            for results in ahead:
                source.make_room(len(results))
                yield from results
        finally:
            ahead.close()
            self._loop.try_run(bulk_call.aclose())
            source.close()


async def _begun(
    client: AsyncClient, target: Target, source: ThreadedIterator[Inputs], options: StreamOptions
) -> BulkCall:
    return client.bulk_call(target, source, options)  # its events belong to the loop
