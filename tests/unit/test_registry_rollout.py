"""Rollouts as the registry keeps them: the verbs, ``state.json``, and what the journal says."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modelport_registry import (
    JSON,
    ConflictError,
    IntegrityError,
    NotFoundError,
    Phase,
    Registry,
    RegistryError,
    RolloutPolicy,
    State,
    Strategy,
    transitions,
)
from tests.support.saved_models import write_fake_saved_model

MODEL = "digits"
AT = "2026-01-01T00:00:00+00:00"
CANARY = RolloutPolicy(strategy=(Strategy.CANARY,))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry with three versions and a canary policy; version 1 is in charge."""
    registry = Registry(tmp_path / "registry")
    model = write_fake_saved_model(tmp_path / "model")
    for _ in range(3):
        registry.publish(MODEL, model)
    registry.pin(MODEL, 1)
    registry.unpin(MODEL)
    registry.set_policy(MODEL, CANARY)
    return registry


def _advance(registry: Registry) -> State:
    return registry.change(MODEL, transitions.advance, action="step", version=2)


def _reject(registry: Registry, version: int) -> State:
    reject = partial(transitions.reject, gate="golden", reason="off", now=datetime.now(UTC), actor="a server")
    return registry.change(MODEL, partial(reject, version=version), action="rejected", version=version)


def _start(registry: Registry) -> None:
    registry.start_rollout(MODEL, 2)


def _start_and_pause(registry: Registry) -> None:
    registry.start_rollout(MODEL, 2)
    registry.pause_rollout(MODEL)


VERBS: dict[str, tuple[Callable[[Registry], object], tuple[Any, ...]]] = {
    "start_rollout": (lambda _: None, (2,)),
    "approve": (lambda registry: _reject(registry, 3), (3,)),
    "pause_rollout": (_start, ()),
    "resume_rollout": (_start_and_pause, ()),
    "promote": (_start, ()),
    "rollback": (_start, ()),
    "pin": (lambda _: None, (3,)),
    "unpin": (lambda registry: registry.pin(MODEL), ()),
    "set_policy": (lambda _: None, (RolloutPolicy(),)),
    "set_alias": (lambda _: None, ("best", 3)),
    "remove_alias": (lambda registry: registry.set_alias(MODEL, "best", 3), ("best",)),
}
"""Each verb, what makes it possible, and its arguments after the model."""


