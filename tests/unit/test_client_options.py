"""Options, addresses, retries: what is checked and what gRPC is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest

from modelport import AsyncClient, Client, InputError, Keepalive, RetryPolicy, Tls
from modelport._channel import channel_arguments, checked_addresses, service_config, split_address
from modelport._options import ClientOptions, StreamOptions, Target
from modelport._retry import Retrier, RetryBudget


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RetryPolicy(max_attempts=6), "max_attempts must be 1 to 5"),
        (lambda: RetryPolicy(initial_backoff_s=0), "initial_backoff_s"),
        (lambda: RetryPolicy(initial_backoff_s=3), "not above max_backoff_s"),
        (lambda: RetryPolicy(budget=1), "budget"),
        (lambda: RetryPolicy(budget_ratio=0), "budget_ratio"),
        (lambda: Keepalive(time_s=0.1), "keepalive time_s"),
        (lambda: Keepalive(timeout_s=0), "keepalive timeout_s"),
        (lambda: Tls(private_key=b"k"), "go together"),
        (lambda: ClientOptions(timeout_s=0), "timeout_s"),
        (lambda: ClientOptions(max_message_bytes=10), "max_message_bytes"),
        (lambda: Target(model=""), "model must be a name"),
        (lambda: Target(model="m", version=0), "positive"),
        (lambda: Target(model="m", version=1, alias="a"), "not both"),
        (lambda: Target(model="m", version="1"), "version must be a positive number, not '1'"),  # type: ignore[arg-type]
        (lambda: Target(model="m", version=True), "version must be a positive number, not True"),
        (lambda: Target(model=5), "model must be a text, not 5"),  # type: ignore[arg-type]
        (lambda: Target(model="m", alias=b"a"), "alias must be a text"),  # type: ignore[arg-type]
        (lambda: Client("a:1").predict("m", [], timeout_s="5"), "timeout_s must be .+ not '5'"),  # type: ignore[arg-type]
        (lambda: Client("a:1").predict("m", [], timeout_s=0), "timeout_s must be a number of seconds, above 0, not 0"),
        (lambda: Client("a:1").models(timeout_s=-1), "timeout_s must be a number of seconds, above 0, not -1"),
        (lambda: Client("a:1").wait_ready(timeout_s=math.nan), "timeout_s must be .+ not nan"),
        (lambda: Client("a:1").predict_stream("m", [], timeout_s=math.nan), "timeout_s must be .+ not nan"),
        (lambda: ClientOptions(timeout_s=math.nan), "timeout_s"),
        (lambda: StreamOptions(window=0), "window must be 1 to 1024"),
        (lambda: StreamOptions(window=2.5), "window must be 1 to 1024, not 2.5"),  # type: ignore[arg-type]
        (lambda: StreamOptions(resume_timeout_s=-1), "resume_timeout_s"),
        (lambda: Client([]), "at least one address"),
        (lambda: Client("nowhere"), "is not an address"),
        (lambda: Client(cast("Any", 8500)), "8500 is not an address"),
        (lambda: Client(cast("Any", [8500])), "8500 is not an address"),
        (lambda: AsyncClient("host:99999"), "is not an address"),
        (lambda: Client("http://localhost:8500"), "is not an address"),
        (lambda: Client(["unix:/a", "b:1"]), "the one address"),
        (lambda: Client("a:1").predict_stream("m", [], on_error="maybe"), "on_error"),  # type: ignore[arg-type]
        (lambda: Client("a:1").predict_stream("m", [], outputs="y"), "several names"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(make: Callable[[], object], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_addresses() -> None:
    assert checked_addresses("a:1") == ("a:1",)
    assert checked_addresses(["a:1", "[::1]:2"]) == ("a:1", "[::1]:2")
    assert checked_addresses("unix:/run/x") == ("unix:/run/x",)
    assert split_address("[::1]:80") == ("::1", 80)


def test_keys_stay_out_of_the_repr() -> None:
    assert "secret" not in repr(Tls(private_key=b"secret", certificate_chain=b"c"))


def test_grpc_retries_no_streams_and_nothing_that_changes_a_rollout() -> None:
    config: Any = service_config(RetryPolicy(), several=False)
    methods = {entry["method"] for entry in config["methodConfig"][0]["name"]}
    assert methods == {"Predict", "GetModel", "ListModels", "GetRollout", "GetPolicy", "ReadJournal"}
    assert config["methodConfig"][0]["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]


def test_several_addresses_are_health_checked_and_one_is_not() -> None:
    assert "healthCheckConfig" in service_config(RetryPolicy(), several=True)
    assert "healthCheckConfig" not in service_config(RetryPolicy(), several=False)


def test_one_attempt_means_no_retry_policy() -> None:
    assert "methodConfig" not in service_config(RetryPolicy(max_attempts=1), several=False)


def test_what_may_be_sent_may_be_sent_again() -> None:
    arguments = dict(channel_arguments(ClientOptions(max_message_bytes=1 << 20), several=False))
    assert arguments["grpc.per_rpc_retry_buffer_size"] == arguments["grpc.max_send_message_length"] == 1 << 20


def test_waits_double_up_to_the_limit() -> None:
    policy = RetryPolicy(initial_backoff_s=0.25, max_backoff_s=1)
    assert [policy.backoff_limit_s(n) for n in (1, 2, 3, 4, 1000)] == [0.25, 0.5, 1, 1, 1]
    retrier = Retrier(policy)
    waits = [retrier.jittered_s(3) for _ in range(200)]
    assert all(0 <= wait <= 1 for wait in waits)
    assert max(waits) - min(waits) > 0.3


def test_no_retry_beyond_the_attempts() -> None:
    retrier = Retrier(RetryPolicy(max_attempts=3))
    assert retrier.wait_s(2, 1.5) is not None
    assert (retrier.wait_s(1, 1.5) or 0) >= 1.5
    assert retrier.wait_s(3) is None


def test_the_budget_runs_dry_and_fills_again() -> None:
    budget = RetryBudget(RetryPolicy(budget=4, budget_ratio=0.5))
    assert [budget.failed() for _ in range(4)] == [True, False, False, False]
    for _ in range(7):
        budget.succeeded()
    assert budget.failed()
