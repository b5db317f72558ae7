"""Decisions reach the registry once, whoever else decides, and are taken alone where it can't be written."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from modelport_registry import Phase, Registry, RegistryError, State, transitions
from modelport_server.rollout.decisions import Decision, Decisions

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = "toy"


@pytest.fixture
def registry(tmp_path: Path, publish_tag: Callable[[Path, str, int], object]) -> Registry:
    """Returns a registry with two versions, of which the first is in charge."""
    for tag in (1, 2):
        publish_tag(tmp_path / "registry", MODEL, tag)
    registry = Registry(tmp_path / "registry")
    registry.set_alias(MODEL, "stable", 1)
    registry.unpin(MODEL)
    return registry


def start(version: int = 2) -> Decision:
    """Returns the decision to begin a rollout."""
    begin = partial(transitions.start, version=version, rollout_id="r", now=NOW, actor="somebody")
    return Decision(begin, "rollout started", version, "because", {"calls": 3})


def reject(version: int = 2) -> Decision:
    """Returns what a server insists on when a version fails."""
    refuse = partial(transitions.reject, version=version, gate="golden", reason="off", now=NOW, actor="somebody")
    return Decision(refuse, "rejected", version, "golden: off")


class Told:
    """Counts how often the policy should be asked again."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.event.set()


def known(registry: Registry, told: Callable[[], None]) -> Decisions:
    """Returns decisions that know the state as it is."""
    decisions = Decisions(registry, MODEL, told)
    decisions.observe(registry.state(MODEL), monotonic())
    return decisions


async def test_a_decision_is_written_with_its_grounds(registry: Registry) -> None:
    told = Told()
    decisions = known(registry, told)
    decisions.decide(start())
    assert decisions.deciding
    await told.event.wait()
    assert not decisions.deciding
    state = registry.state(MODEL)
    assert decisions.desired == state
    assert state.rollout is not None
    assert (state.rollout.version, state.rollout.phase) == (2, Phase.GATES)
    entry = registry.journal(MODEL)[-1]
    assert (entry.action, entry.version, entry.reason) == ("rollout started", 2, "because")
    assert entry.details["calls"] == 3


async def test_what_somebody_else_decided_first_counts(registry: Registry) -> None:
    one, other = known(registry, Told()), known(registry, told := Told())
    one.decide(start())
    await one.settle()
    other.decide(start())
    await told.event.wait()
    assert other.desired == one.desired == registry.state(MODEL)
    assert [entry.action for entry in registry.journal(MODEL)].count("rollout started") == 1


async def test_many_servers_decide_once(registry: Registry) -> None:
    servers = [known(registry, Told()) for _ in range(8)]
    for server in servers:
        server.decide(start())
    for server in servers:
        await server.settle()
    assert [entry.action for entry in registry.journal(MODEL)].count("rollout started") == 1
    assert {server.desired.generation for server in servers} == {registry.state(MODEL).generation}


async def test_a_rejection_is_written_whatever_was_decided_meanwhile(registry: Registry) -> None:
    decisions = known(registry, Told())
    registry.start_rollout(MODEL, 2)
    registry.promote(MODEL)
    decisions.insist(reject())
    decisions.insist(reject())
    await decisions.settle()
    state = registry.state(MODEL)
    assert state.rejected.keys() == {2}
    assert state.rollout is None
    assert decisions.desired == state
    assert [entry.action for entry in registry.journal(MODEL)].count("rejected") == 1


async def test_an_older_look_does_not_undo_what_is_known(registry: Registry) -> None:
    looked_at_s, before = monotonic(), registry.state(MODEL)
    decisions = known(registry, Told())
    decisions.decide(start())
    await decisions.settle()
    decisions.observe(before, looked_at_s)
    assert decisions.desired.rollout is not None
    decisions.observe(before, monotonic())  # the registry itself was put back
    assert decisions.desired.rollout is None


class Unwritable(Registry):
    """A registry on a disk that refuses writes, for as long as ``error`` is set."""

    error: int | None = errno.EROFS

    def change(self, *args: Any, **more: Any) -> State:
        if self.error is None:
            return super().change(*args, **more)
        self.error, error = (None if self.error == errno.EIO else self.error), self.error
        raise RegistryError("can't change toy") from OSError(error, "no")


async def test_who_may_not_write_decides_alone(registry: Registry) -> None:
    readable = Unwritable(registry.root)
    decisions = known(readable, Told())
    decisions.decide(start())
    await decisions.settle()
    assert decisions.desired.rollout is not None
    decisions.observe(readable.state(MODEL), monotonic())  # nothing has changed: its own decision holds
    assert decisions.desired.rollout is not None
    assert registry.state(MODEL).rollout is None
    registry.set_alias(MODEL, "stable", 2)
    decisions.observe(readable.state(MODEL), monotonic())  # somebody who may write has decided
    assert decisions.desired == registry.state(MODEL)


async def test_a_rejection_is_tried_until_it_is_written(registry: Registry) -> None:
    failing = Unwritable(registry.root)
    failing.error = errno.EIO
    told = Told()
    decisions = known(failing, told)
    decisions.insist(reject())
    await told.event.wait()
    assert registry.state(MODEL).rejected.keys() == {2}


async def test_a_decision_that_makes_no_sense_any_more_is_dropped(registry: Registry) -> None:
    told = Told()
    decisions = known(registry, told)
    stale = replace(decisions.desired)
    decisions.decide(Decision(transitions.advance, "step", 2))  # no rollout is under way
    await told.event.wait()
    assert decisions.desired == stale == registry.state(MODEL)
