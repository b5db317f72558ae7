"""The container's health check, against a real health service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from modelport import AsyncClient
from modelport._healthcheck import check as healthcheck

MODEL = "m" * 64
LONG_NAMES = ["m" * 127, "m" * 128, "ü" * 150, "m" * 20000]


@pytest.fixture
def address() -> Iterator[str]:
    """A server that is healthy as a whole, serves one model, and does not serve another."""
    grpc_api: Any = grpc
    health_api: Any = health
    messages: Any = health_pb2
    stubs: Any = health_pb2_grpc
    with ThreadPoolExecutor(2) as pool:
        server = grpc_api.server(pool)
        servicer = health_api.HealthServicer()
        servicer.set(MODEL, messages.HealthCheckResponse.SERVING)
        for name in LONG_NAMES:
            servicer.set(name, messages.HealthCheckResponse.SERVING)
        servicer.set("broken", messages.HealthCheckResponse.NOT_SERVING)
        stubs.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelport._healthcheck", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("service", ["", MODEL])
def test_serving(address: str, service: str) -> None:
    result = check(address, service)
    assert (result.returncode, result.stdout) == (0, "SERVING\n"), result.stderr


@pytest.mark.parametrize("name", LONG_NAMES, ids=lambda name: f"{len(name)} characters")
async def test_names_of_any_length(address: str, name: str) -> None:
    assert healthcheck(address, name) == "SERVING"
    assert healthcheck(address, "broken") == "NOT_SERVING"
    async with AsyncClient(address) as client:
        assert await client.is_ready(model=name)
        assert not await client.is_ready(model="broken")
        assert not await client.is_ready(model=name + "\udcff")  # as the command line has what is no text


def test_not_serving(address: str) -> None:
    result = check(address, "broken")
    assert (result.returncode, result.stdout) == (1, "NOT_SERVING\n"), result.stderr


@pytest.mark.parametrize(("target", "reason"), [("unknown", "NOT_FOUND"), (None, "UNAVAILABLE")])
def test_no_answer_is_one_line(address: str, target: str | None, reason: str) -> None:
    result = check(address, target) if target is not None else check("127.0.0.1:1")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert reason in result.stderr


def test_without_an_address_it_says_how_it_is_used() -> None:
    result = check()
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")
