"""The bookkeeping of a stream of batches: what was sent, answered, lost. No I/O and no clock.

A conversation outlives the connections that it runs over. Its owner asks what to send next, tells
what came back and when a connection begins and ends, and takes the results, which come in the
order of the batches whatever happened on the way.

Every batch holds a place in the window from when it is added until its result is taken, so that
what is kept is bounded by the window, however long the stream.
"""

from __future__ import annotations

import bisect
import logging
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

import grpc

from modelport._inputs import address
from modelport._options import StreamOptions, Target
from modelport._results import Prediction, StreamResult, prediction
from modelport._retry import Retrier
from modelport._signatures import SignatureCache
from modelport._status import code_of_number, rpc_error
from modelport.exceptions import ModelportError, VersionRetiredError
from modelport.v1 import prediction_pb2

_log = logging.getLogger("modelport")
_Code = grpc.StatusCode
_GONE = (_Code.NOT_FOUND, _Code.FAILED_PRECONDITION)


class Ending(Enum):
    """Why the connection at hand had better be left."""

    NONE = auto()
    """It need not."""
    DRAINING = auto()
    """The server is going to stop: read what it has still to say, send it nothing more."""
    RETIRED = auto()
    """The version has gone: the server closes by itself."""
    PIN_REFUSED = auto()
    """The version that the stream was on is not there any more: begin again without it."""


@dataclass(eq=False, slots=True)
class _Batch:
    index: int
    message: prediction_pb2.PredictStreamRequest | None
    outcome: Prediction | ModelportError | None = None
    failures: int = 0
    failing_since: float | None = None
    ready_at: float = 0.0


