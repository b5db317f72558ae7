"""Which version answers, and what is said when none does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

import pytest

from modelport_registry import Manifest
from modelport_server.engines.process import LoadOrder
from modelport_server.errors import InvalidCallError, NotAvailableError, NotLoadedError, ServeError, UnknownNameError
from modelport_server.options import BatchLimits, EngineLimits
from modelport_server.routing import Canary, Router, key_position
from modelport_server.servable import Servable


def _servable(version: int) -> Servable:
    """Returns a servable that has not been started."""
    return Servable(
        LoadOrder(Path("registry"), "digits", version, 8),
        cast("Manifest", None),
        BatchLimits(),
        EngineLimits(),
        on_state=lambda _: None,
        on_rejected=lambda _gate, _reason: None,
    )


@pytest.fixture
def router() -> Router:
    router = Router()
    route = router.route("digits")
    route.serving = _servable(3)
    route.available = {3: route.serving, 2: _servable(2)}
    route.aliases = {"stable": 3, "old": 2, "gone": 9, "broken": 4}
    route.known = {1: "retired", 2: "available", 3: "available", 4: "rejected (golden: off)"}
    router.route("new")
    return router


def test_whether_anybody_is_served() -> None:
    router = Router()
    assert not router.answers
    router.route("digits").available[3] = _servable(3)
    assert router.answers


@pytest.mark.parametrize(
    ("version", "alias", "answers"), [(None, None, 3), (3, None, 3), (2, None, 2), (None, "old", 2)]
)
def test_who_answers(router: Router, version: int | None, alias: str | None, answers: int) -> None:
    assert router.resolve("digits", version=version, alias=alias).version == answers


@pytest.mark.parametrize(
    ("model", "version", "alias", "kind", "words"),
    [
        ("nothing", None, None, UnknownNameError, "no model 'nothing' is served here; served are digits, new"),
        ("../x", None, None, InvalidCallError, "../x"),
        ("a/b", None, None, InvalidCallError, "a/b"),
        ("", None, None, InvalidCallError, "model name"),
        ("x" * 1_000_000, None, None, InvalidCallError, "model name"),
        ("digits", 7, None, UnknownNameError, "version 7"),
        ("digits", 0, None, UnknownNameError, "version 0"),
        ("digits", 1, None, NotLoadedError, "retired"),
        ("digits", 4, None, NotLoadedError, "golden: off"),
        ("digits", None, "unknown", UnknownNameError, "'unknown'"),
        ("digits", None, "../x", InvalidCallError, "alias"),
        ("digits", None, "gone", UnknownNameError, "version 9"),
        ("digits", None, "broken", NotLoadedError, "golden: off"),
        ("new", None, None, NotAvailableError, "no available version"),
    ],
)
def test_why_nobody_answers(
    router: Router, model: str, version: int | None, alias: str | None, kind: type[ServeError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        router.resolve(model, version=version, alias=alias)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_version_on_its_way_is_worth_waiting_for() -> None:
    router = Router()
    route = router.route("digits")
    route.known, route.coming = {1: "loading"}, frozenset({1})
    with pytest.raises(NotAvailableError):
        router.resolve("digits", version=1)


def test_a_model_that_was_removed_is_unknown(router: Router) -> None:
    router.remove("digits")
    with pytest.raises(UnknownNameError):
        router.resolve("digits")


# ---- a canary's share


@pytest.fixture
def shared(router: Router) -> Router:
    router.route("digits").canary = Canary(_servable(4), 0.1)
    return router


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 1.0])
def test_calls_without_a_key_are_spread_evenly(router: Router, share: float) -> None:
    router.route("digits").canary = Canary(_servable(4), share)
    canaries = 0
    for calls in range(1, 5001):
        canaries += router.resolve("digits").version == 4
        assert abs(canaries - calls * share) <= 1


def test_which_share_of_the_calls_each_version_gets(router: Router) -> None:
    assert router.shares() == {"digits": {3: 1.0}}  # of the new model no version answers yet
    router.route("digits").canary = Canary(_servable(5), 0.25)
    assert router.shares() == {"digits": {3: 0.75, 5: 0.25}}


def test_a_key_goes_one_way(shared: Router) -> None:
    keys = [f"user-{number}" for number in range(200)]
    first = {key: shared.resolve("digits", key=key).version for key in keys}
    shared.resolve("digits")
    assert {key: shared.resolve("digits", key=key).version for key in reversed(keys)} == first
    assert set(first.values()) == {3, 4}


def test_a_larger_share_keeps_the_keys_of_a_smaller_one(router: Router) -> None:
    keys = [f"user-{number}" for number in range(500)]
    before: set[str] = set()
    for share in (0.01, 0.1, 0.5, 1.0):
        router.route("digits").canary = Canary(_servable(4), share)
        now = {key for key in keys if router.resolve("digits", key=key).version == 4}
        assert before <= now
        before = now
    assert before == set(keys)


def test_keys_fall_alike_on_every_server_and_evenly() -> None:
    positions = [key_position("digits", 4, f"user-{number}") for number in range(20_000)]
    assert all(0 <= position < 1 for position in positions)
    for share in (0.01, 0.1, 0.5):  # five standard deviations of a binomial count
        count = sum(position < share for position in positions)
        assert abs(count - share * 20_000) < 5 * (20_000 * share * (1 - share)) ** 0.5
    digest = hashlib.blake2b(b"digits@4/user-7", digest_size=8).digest()
    assert key_position("digits", 4, "user-7") == int.from_bytes(digest, "big") / 2**64


def test_another_candidate_tries_other_keys() -> None:
    keys = [f"user-{number}" for number in range(1000)]
    one, other = ({key for key in keys if key_position("digits", version, key) < 0.1} for version in (4, 5))
    assert len(one & other) < 50  # about 10 of 100 by chance


@pytest.mark.parametrize(("version", "alias", "answers"), [(3, None, 3), (2, None, 2), (None, "stable", 3)])
def test_who_names_a_version_gets_it(shared: Router, version: int | None, alias: str | None, answers: int) -> None:
    assert {shared.resolve("digits", version=version, alias=alias).version for _ in range(50)} == {answers}