class TestVerbs:
    def test_a_rollout_from_its_start_to_its_end(self, registry: Registry) -> None:
        state = registry.start_rollout(MODEL, 2, reason="new data", actor="ann")
        assert state.rollout is not None
        assert (state.rollout.actor, state.rollout.reason, state.rollout.phase) == ("ann", "new data", Phase.GATES)
        registry.pause_rollout(MODEL)
        registry.resume_rollout(MODEL)
        _advance(registry)
        assert registry.promote(MODEL).aliases == {"stable": 2}
        state = registry.rollback(MODEL, reason="complaints")
        assert (state.rollout, state.aliases, state.rejected[2].reason) == (None, {"stable": 1}, "complaints")
        state = registry.approve(MODEL, 2)
        assert state.rollout is not None
        assert state.rejected == {}
        registry.pin(MODEL)
        state = registry.unpin(MODEL)
        assert (state.pin, state.rollout, state.aliases) == (None, None, {"stable": 1})
        assert registry.state(MODEL) == state
        assert [(entry.action, entry.version) for entry in registry.journal(MODEL)[-9:]] == [
            ("rollout started", 2),
            ("paused", 2),
            ("resumed", 2),
            ("step", 2),
            ("promoted", 2),
            ("rolled back", 2),
            ("approved", 2),
            ("pinned", 1),
            ("unpinned", 1),
        ]

    def test_each_rollout_has_an_id_of_its_own(self, registry: Registry) -> None:
        ids: set[str] = set()
        for _ in range(2):
            state = registry.start_rollout(MODEL, 2)
            assert state.rollout is not None
            ids.add(state.rollout.id)
            registry.pin(MODEL)
            registry.unpin(MODEL)
        assert len(ids) == 2

    @pytest.mark.parametrize("verb", VERBS)
    def test_each_is_a_compare_and_swap_with_a_name_and_a_reason(self, registry: Registry, verb: str) -> None:
        prepare, arguments = VERBS[verb]
        prepare(registry)
        act = partial(getattr(registry, verb), MODEL, *arguments)
        generation, lines = registry.state(MODEL).generation, len(registry.journal(MODEL))
        with pytest.raises(ConflictError, match=f"generation {generation}, not {generation - 1}"):
            act(expected_generation=generation - 1)
        assert len(registry.journal(MODEL)) == lines
        assert act(expected_generation=generation, reason="because", actor="ann").generation == generation + 1
        entry = registry.journal(MODEL)[-1]
        assert (entry.reason, entry.actor) == ("because", "ann")

    def test_what_changes_nothing_is_not_written(self, registry: Registry) -> None:
        before, lines = registry.state(MODEL), len(registry.journal(MODEL))
        assert registry.unpin(MODEL) == before
        assert registry.set_policy(MODEL, CANARY) == before
        assert registry.change(MODEL, lambda state: state, action="nothing") == before
        assert len(registry.journal(MODEL)) == lines

    def test_a_refusal_is_not_written(self, registry: Registry) -> None:
        before, lines = registry.state(MODEL), len(registry.journal(MODEL))
        for act in (registry.pause_rollout, registry.resume_rollout, registry.promote, registry.rollback):
            with pytest.raises(RegistryError):
                act(MODEL)
        for refused in (registry.start_rollout, registry.approve, registry.pin):
            with pytest.raises(NotFoundError, match="digits has no version 9; the highest is 3"):
                refused(MODEL, 9)
            with pytest.raises(RegistryError, match="0 is not a version number"):
                refused(MODEL, 0)
            with pytest.raises(NotFoundError, match="no model 'other'"):
                refused("other", 1)
        with pytest.raises(NotFoundError, match="no model 'other'"):
            registry.set_policy("other", CANARY)
        assert registry.state(MODEL) == before
        assert len(registry.journal(MODEL)) == lines

    def test_setting_stable_by_hand_pins_it(self, registry: Registry, tmp_path: Path) -> None:
        assert registry.set_alias(MODEL, "stable", 2).pin == 2
        assert transitions.candidate(registry.state(MODEL), registry.versions(MODEL)) is None
        assert registry.remove_alias(MODEL, "stable").pin is None
        version = registry.publish(MODEL, tmp_path / "model", aliases=["best", "stable"]).version
        assert (registry.state(MODEL).pin, registry.resolve(MODEL)) == (version, version)

    def test_what_was_rejected_is_not_resolved(self, registry: Registry) -> None:
        registry.remove_alias(MODEL, "stable")
        assert registry.resolve(MODEL) == 3
        _reject(registry, 3)
        assert registry.resolve(MODEL) == 2
        for version in (1, 2):
            _reject(registry, version)
        assert registry.resolve(MODEL) == 3


