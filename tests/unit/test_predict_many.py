"""PredictMany's calls as the batcher gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from modelport.v1 import prediction_pb2 as pb
from modelport_server.batching.calls import Answer, Call
from modelport_server.options import RpcOptions
from modelport_server.routing import Router
from modelport_server.rpc._grpc import Context
from modelport_server.rpc.many import PredictMany
from modelport_server.servable import Servable
from tests.support.engines import new_call, numbers


class Serving:
    """A router and the only servable that it knows, which answers at once and keeps what it got."""

    model = "toy"
    version = 3

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def resolve(self, name: str, **_: Any) -> Serving:
        return self

    def prepare(self, signature: str, inputs: Sequence[object], outputs: Sequence[str], deadline: float) -> Call:
        return new_call([len(self.calls)], deadline=deadline)

    def acquire(self) -> None: ...

    def release(self) -> None: ...

    def submit(self, call: Call) -> None:
        self.calls.append(call)
        call.future.set_result(Answer(self.version, (numbers("id", [1]),), 0, 0))


class Caller:
    """A call's context that takes everything."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def time_remaining(self) -> float | None:
        return None

    def send(self, message: bytes) -> None:
        self.sent.append(message)


async def test_calls_of_a_message_are_marked_as_such() -> None:
    serving = Serving()
    for count in (3, 2):
        caller = Caller()
        many = PredictMany(cast("Router", serving), RpcOptions(), cast("Context", caller))
        requests = [pb.JoinedRequest(request=pb.PredictRequest(model=Serving.model)) for _ in range(count)]
        await many.serve(pb.PredictManyRequest(requests=requests).SerializeToString())
        responses = [pb.PredictManyResponse.FromString(message) for message in caller.sent]
        assert sorted(result.index for response in responses for result in response.results) == list(range(count))
    messages = [call.message for call in serving.calls]
    assert None not in messages
    assert [messages.index(message) for message in messages] == [0, 0, 0, 3, 3]
    assert not isinstance(messages[0], Servable | PredictMany), "a call may outlive what it came in"