class Conversation:
    """One stream of batches over any number of connections.

    Sequence numbers on the wire are a batch's index + 1.

    Args:
        target: what is asked, and of which version.
        options: how the stream is run.
        retrier: when a batch is sent again.
        server: the address for messages.
        signatures: what is known of how models are called; learns from the answers.
    """

    def __init__(
        self,
        target: Target,
        options: StreamOptions,
        retrier: Retrier,
        server: str,
        signatures: SignatureCache | None = None,
    ) -> None:
        self._target = target
        self._options = options
        self._retrier = retrier
        self._server = server
        self._signatures = signatures or SignatureCache()
        self._batches: deque[_Batch] = deque()  # until their results are taken
        self._unsent: list[_Batch] = []  # of those without an outcome, those to be sent, in order
        self._sent: dict[int, _Batch] = {}  # the others, which were sent on this connection, by sequence number
        self._added = 0
        self._taken = 0
        self._answers = 0  # on this connection
        self._is_first = True  # on this connection, nothing was sent yet
        self._asked_for_pin = False
        self._was_answered = False
        self.pinned_version: int | None = None
        self.ending = Ending.NONE

    @property
    def has_room(self) -> bool:
        """Whether another batch may be added."""
        return len(self._batches) < self._options.window

    @property
    def has_progressed(self) -> bool:
        """Whether anything was answered on the connection at hand."""
        return self._answers > 0

    @property
    def is_waiting(self) -> bool:
        """Whether anything that was sent on the connection at hand has no answer."""
        return bool(self._sent)

    @property
    def taken(self) -> int:
        """How many results were taken."""
        return self._taken

    @property
    def unanswered(self) -> tuple[int, ...]:
        """The indices of the batches that were added and have no outcome, in order."""
        return tuple(batch.index for batch in self._batches if batch.outcome is None)

    @property
    def was_answered(self) -> bool:
        """Whether the model has answered any batch."""
        return self._was_answered

    @property
    def is_empty(self) -> bool:
        """Whether every batch that was added has had its result taken."""
        return not self._batches

    @property
    def is_idle(self) -> bool:
        """Whether every batch that was added has its outcome."""
        return not self._unsent and not self._sent

    @property
    def has_unsent(self) -> bool:
        """Whether any batch is still to be sent over the connection at hand, be it later."""
        return bool(self._unsent)

    @property
    def has_result(self) -> bool:
        """Whether there is a result to take."""
        return bool(self._batches) and self._batches[0].outcome is not None

    def add(self, batch: prediction_pb2.PredictStreamRequest | ModelportError) -> None:
        """Takes another batch in: a request to send, or what was wrong with it before it could be sent."""
        if isinstance(batch, ModelportError):
            self._batches.append(_Batch(self._added, None, outcome=batch))
        else:
            self._batches.append(_Batch(self._added, batch))
            self._unsent.append(self._batches[-1])
        self._added += 1

    def begin_connection(self) -> None:
        """A new connection is open; whatever has no answer is to be sent over it, in order."""
        self._unsent = [batch for batch in self._batches if batch.outcome is None]
        self._sent.clear()
        self._answers = 0
        self._is_first = True
        self.ending = Ending.NONE

    def next_message(self, now: float) -> prediction_pb2.PredictStreamRequest | None:
        """Returns what is to be sent next over this connection; None if there is nothing at the moment.

        The first batch goes alone. The others follow its answer: so that a server that refuses the
        stream, or does not have its version any more, is understood before much is under way.
        """
        if self.ending is not Ending.NONE or (self._sent and not self._answers):
            return None
        batch = next((b for b in self._unsent if b.ready_at <= now), None)
        if batch is None or batch.message is None:
            return None
        self._unsent.remove(batch)
        self._sent[batch.index + 1] = batch
        self._address(batch.index, batch.message)
        return batch.message

    def next_time(self) -> float | None:
        """Returns when the next delayed batch is due, by the clock given to ``receive``; None if none is."""
        return min((batch.ready_at for batch in self._unsent), default=None)

    def receive(self, message: prediction_pb2.PredictStreamResponse, now: float) -> None:
        """Takes in what came over this connection; see ``ending`` afterwards.

        Raises:
            VersionRetiredError: if the version is gone and no other may take its place.
        """
        kind = message.WhichOneof("kind")
        if kind == "response":
            self._on_response(message.response)
        elif kind == "error":
            self._on_error(message.error, now)
        elif kind == "notice":
            self._on_notice(message.notice)

    def pin_lost(self, why: str) -> None:
        """The version that the stream was on is gone: goes on without it, where that is allowed.

        Raises:
            VersionRetiredError: if no other version may take its place.
        """
        version = self.pinned_version
        self._signatures.forget(self._target)
        if self._options.one_version or self._target.version is not None:
            raise VersionRetiredError(
                f"version {version or self._target.version} of {self._target.model} is not served any more: {why}",
                code=_Code.FAILED_PRECONDITION,
                details=why,
            )
        if version:
            _log.warning(
                "version %d of %s is gone (%s); the stream goes on with the version in charge",
                version,
                self._target.model,
                why,
            )
        self.pinned_version = None

    def refuses_pin(self, code: grpc.StatusCode) -> bool:
        """Returns whether ``code``, as the first word on this connection, says that the version is gone."""
        return self._asked_for_pin and not self._answers and code in _GONE

    def take(self, limit: int) -> list[StreamResult]:
        """Returns the results that are next in order, ``limit`` at most, and makes room for new batches.

        An error that ends the stream comes alone, so that what was answered before it is handed out first.
        """
        results: list[StreamResult] = []
        while self._batches and len(results) < limit:
            outcome = self._batches[0].outcome
            ends_stream = isinstance(outcome, ModelportError) and not self._options.return_errors
            if outcome is None or (ends_stream and results):
                break
            results.append(StreamResult(index=self._batches.popleft().index, outcome=outcome))
            self._taken += 1
            if ends_stream:
                break
        return results

    def _address(self, index: int, message: prediction_pb2.PredictStreamRequest) -> None:
        """Writes into a message what it needs at its place on the connection at hand; it may have been on another."""
        request = message.request
        request.sequence = index + 1
        message.follow = self._is_first and self._options.follow
        if not self._is_first:
            request.ClearField("model")
            request.ClearField("version_choice")
            request.ClearField("signature")
            return
        self._is_first = False
        pin = None if self._options.follow else self.pinned_version
        self._asked_for_pin = self._was_answered and (pin or self._target.version) is not None
        address(request, self._target, pin)

    def _on_response(self, response: prediction_pb2.PredictResponse) -> None:
        batch = self._claim(response.sequence)
        if batch is None:
            return
        if response.version != self.pinned_version:
            self._signatures.answered(self._target, response.version)
        self._pin(response.version)
        self._was_answered = True
        self._retrier.budget.succeeded()
        try:
            self._settle(batch, prediction(response))
        except ModelportError as error:
            self._settle(batch, error)

    def _on_error(self, error: prediction_pb2.StreamError, now: float) -> None:
        code = code_of_number(error.code)
        if self.refuses_pin(code):
            self.pin_lost(error.message)
            self.ending = Ending.PIN_REFUSED
            return
        batch = self._claim(error.sequence)
        if batch is None:
            return
        if error.version:
            self._pin(error.version)
        if code is _Code.INVALID_ARGUMENT:
            self._signatures.forget(self._target)
        batch.failures += 1
        wait_s = self._retry_wait_s(batch, code, error.retry_after_ms / 1000, now)
        if wait_s is None:
            retry_after_s = error.retry_after_ms / 1000 or None
            self._settle(batch, rpc_error(code, error.message, server=self._server, retry_after_s=retry_after_s))
        else:
            batch.ready_at = now + wait_s
            bisect.insort(self._unsent, batch, key=lambda unsent: unsent.index)

    def _retry_wait_s(self, batch: _Batch, code: grpc.StatusCode, retry_after_s: float, now: float) -> float | None:
        """Returns how long to wait before a batch is sent again; None for not at all.

        A server that says when to come back, because it is full or still loading, paces its callers by
        itself: they come back for as long as a broken stream would be resumed.
        """
        if code not in (_Code.UNAVAILABLE, _Code.RESOURCE_EXHAUSTED):
            return None
        if retry_after_s > 0:
            batch.failing_since = now if batch.failing_since is None else batch.failing_since
            is_late = now + retry_after_s - batch.failing_since > self._options.resume_timeout_s
            return None if is_late else retry_after_s + self._retrier.jittered_s(batch.failures)
        return self._retrier.wait_s(batch.failures) if code is _Code.UNAVAILABLE else None

    def _on_notice(self, notice: prediction_pb2.StreamNotice) -> None:
        if notice.reason == prediction_pb2.StreamNotice.REASON_DRAINING:
            self.ending = Ending.DRAINING
        elif notice.reason == prediction_pb2.StreamNotice.REASON_VERSION_RETIRED:
            self.ending = Ending.RETIRED
            self.pin_lost(notice.message)

    def _pin(self, version: int) -> None:
        if self._options.follow or not version:
            return
        self.pinned_version = version

    def _claim(self, sequence: int) -> _Batch | None:
        """Returns the batch that an answer is for; a server that could not read which says 0: the oldest."""
        batch = self._sent.pop(sequence or next(iter(self._sent), 0), None)
        if batch is not None:
            self._answers += 1
        return batch

    @staticmethod
    def _settle(batch: _Batch, outcome: Prediction | ModelportError) -> None:
        batch.outcome = outcome
        batch.message = None