class TestGarbage:
    def test_what_a_rollout_needs_is_not_collected(self, registry: Registry, tmp_path: Path) -> None:
        for _ in range(3):
            registry.publish(MODEL, tmp_path / "model")
        registry.start_rollout(MODEL, 2)
        assert registry.collect_garbage(MODEL, keep=1).removed == {MODEL: (3, 4, 5)}
        registry.promote(MODEL)
        _advance(registry)
        assert registry.collect_garbage(MODEL, keep=1).removed == {}
        registry.change(MODEL, partial(transitions.complete, now=datetime.now(UTC)), action="completed")
        assert registry.collect_garbage(MODEL, keep=1).removed == {}
        assert registry.versions(MODEL) == [1, 2, 6]
        assert registry.rollback(MODEL).aliases == {"stable": 1}

    def test_there_is_no_way_back_to_what_was_collected(self, registry: Registry, tmp_path: Path) -> None:
        registry.publish(MODEL, tmp_path / "model")
        registry.set_policy(MODEL, RolloutPolicy(strategy=(Strategy.IMMEDIATE,)))
        for version in (2, 3, 4):
            registry.start_rollout(MODEL, version)
            _advance(registry)
            registry.change(MODEL, partial(transitions.complete, now=datetime.now(UTC)), action="completed")
        assert registry.collect_garbage(MODEL, keep=1).removed == {MODEL: (1, 2)}
        assert registry.rollback(MODEL).aliases == {"stable": 3}
        with pytest.raises(RegistryError, match="there is no version to go back to"):
            registry.rollback(MODEL)

    def test_where_a_rollback_would_lead_is_not_collected(self, registry: Registry, tmp_path: Path) -> None:
        registry.set_policy(MODEL, RolloutPolicy(strategy=(Strategy.IMMEDIATE,)))
        for version in (2, 3):
            registry.start_rollout(MODEL, version)
            _advance(registry)
            registry.change(MODEL, partial(transitions.complete, now=datetime.now(UTC)), action="completed")
        _reject(registry, 2)
        assert registry.collect_garbage(MODEL, keep=1).removed == {MODEL: (2,)}
        assert registry.rollback(MODEL).aliases == {"stable": 1}

    def test_a_pinned_version_is_not_collected_even_when_it_was_rejected(self, registry: Registry) -> None:
        registry.pin(MODEL, 2)
        _reject(registry, 2)
        assert registry.state(MODEL).aliases == {}
        assert registry.collect_garbage(MODEL, keep=1).removed == {MODEL: (1,)}

    def test_the_rejection_goes_with_the_version(self, registry: Registry) -> None:
        _reject(registry, 2)
        assert registry.collect_garbage(MODEL, keep=1).removed == {MODEL: (2,)}
        assert registry.state(MODEL).rejected == {}


