"""The stream's books: order, once, the window, pins, retries. No I/O."""

from __future__ import annotations

from collections import deque

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport import InputError, InvalidArgumentError, RetryPolicy, VersionRetiredError
from modelport._conversation import Conversation, Ending
from modelport._options import StreamOptions, Target
from modelport._retry import Retrier
from modelport.v1.prediction_pb2 import (
    PredictResponse,
    PredictStreamRequest,
    PredictStreamResponse,
    StreamError,
    StreamNotice,
)


def conversation(target: Target | None = None, **options: object) -> Conversation:
    books = Conversation(
        target or Target(model="m"),
        StreamOptions(**options),  # type: ignore[arg-type]
        Retrier(RetryPolicy()),
        "here:1",
    )
    books.begin_connection()
    return books


def answer(sequence: int, version: int = 1) -> PredictStreamResponse:
    return PredictStreamResponse(response=PredictResponse(sequence=sequence, version=version))


def error(sequence: int, code: grpc.StatusCode, retry_after_ms: int = 0) -> PredictStreamResponse:
    number = code.value[0]
    return PredictStreamResponse(error=StreamError(sequence=sequence, code=number, retry_after_ms=retry_after_ms))


def notice(reason: StreamNotice.Reason.ValueType) -> PredictStreamResponse:
    return PredictStreamResponse(notice=StreamNotice(reason=reason, message="why"))


def sent(books: Conversation, now: float = 0.0) -> list[PredictStreamRequest]:
    messages: list[PredictStreamRequest] = []
    while (message := books.next_message(now)) is not None:
        copy = PredictStreamRequest()
        copy.CopyFrom(message)
        messages.append(copy)
    return messages


def add(books: Conversation, count: int) -> None:
    for _ in range(count):
        books.add(PredictStreamRequest())


def sequences(messages: list[PredictStreamRequest]) -> list[int]:
    return [message.request.sequence for message in messages]


def test_the_first_goes_alone_and_carries_the_names() -> None:
    books = conversation(Target(model="m", alias="stable", signature="s"))
    add(books, 3)
    first = sent(books)
    assert sequences(first) == [1]
    assert (first[0].request.model, first[0].request.alias, first[0].request.signature) == ("m", "stable", "s")
    books.receive(answer(1), 0.0)
    rest = sent(books)
    assert sequences(rest) == [2, 3]
    assert all(not m.request.model and not m.request.WhichOneof("version_choice") for m in rest)


def test_a_lost_connection_sends_again_what_has_no_answer_in_order() -> None:
    books = conversation()
    add(books, 5)
    sent(books)
    books.receive(answer(1, version=7), 0.0)
    sent(books)
    books.receive(answer(2, version=7), 0.0)
    books.begin_connection()
    again = sent(books)
    assert sequences(again) == [3]
    assert again[0].request.version == 7
    books.receive(answer(3, version=7), 0.0)
    assert sequences(sent(books)) == [4, 5]
    assert [r.index for r in books.take(9)] == [0, 1, 2]
    assert books.unanswered == (3, 4)


def test_a_stream_that_follows_asks_for_no_version() -> None:
    books = conversation(follow=True)
    add(books, 2)
    assert sent(books)[0].follow
    books.receive(answer(1, version=7), 0.0)
    books.begin_connection()
    again = sent(books)
    assert again[0].follow
    assert again[0].request.WhichOneof("version_choice") is None


def test_a_pin_that_is_refused_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    books = conversation(Target(model="m", alias="stable"))
    add(books, 2)
    sent(books)
    books.receive(answer(1, version=7), 0.0)
    books.begin_connection()
    sent(books)
    books.receive(error(2, grpc.StatusCode.NOT_FOUND), 0.0)
    assert books.ending is Ending.PIN_REFUSED
    assert "version 7 of m is gone" in caplog.text
    books.begin_connection()
    assert sent(books)[0].request.alias == "stable"
    books.receive(answer(2, version=8), 0.0)
    assert [r.prediction.version for r in books.take(9)] == [7, 8]


@pytest.mark.parametrize("target", [Target(model="m", version=7), None])
def test_a_pin_by_number_or_of_one_call_is_never_dropped(target: Target | None) -> None:
    books = conversation(target, one_version=target is None)
    add(books, 2)
    sent(books)
    books.receive(answer(1, version=7), 0.0)
    books.begin_connection()
    sent(books)
    with pytest.raises(VersionRetiredError, match="version 7 of m is not served any more"):
        books.receive(error(2, grpc.StatusCode.FAILED_PRECONDITION), 0.0)


def test_an_unknown_version_from_the_start_is_the_batch_s_error() -> None:
    books = conversation(Target(model="m", version=9), return_errors=True)
    add(books, 1)
    sent(books)
    books.receive(error(1, grpc.StatusCode.NOT_FOUND), 0.0)
    assert books.ending is Ending.NONE
    assert books.take(9)[0].error is not None


def test_draining_stops_to_send_and_keeps_on_reading() -> None:
    books = conversation()
    add(books, 3)
    sent(books)
    books.receive(answer(1), 0.0)
    assert sequences(sent(books)) == [2, 3]
    books.receive(notice(StreamNotice.REASON_DRAINING), 0.0)
    add(books, 1)
    assert books.ending is Ending.DRAINING
    assert sent(books) == []
    books.receive(answer(2), 0.0)
    books.begin_connection()
    assert sequences(sent(books)) == [3]


def test_a_retired_version_lets_the_stream_go_on_without_it() -> None:
    books = conversation()
    add(books, 2)
    sent(books)
    books.receive(answer(1, version=7), 0.0)
    books.receive(notice(StreamNotice.REASON_VERSION_RETIRED), 0.0)
    assert books.ending is Ending.RETIRED
    books.begin_connection()
    assert sent(books)[0].request.WhichOneof("version_choice") is None


