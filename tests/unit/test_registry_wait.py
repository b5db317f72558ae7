"""Waiting for a version by the registry alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from modelport import RolloutError, RolloutTimeoutError, VersionRejectedError
from modelport_registry import (
    NotFoundError,
    Registry,
    RolloutPolicy,
    State,
    Strategy,
    parse_step,
    transitions,
    wait_until_stable,
)
from tests.support.saved_models import write_fake_saved_model

NOW = datetime(2026, 11, 22, tzinfo=UTC)
Change = Callable[[State], State]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions; the first is in charge."""
    registry = Registry(tmp_path / "registry")
    model = write_fake_saved_model(tmp_path / "model")
    for _ in range(3):
        registry.publish("m", model)
    registry.change("m", lambda state: replace(state, aliases={"stable": 1}), action="test")
    return registry


def started(version: int) -> Change:
    return lambda state: transitions.start(state, version, rollout_id=str(version), now=NOW, actor="a")


def rejected(version: int, gate: str, reason: str) -> Change:
    return lambda state: transitions.reject(state, version, gate, reason, NOW, "a")


def advanced(state: State) -> State:
    return transitions.advance(state)


def test_follows_a_version_until_it_is_in_charge(registry: Registry) -> None:
    policy = RolloutPolicy(strategy=(Strategy.SHADOW, Strategy.CANARY))
    registry.set_policy("m", policy)
    told: list[str] = []
    steps: list[Change] = [started(3), transitions.pause, transitions.resume, *[advanced] * 5]

    def on_progress(phase: str) -> None:
        told.append(phase)
        if steps:
            registry.change("m", steps.pop(0), action="test")

    state = wait_until_stable(registry, "m", 3, timeout_s=60, on_progress=on_progress)
    assert state.aliases["stable"] == 3
    assert told == [
        "it waits for a server to take it up",
        "gates",
        "gates, paused",
        "gates",
        "step 1 of 4 (shadow 100%): 0 s of 60 s",
        "step 2 of 4 (canary 1%): 0 s of 60 s",
        "step 3 of 4 (canary 10%): 0 s of 60 s",
        "step 4 of 4 (canary 50%): 0 s of 60 s",
        "it is in charge",
    ]


def test_says_how_long_a_step_has_lasted_and_where_its_figures_are(registry: Registry) -> None:
    registry.set_policy("m", RolloutPolicy(strategy=(Strategy.CANARY,), canary_steps=(parse_step("1%:1s"),)))
    for change in (started(2), advanced):
        registry.change("m", change, action="test")
    told: list[str] = []

    def on_progress(text: str) -> None:
        told.append(text)
        if "are over" in text:
            registry.change("m", advanced, action="test")

    wait_until_stable(registry, "m", 2, timeout_s=60, on_progress=on_progress, progress_every_s=0.0)
    assert told[0] == "step 1 of 1 (canary 1%): 0 s of 1 s"
    assert told[-2] == "step 1 of 1 (canary 1%): 1 s are over; for what it lacks, see: modelport rollout status m"


def test_says_whose_turn_it_is(registry: Registry) -> None:
    registry.set_policy("m", RolloutPolicy(strategy=(Strategy.CANARY,)))
    told: list[str] = []
    changes: list[Change] = [advanced, transitions.pause, transitions.promote, started(3), *[advanced] * 4]
    registry.change("m", started(2), action="test")

    def on_progress(text: str) -> None:
        told.append(text)
        if changes:
            registry.change("m", changes.pop(0), action="test")

    wait_until_stable(registry, "m", 3, timeout_s=60, on_progress=on_progress, progress_every_s=0.0)
    waits = "it waits for the rollout of version 2 to end: "
    assert told[:4] == [
        f"{waits}gates",
        f"{waits}step 1 of 3 (canary 1%)",
        f"{waits}step 1 of 3 (canary 1%), paused",
        "version 2 has just taken over and is watched; a server takes this one up next",
    ]


def test_a_version_that_is_in_charge_already(registry: Registry) -> None:
    assert wait_until_stable(registry, "m", 1).aliases["stable"] == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([rejected(2, "golden", "row 3 is off")], "m version 2 was rejected at the gate golden: row 3 is off"),
        ([started(2), advanced, rejected(2, "bake", "errors")], "m version 2 was rolled back: errors"),
        ([started(2), rejected(2, "crash", "signal 11")], "m version 2 was rejected as it crashed: signal 11"),
        ([rejected(2, "speed", "")], "no reason was given"),
    ],
)
def test_says_why_a_version_was_rejected(registry: Registry, changes: list[Change], text: str) -> None:
    for change in changes:
        registry.change("m", change, action="test")
    with pytest.raises(VersionRejectedError, match=text) as caught:
        wait_until_stable(registry, "m", 2, timeout_s=60)
    assert (caught.value.model, caught.value.version) == ("m", 2)


def pinned(state: State) -> State:
    return transitions.pin(state, None, NOW)


def manual(state: State) -> State:
    return transitions.set_policy(state, RolloutPolicy(strategy=(Strategy.MANUAL,)))


def unchanged(state: State) -> State:
    return state


def tried_four(state: State) -> State:
    return replace(state, considered=4)


def replaced(state: State) -> State:
    return transitions.unpin(transitions.pin(started(3)(state), 1, NOW))


@pytest.mark.parametrize(
    ("version", "change", "text"),
    [
        (3, pinned, "version 1 is pinned; take the pin off: modelport pin m --remove"),
        (3, manual, "the model's policy is manual; start it: modelport rollout start m 3"),
        (2, unchanged, "was passed over: version 3 goes before it; start it: modelport rollout start m 2"),
        (3, replaced, "its rollout has ended, replaced; start it"),
        (3, tried_four, "was passed over: version 4 was tried before it"),
    ],
)
def test_says_at_once_that_nothing_will_happen(registry: Registry, version: int, change: Change, text: str) -> None:
    registry.change("m", change, action="test")
    with pytest.raises(RolloutError, match=text) as caught:
        wait_until_stable(registry, "m", version, timeout_s=60)
    assert "\n" not in str(caught.value)


def test_a_named_version_goes_on_whatever_the_policy_says(registry: Registry) -> None:
    for change in (manual, started(2), advanced):
        registry.change("m", change, action="test")
    assert wait_until_stable(registry, "m", 2).rollout is not None


def test_waits_for_its_turn_and_no_longer_than_told(registry: Registry) -> None:
    registry.change("m", started(2), action="test")
    with pytest.raises(RolloutTimeoutError, match="it waits for the rollout of version 2 to end"):
        wait_until_stable(registry, "m", 3, timeout_s=0.3)


def test_a_version_that_is_not_there(registry: Registry) -> None:
    with pytest.raises(NotFoundError):
        wait_until_stable(registry, "m", 9)
    with pytest.raises(NotFoundError):
        wait_until_stable(registry, "n", 1)


def test_the_first_version_of_all(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish("m", write_fake_saved_model(tmp_path / "model"))
    waiting = threading.Event()
    found: list[Any] = []

    def wait() -> None:
        found.append(wait_until_stable(registry, "m", 1, timeout_s=60, on_progress=lambda _: waiting.set()))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(60)
    registry.change("m", started(1), action="test")
    registry.change("m", advanced, action="test")
    thread.join(60)
    assert found[0].aliases == {"stable": 1}