class TestState:
    def test_everything_comes_back(self, registry: Registry) -> None:
        registry.set_alias(MODEL, "best", 1)
        _reject(registry, 3)
        registry.start_rollout(MODEL, 2, strategy=(Strategy.SHADOW, Strategy.CANARY))
        _advance(registry)
        registry.pause_rollout(MODEL)
        registry.rollback(MODEL)
        state = registry.approve(MODEL, 2)
        assert Registry(registry.root).state(MODEL) == state
        document = json.loads((registry.root / MODEL / "state.json").read_text())
        assert set(document) == {
            "format",
            "generation",
            "aliases",
            "collected",
            "pin",
            "rollout",
            "last",
            "promotions",
            "rejected",
            "considered",
            "policy",
        }
        assert document["policy"] == {"strategy": ["canary"]}

    def test_a_state_that_was_written_without_promotions_knows_the_last_one(self, registry: Registry) -> None:
        registry.start_rollout(MODEL, 2, strategy=(Strategy.IMMEDIATE,))
        _advance(registry)
        state = registry.change(MODEL, partial(transitions.complete, now=datetime.now(UTC)), action="test")
        assert [(ended.version, ended.previous) for ended in state.promotions] == [(2, 1)]
        assert Registry(registry.root).state(MODEL) == state
        path = registry.root / MODEL / "state.json"
        document = json.loads(path.read_text())
        del document["promotions"]
        path.write_text(json.dumps(document))
        assert Registry(registry.root).state(MODEL).promotions == state.promotions

    def test_a_state_of_before_rollouts_is_fine(self, registry: Registry) -> None:
        path = registry.root / MODEL / "state.json"
        path.write_text('{"format": 1, "generation": 7, "aliases": {"stable": 2}, "collected": 0}')
        assert registry.state(MODEL) == State(7, {"stable": 2})
        assert registry.start_rollout(MODEL, 3).generation == 8

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("pin", 0),
            ("pin", "1"),
            ("pin", 2**63),
            ("considered", -1),
            ("rejected", []),
            ("rejected", {"x": {"gate": "g", "reason": "", "at": "2026-01-01T00:00:00+00:00", "actor": ""}}),
            ("rejected", {"01": {"gate": "g", "reason": "", "at": "2026-01-01T00:00:00+00:00", "actor": ""}}),
            ("rejected", {"1": {"gate": "g", "reason": "", "at": "yesterday", "actor": ""}}),
            ("rejected", {"1": {"gate": "g", "reason": "", "at": "2026-01-01T00:00:00", "actor": ""}}),
            ("rejected", {"1": 1}),
            ("policy", []),
            ("policy", {"min_calls": 0}),
            ("policy", {"watch_s": "1"}),
            ("policy", {"strategy": ["fast"]}),
            ("policy", {"max_speed_ratio": 10**400}),
            ("policy", {"canary_steps": [{"kind": "canary", "share": 10**400, "bake_s": 1}]}),
            ("last", {"version": 1}),
            ("last", 1),
            ("last", {"version": 1, "previous": None, "outcome": "lost", "reason": "", "at": AT}),
            ("rollout", {}),
            ("rollout", {"phase": "over"}),
            ("rollout", {"steps": 1}),
            ("rollout", {"steps": [{"kind": "canary", "share": 2, "bake_s": 1}]}),
            ("rollout", {"steps": [{"kind": "jump", "share": 1, "bake_s": 1}]}),
            ("rollout", {"phase": "step", "step": 3}),
            ("rollout", {"paused": "no"}),
            ("rollout", {"version": 0}),
            ("rollout", {"started": ""}),
            ("rollout", {"id": None}),
        ],
    )
    def test_a_damaged_field_is_one_clear_line(self, registry: Registry, field: str, value: Any) -> None:
        registry.start_rollout(MODEL, 2)
        path = registry.root / MODEL / "state.json"
        document = json.loads(path.read_text())
        more = {**document["rollout"], **value} if field == "rollout" and value else value
        path.write_text(json.dumps({**document, field: more}))
        for act in (registry.state, registry.pause_rollout, registry.resolve, registry.unpin):
            with pytest.raises(IntegrityError, match="is damaged") as caught:
                act(MODEL)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) <= 1024

    def test_long_reasons_do_not_make_it_grow(self, registry: Registry) -> None:
        reject = partial(transitions.reject, gate="load", now=datetime.now(UTC), actor="a server")
        registry.change(MODEL, partial(reject, version=3, reason="\u2028" * 90_000), action="rejected", version=3)
        assert len((registry.root / MODEL / "state.json").read_bytes()) < 10_000

    def test_a_state_that_nobody_could_read_is_not_written(self, registry: Registry) -> None:
        before = registry.state(MODEL)
        with pytest.raises(RegistryError, match="more than 8 MiB: remove old versions with modelport gc"):
            registry.change(MODEL, lambda state: replace(state, other={"x": "y" * (9 << 20)}), action="grown")
        assert registry.state(MODEL) == before


