"""``pin``, ``policy``, ``alias`` and ``journal`` through a server, and tables in narrow terminals."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelport_registry import Registry, Strategy
from modelport_server.gates.result import GOLDEN
from tests.integration.test_client_cli import Ran, modelport
from tests.support.launch import program
from tests.support.server import ServerProcess, run_server, wait_for
from tests.support.stub_engine import hold_file, stub_golden, write_stub

MODEL = "m"
REASON = "golden: output 'probabilities' differs from what was published in 31 of 640 values, by up to 0.4"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Two versions, of which nothing says which one is in charge."""
    registry = Registry(tmp_path / "registry")
    for tag in (1, 2):
        registry.publish(MODEL, write_stub(tmp_path / f"stub-{tag}", tag), golden=[stub_golden(tag)])
    return registry


@contextmanager
def serving(registry: Registry, tmp_path: Path) -> Generator[ServerProcess]:
    with run_server(registry.root, tmp_path / "server", program=program(stub=True)) as server:
        server.wait_serving(MODEL, 2)
        yield server


async def test_everything_that_a_server_can_change(registry: Registry, tmp_path: Path) -> None:
    with serving(registry, tmp_path) as server:

        async def run(*arguments: object) -> Ran:
            return await modelport(*arguments, "--server", server.address)

        async def said(*arguments: object) -> str:
            ran = await run(*arguments)
            assert (ran.status, ran.err) == (0, ""), ran.err
            return ran.out

        assert await said("pin", MODEL, 1, "--reason", "a freeze") == "m is pinned to version 1\n"
        server.wait_serving(MODEL, 1)
        assert await said("alias", MODEL, "stable") == "m stable is version 1, pinned\n"
        assert await said("pin", MODEL, "stable") == "m is pinned to version 1\n"
        assert await said("pin", MODEL, "--remove") == "m is not pinned any more\n"
        ran = await run("alias", MODEL, "stable", 2)
        assert (ran.status, ran.out) == (0, "m stable is version 2, pinned\n")
        assert ran.err == "later versions wait until the pin is off: modelport pin m --remove\n"
        assert registry.state(MODEL).pin == 2
        rules = json.loads(await said("policy", MODEL, "--strategy", "canary", "--step", "5%:30s", "--json"))["policy"]
        assert (rules["strategy"], rules["min_calls"]) == (["canary"], 100)
        await said("policy", MODEL, "--min-calls", 7, "--allow-op", "ReadFile", "--reason", "few calls")
        policy = registry.state(MODEL).policy
        assert (policy.strategy, policy.min_calls, policy.allow_ops) == ((Strategy.CANARY,), 7, ("ReadFile",))
        assert [(step.share, step.bake_s) for step in policy.canary_steps] == [(0.05, 30)]
        shown = await said("policy", MODEL)
        assert "strategy                 canary\n" in shown
        assert "watch_s                  60 s  (default)\n" in shown
        assert "strategy                 immediate  (default)\n" in await said("policy", MODEL, "--reset")
        there = json.loads(await said("journal", MODEL, "--json"))
        here = json.loads((await modelport("journal", MODEL, "--json", "--registry", registry.root)).out)
        assert there == here
        assert {"a freeze", "few calls"} <= {entry["reason"] for entry in there}
        wrong = await run("alias", MODEL, "best", 1)
        assert wrong.err.startswith("error: a server sets the alias stable and no other")
        assert (await run("alias", MODEL, "stable", "--delete")).status == 1
        assert (await run("alias", MODEL, "best")).err == "error: m has no alias 'best'; it has: stable\n"
        assert (await run("journal", "other")).err.startswith("error: there is no model 'other'")


@pytest.mark.parametrize("command", ["pin", "policy", "alias", "journal"])
async def test_one_place_at_a_time(registry: Registry, command: str) -> None:
    more = ["stable"] if command == "alias" else []
    ran = await modelport(command, MODEL, *more, "--server", "127.0.0.1:1", "--registry", registry.root)
    assert (ran.status, ran.err) == (1, "error: give --server or --registry, not both\n")
    environment = {"MODELPORT_REGISTRY": str(registry.root)}  # what is set for all commands is no choice
    ran = await modelport(command, MODEL, *more, "--server", "127.0.0.1:1", environment=environment)
    assert ran.err.startswith("error: no server answers at 127.0.0.1:1")


