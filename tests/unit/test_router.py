"""Which version answers, and what is said when none does."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from modelport_registry import Manifest
from modelport_server.engines.process import LoadOrder
from modelport_server.errors import InvalidCallError, NotAvailableError, NotLoadedError, ServeError, UnknownNameError
from modelport_server.options import BatchLimits, EngineLimits
from modelport_server.routing import Router
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


@pytest.mark.parametrize(
    ("version", "alias", "answers"), [(None, None, 3), (3, None, 3), (2, None, 2), (None, "old", 2)]
)
def test_who_answers(router: Router, version: int | None, alias: str | None, answers: int) -> None:
    assert router.resolve("digits", version=version, alias=alias).version == answers


@pytest.mark.parametrize(
    ("model", "version", "alias", "kind", "words"),
    [
        ("nothing", None, None, UnknownNameError, "'nothing'"),
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