class TestJournal:
    def test_it_says_who_when_what_why_and_the_digests(self, registry: Registry) -> None:
        before = datetime.now(UTC)
        figures: JSON = [{"gate": "golden", "outcome": "passed", "seconds": 0.5, "figures": {"worst": 1e-7}}]
        registry.start_rollout(MODEL, 2)
        state = registry.change(
            MODEL,
            transitions.promote,
            action="promoted",
            version=2,
            reason="all gates passed",
            details={"gates": figures},
            actor="server-1",
        )
        entry = registry.journal(MODEL)[-1]
        assert before <= entry.time <= datetime.now(UTC)
        assert (entry.action, entry.version, entry.reason, entry.actor) == (
            "promoted",
            2,
            "all gates passed",
            "server-1",
        )
        manifest = (registry.path(MODEL, 2) / "manifest.json").read_bytes()
        assert entry.details == {
            "gates": figures,
            "new_generation": state.generation,
            "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        }
        _advance(registry)
        assert registry.journal(MODEL)[-1].details["stable"] == {"before": 1, "after": 2}

    def test_a_publish_has_the_digest_too(self, registry: Registry) -> None:
        manifest = (registry.path(MODEL, 1) / "manifest.json").read_bytes()
        assert registry.journal(MODEL)[0].details["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()

    def test_a_decision_with_too_many_figures_is_written_without_the_largest(self, registry: Registry) -> None:
        registry.start_rollout(MODEL, 2)
        registry.change(
            MODEL,
            transitions.promote,
            action="promoted",
            version=2,
            reason="\U0001f600" * 50_000,
            details={"small": 1, "large": ["x" * 1000] * 100},
        )
        entry = registry.journal(MODEL)[-1]
        assert (entry.details["small"], entry.details["large"]) == (1, None)
        assert 0 < len(entry.reason) <= 1000
        line = (registry.root / MODEL / "journal.jsonl").read_bytes().splitlines()[-1]
        assert len(line) < 64 << 10

    def test_figures_that_are_not_json_change_nothing(self, registry: Registry) -> None:
        before = registry.start_rollout(MODEL, 2)
        with pytest.raises(RegistryError, match="must be JSON"):
            registry.change(MODEL, transitions.promote, action="promoted", details={"p99": float("nan")})
        assert registry.state(MODEL) == before

    def test_without_room_for_the_journal_nothing_changes(self, registry: Registry) -> None:
        before = registry.state(MODEL)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (registry.root / MODEL / "journal.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(RegistryError, match="can't change digits"):
                registry.start_rollout(MODEL, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert registry.state(MODEL) == before

    def test_what_was_announced_in_vain_is_left_out(self, registry: Registry) -> None:
        """As when its writer was killed between the journal and the state."""
        path = registry.root / MODEL / "state.json"
        before = path.read_bytes()
        registry.start_rollout(MODEL, 3, reason="in vain")
        path.write_bytes(before)
        assert registry.journal(MODEL)[-1].action == "policy"
        registry.start_rollout(MODEL, 2, reason="in effect")
        registry.record(MODEL, "verified", version=2)
        registry.promote(MODEL)
        reasons = [(entry.action, entry.reason) for entry in registry.journal(MODEL)][-3:]
        assert reasons == [("rollout started", "in effect"), ("verified", ""), ("promoted", "")]

    def test_what_was_announced_in_vain_stays_left_out_after_a_collection(self, registry: Registry) -> None:
        path = registry.root / MODEL / "state.json"
        before = path.read_bytes()
        registry.start_rollout(MODEL, 3, reason="in vain")
        path.write_bytes(before)
        assert registry.collect_garbage(MODEL, keep=1).removed == {MODEL: (2,)}
        policy, collected = registry.journal(MODEL)[-2:]
        assert (policy.action, collected.action, collected.version) == ("policy", "collect", 2)
        assert collected.details["new_generation"] == registry.state(MODEL).generation

    def test_what_was_announced_in_vain_stays_left_out_after_aliases(self, registry: Registry, tmp_path: Path) -> None:
        """All aliases of a publish are one change, so that none of them is said that was not made."""
        registry.publish(MODEL, tmp_path / "model", aliases=["best", "tall"])
        entry = registry.journal(MODEL)[-1]
        assert (entry.action, entry.details["aliases"]) == ("alias", ["best", "tall"])
        path = registry.root / MODEL / "state.json"
        before = path.read_bytes()
        registry.publish(MODEL, tmp_path / "model", aliases=["best", "tall"])
        path.write_bytes(before)
        assert [entry.action for entry in registry.journal(MODEL)][-3:] == ["publish", "alias", "publish"]

    def test_it_can_be_read_when_the_state_is_damaged(self, registry: Registry) -> None:
        lines = len(registry.journal(MODEL))
        (registry.root / MODEL / "state.json").write_text("{")
        assert len(registry.journal(MODEL)) == lines

    def test_the_manifest_of_a_version_that_is_gone_has_no_digest(self, registry: Registry) -> None:
        registry.start_rollout(MODEL, 2)
        (registry.root / MODEL / "2" / "manifest.json").unlink()
        os.mkfifo(registry.root / MODEL / "2" / "manifest.json")
        _reject(registry, 2)
        assert "manifest_sha256" not in registry.journal(MODEL)[-1].details
