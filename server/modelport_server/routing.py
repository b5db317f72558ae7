"""Which version answers a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelport.names import is_valid_name, shown
from modelport_server.errors import InvalidCallError, NotAvailableError, NotLoadedError, UnknownNameError
from modelport_server.servable import Servable


@dataclass(slots=True)
class Route:
    """What the router knows of one model."""

    serving: Servable | None = None
    """Answers calls that name no version."""
    available: dict[int, Servable] = field(default_factory=dict[int, Servable])
    """Every version that takes calls."""
    aliases: Mapping[str, int] = field(default_factory=dict[str, int])
    known: Mapping[int, str] = field(default_factory=dict[int, str])
    """Every version in the registry with its state, for messages."""
    coming: frozenset[int] = frozenset()
    """Versions that have not come to the end of their loading."""


class Router:
    """Finds the servable for a call; the rollout keeps it up to date."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}

    def route(self, model: str) -> Route:
        """Returns a model's route, made on first use; for the rollout."""
        return self._routes.setdefault(model, Route())

    def remove(self, model: str) -> None:
        """Forgets a model."""
        self._routes.pop(model, None)

    def resolve(self, model: str, *, version: int | None = None, alias: str | None = None) -> Servable:
        """Returns the servable that answers.

        Raises:
            InvalidCallError: if a name is not legal.
            UnknownNameError: if there is no such model, version or alias.
            NotLoadedError: if it exists and is not loaded.
            NotAvailableError: if no version of the model can answer yet.
        """
        route = self._routes.get(model)
        if route is None:
            _check_name("model", model)
            raise UnknownNameError(f"no model {model!r} is served here")
        if alias is not None:
            _check_name("alias", alias)
            if alias not in route.aliases:
                raise UnknownNameError(f"model {model!r} has no alias {alias!r}")
            version = route.aliases[alias]
        if version is None:
            if route.serving is None:
                raise NotAvailableError(f"model {model!r} has no available version yet", retry_after_s=0.5)
            return route.serving
        found = route.available.get(version)
        if found is not None:
            return found
        if version not in route.known:
            raise UnknownNameError(f"model {model!r} has no version {version}")
        if route.serving is None and version in route.coming:
            raise NotAvailableError(f"model {model!r} has no available version yet", retry_after_s=0.5)
        raise NotLoadedError(f"version {version} of {model!r} is not loaded: it is {route.known[version]}")


def _check_name(kind: str, name: str) -> None:
    if not is_valid_name(name):
        raise InvalidCallError(f"{shown(name)} is not a legal {kind} name: use [a-z0-9][a-z0-9_-]{{0,63}}")
