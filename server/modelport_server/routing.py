"""Which version answers a call."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from modelport.names import is_valid_name, shown
from modelport_server.errors import InvalidCallError, NotAvailableError, NotLoadedError, UnknownNameError
from modelport_server.servable import Servable


@dataclass(slots=True)
class Canary:
    """A candidate that gets a share of the calls that name no version."""

    servable: Servable
    share: float
    """Of the calls, 0 to 1."""
    _owed: float = field(default=0.0, init=False)
    """How much of a call without a key it has not got yet."""

    def takes(self, model: str, key: str) -> bool:
        """Returns whether a call is the candidate's.

        Calls with a key are told apart by a hash of the model, the version and the key, alike on every
        server; a larger share takes the keys of a smaller one and more. Calls without one are spread
        evenly: after n calls it has had the share of n, to within one call.
        """
        if key:
            return key_position(model, self.servable.version, key) < self.share
        self._owed += self.share
        if self._owed < 1 - 1e-9:
            return False
        self._owed -= 1
        return True


def key_position(model: str, version: int, key: str) -> float:
    """Returns where in 0 <= x < 1 a routing key lies when ``version`` is the candidate.

    The first eight bytes of BLAKE2b over ``model@version/key``, big-endian, divided by 2 ** 64.
    """
    digest = hashlib.blake2b(f"{model}@{version}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


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
    canary: Canary | None = None
    """Shares the calls that name no version with ``serving``."""

    def in_charge(self, model: str, key: str) -> Servable | None:
        """Returns who answers a call that names no version; counts it."""
        if self.canary is not None and self.canary.takes(model, key):
            return self.canary.servable
        return self.serving


class Router:
    """Finds the servable for a call; the rollout keeps it up to date."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}

    @property
    def answers(self) -> bool:
        """Whether any version of any model takes calls."""
        return any(route.available for route in self._routes.values())

    def route(self, model: str) -> Route:
        """Returns a model's route, made on first use; for the rollout."""
        return self._routes.setdefault(model, Route())

    def remove(self, model: str) -> None:
        """Forgets a model."""
        self._routes.pop(model, None)

    def shares(self) -> dict[str, dict[int, float]]:
        """Returns which share of the calls that name no version each version gets, by model. Any thread may ask."""
        found: dict[str, dict[int, float]] = {}
        for model, route in list(self._routes.items()):
            serving, canary = route.serving, route.canary
            if serving is not None:
                taken = canary.share if canary is not None else 0.0
                found[model] = {serving.version: 1.0 - taken}
                if canary is not None:
                    found[model][canary.servable.version] = taken
        return found

    def resolve(self, model: str, *, version: int | None = None, alias: str | None = None, key: str = "") -> Servable:
        """Returns the servable that answers.

        Args:
            model: the model's name.
            version: a version, if the call names one.
            alias: an alias instead of a version.
            key: calls with equal keys go the same way while a rollout shares out the calls.

        Raises:
            InvalidCallError: if a name is not legal.
            UnknownNameError: if there is no such model, version or alias.
            NotLoadedError: if it exists and is not loaded.
            NotAvailableError: if no version of the model can answer yet.
        """
        route = self._routes.get(model)
        if route is None:
            _check_name("model", model)
            raise UnknownNameError.of_model(model, self._routes)
        if alias is not None:
            _check_name("alias", alias)
            if alias not in route.aliases:
                raise UnknownNameError(f"model {model!r} has no alias {alias!r}")
            version = route.aliases[alias]
        if version is None:
            in_charge = route.in_charge(model, key)
            if in_charge is None:
                raise NotAvailableError(f"model {model!r} has no available version yet", retry_after_s=0.5)
            return in_charge
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