def test_a_full_server_is_asked_again_later_and_order_is_kept() -> None:
    books = conversation()
    add(books, 3)
    sent(books)
    books.receive(answer(1), 0.0)
    sent(books)
    books.receive(error(2, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=500), 10.0)
    books.receive(answer(3), 10.0)
    assert sent(books, 10.4) == []
    due = books.next_time()
    assert due is not None
    assert due >= 10.5
    assert [r.index for r in books.take(9)] == [0]
    assert sequences(sent(books, due)) == [2]
    books.receive(answer(2), due)
    assert [r.index for r in books.take(9)] == [1, 2]


def test_what_is_sent_again_goes_before_what_was_added_later() -> None:
    books = conversation(return_errors=True)
    add(books, 4)
    sent(books)
    books.receive(answer(1), 0.0)
    assert sequences(sent(books)) == [2, 3, 4]
    assert not books.has_unsent
    add(books, 1)
    books.receive(error(4, grpc.StatusCode.UNAVAILABLE), 0.0)
    books.receive(error(2, grpc.StatusCode.UNAVAILABLE), 0.0)
    assert books.has_unsent
    assert sequences(sent(books, 100.0)) == [2, 4, 5]


def test_a_result_is_there_once_its_turn_has_come() -> None:
    books = conversation()
    assert not books.has_result
    add(books, 2)
    sent(books)
    books.receive(error(1, grpc.StatusCode.UNAVAILABLE), 0.0)
    books.begin_connection()
    sent(books, 100.0)
    assert not books.has_result
    books.receive(answer(1), 100.0)
    assert books.has_result
    books.take(1)
    assert not books.has_result


@pytest.mark.parametrize(
    ("code", "retry_after_ms", "is_retried"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 10, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 0, False),
        (grpc.StatusCode.UNAVAILABLE, 0, True),
        (grpc.StatusCode.INVALID_ARGUMENT, 10, False),
        (grpc.StatusCode.INTERNAL, 0, False),
    ],
)
def test_only_what_another_try_can_help_is_tried_again(
    code: grpc.StatusCode, retry_after_ms: int, is_retried: bool
) -> None:
    books = conversation(return_errors=True)
    add(books, 1)
    sent(books)
    books.receive(error(1, code, retry_after_ms), 0.0)
    assert (books.take(1) == []) is is_retried


def test_attempts_end() -> None:
    books = conversation(return_errors=True)
    add(books, 1)
    now = 0.0
    for _ in range(5):
        assert sequences(sent(books, now)) == [1]
        books.receive(error(1, grpc.StatusCode.UNAVAILABLE), now)
        now += 100.0
    assert sent(books, now) == []
    assert books.take(1)[0].error is not None


def test_an_unreadable_message_s_error_goes_to_the_oldest() -> None:
    books = conversation(return_errors=True)
    add(books, 2)
    sent(books)
    books.receive(error(0, grpc.StatusCode.INVALID_ARGUMENT), 0.0)
    assert isinstance(books.take(1)[0].error, InvalidArgumentError)


def test_answers_that_nobody_waits_for_are_ignored() -> None:
    books = conversation()
    add(books, 1)
    sent(books)
    books.receive(answer(5), 0.0)
    books.receive(PredictStreamResponse(), 0.0)
    books.receive(answer(1), 0.0)
    books.receive(answer(1), 0.0)
    assert [r.index for r in books.take(9)] == [0]


def test_a_batch_that_could_not_be_sent_has_its_place() -> None:
    books = conversation(return_errors=True)
    add(books, 1)
    books.add(InputError("no"))
    assert books.take(9) == []
    sent(books)
    books.receive(answer(1), 0.0)
    assert [r.error is None for r in books.take(9)] == [True, False]


def test_a_raised_error_ends_what_is_taken() -> None:
    books = conversation()
    for _ in range(3):
        books.add(InputError("no"))
    assert [r.index for r in books.take(9)] == [0]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_batch_is_answered_once_in_order_whatever_happens(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 6), label="window")
    total = data.draw(st.integers(0, 25), label="batches")
    books = conversation(window=window, return_errors=True, follow=data.draw(st.booleans(), label="follow"))
    wire: deque[int] = deque()
    results: list[int] = []
    answered: list[int] = []
    added, now = 0, 0.0
    actions = ["add", "send", "answer", "lose", "fail", "take", "drain"]
    for _ in range(600):
        if len(results) == total:
            break
        action = data.draw(st.sampled_from(actions), label="action") if now < 120 else actions[int(now) % 3]
        now += 1.0
        if action == "add" and books.has_room and added < total:
            add(books, 1)
            added += 1
        elif action == "send":
            wire.extend(sequences(sent(books, now)))
        elif action == "answer" and wire:
            sequence = wire.popleft()
            answered.append(sequence)
            books.receive(answer(sequence), now)
        elif action == "fail" and wire and answered.count(wire[0]) == 0:
            books.receive(error(wire.popleft(), grpc.StatusCode.UNAVAILABLE), now)
        elif action == "lose" or (books.ending is not Ending.NONE and not wire):
            wire.clear()
            books.begin_connection()
        elif action == "drain":
            books.receive(notice(StreamNotice.REASON_DRAINING), now)
        results += [r.index for r in books.take(data.draw(st.integers(1, 3), label="limit") if now < 120 else 9)]
        assert added - len(results) <= window
    assert results == list(range(total))
    assert sorted(answered) == sorted(set(answered))