def words(text: str) -> str:
    """Returns what was said without how it was wrapped."""
    return " ".join(text.split())


@pytest.mark.parametrize("columns", [80, 60])
async def test_a_narrow_terminal_cuts_nothing_off(registry: Registry, tmp_path: Path, columns: int) -> None:
    narrow: dict[str, Any] = {"environment": {"COLUMNS": str(columns)}}
    with serving(registry, tmp_path) as server:
        registry.publish(MODEL, tmp_path / "stub-2", golden=[stub_golden(1)], metrics={"accuracy": 0.5})
        wait_for(lambda: 3 in registry.state(MODEL).rejected, "version 3 to be rejected", server.alive)
        server.wait_state(MODEL, 3, "REJECTED")
        reason = registry.state(MODEL).rejected[3].reason
        table = await modelport("status", "--server", server.address, **narrow)
        rollout = await modelport("rollout", "status", MODEL, "--server", server.address, **narrow)
    registry.record(MODEL, "noted", version=3, reason=REASON, details={"rollout": "x" * 32, "phase": "gates"})
    journal = await modelport("journal", MODEL, "--registry", registry.root, **narrow)
    for ran in (table, rollout, journal):
        assert ran.status == 0, ran.err
        assert "…" not in ran.out
        assert max(map(len, ran.out.splitlines())) <= columns
    assert all(word in table.out for word in ("rejected", "available", "stable", *reason.split()))
    assert all(word in rollout.out for word in ("version", "available", "100%", "errors", "p99 ms", "golden"))
    assert "no room for " in table.out
    assert words(REASON) in words(journal.out)
    assert "noted version 3  by " in journal.out
    assert f"rollout={'x' * 32} phase=gates" in words(journal.out)


async def test_what_is_no_terminal_has_room_for_all(registry: Registry) -> None:
    registry.record(MODEL, "noted", version=1, reason=REASON * 3)
    ran = await modelport("journal", MODEL, "--registry", registry.root, environment={"COLUMNS": ""})
    assert REASON * 3 in ran.out.splitlines()[-1]


async def test_a_model_that_the_server_does_not_serve_can_be_changed_all_the_same(
    registry: Registry, tmp_path: Path
) -> None:
    registry.publish("other", write_stub(tmp_path / "other", 1), golden=[stub_golden(1)])
    stub = program(stub=True)
    with run_server(registry.root, tmp_path / "server", "--model", "other", program=stub) as server:
        server.wait_serving("other", 1)
        ran = await modelport("rollout", "start", MODEL, 2, "--server", server.address)
    assert (ran.status, ran.err) == (0, "")
    assert "version 2 is the candidate" in ran.out


async def test_a_rollback_to_a_version_that_must_be_loaded_says_who_answers_meanwhile(tmp_path: Path) -> None:
    registry, hold = Registry(tmp_path / "registry"), tmp_path / "hold"
    hold.mkdir()
    stub = program(stub=True, hold=hold)
    with run_server(registry.root, tmp_path / "first", program=stub) as server:
        for tag in (1, 2):
            registry.publish(MODEL, write_stub(tmp_path / f"stub-{tag}", tag), golden=[stub_golden(tag)])
            server.wait_serving(MODEL, tag)
    hold_file(hold, 1, GOLDEN).touch()
    with run_server(registry.root, tmp_path / "second", program=stub) as server:
        server.wait_serving(MODEL, 2)
        ran = await modelport("rollout", "rollback", MODEL, "--server", server.address)
        assert ran.out.splitlines()[0] == (
            "m: version 1 is in charge; no rollout is under way; until version 1 is loaded, version 2 goes on answering"
        ), ran.err
        hold_file(hold, 1, GOLDEN).unlink()
        server.wait_serving(MODEL, 1)
