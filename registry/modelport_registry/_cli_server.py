"""What commands of the registry do through a server, where one is named in place of the registry's folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from modelport_registry._errors import RegistryError

if TYPE_CHECKING:
    from modelport import Client
    from modelport import RolloutPolicy as ServerPolicy
    from modelport_registry import RolloutPolicy

ServerOption = Annotated[
    str | None,
    typer.Option("--server", "-s", help="Ask this server, HOST:PORT or unix:PATH, not the registry's folder."),
]

_TRIES = 20
_TRY_EVERY_S = 0.2


def check_one_place(context: typer.Context, server: str | None) -> None:
    """Makes sure that not both a server and a registry's folder were given.

    Raises:
        RegistryError: if they were.
    """
    source = context.get_parameter_source("registry")
    if server is not None and source is not None and source.name == "COMMANDLINE":
        raise RegistryError("give --server or --registry, not both")


def version_of(client: Client, model: str, text: str) -> int:
    """Returns the version that a number or an alias names.

    Raises:
        RegistryError: if the server knows no such alias.
    """
    return int(text) if text.isascii() and text.isdigit() else aliased(client, model, text)


def aliased(client: Client, model: str, alias: str) -> int:
    """Returns the version that an alias points at.

    Raises:
        RegistryError: if the server knows no such alias.
    """
    aliases = client.model(model).aliases
    if alias not in aliases:
        raise RegistryError(f"{model} has no alias {alias!r}; it has: {', '.join(sorted(aliases)) or 'none'}")
    return aliases[alias]


def policy_of(client: Client, model: str) -> RolloutPolicy:
    """Returns a model's policy."""
    return _from_server(client.rollouts.policy(model))


def change_policy(
    client: Client, model: str, change: Callable[[RolloutPolicy], RolloutPolicy], reason: str
) -> RolloutPolicy:
    """Changes a model's policy, and nobody else's change to it; returns what it has become.

    Raises:
        AbortedError: if others change the model's state all the time.
    """
    from modelport import AbortedError

    for left in reversed(range(_TRIES)):
        generation = client.rollouts.state(model).generation
        rules = change(policy_of(client, model))
        try:
            client.rollouts.set_policy(model, _to_server(rules), reason=reason, expected_generation=generation)
        except AbortedError:
            if not left:
                raise
            time.sleep(_TRY_EVERY_S)
        else:
            return rules
    raise AssertionError("the last try returns or raises")


def _from_server(policy: ServerPolicy) -> RolloutPolicy:
    from modelport_registry import RolloutPolicy, Step, StepKind, Strategy

    given = {field.name: getattr(policy, field.name) for field in fields(policy)}
    try:
        strategy = tuple(map(Strategy, policy.strategy))
        steps = tuple(Step(StepKind(step.kind), step.share, step.bake_s) for step in policy.canary_steps)
    except ValueError as error:
        raise RegistryError(f"the server is newer than this command: {error}; upgrade modelport") from None
    given |= {"strategy": strategy, "canary_steps": steps}
    return RolloutPolicy(**{name: value for name, value in given.items() if value not in (None, ())})


def _to_server(policy: RolloutPolicy) -> ServerPolicy:
    from modelport import RolloutPolicy as ServerPolicy
    from modelport import RolloutStep

    given = {field.name: getattr(policy, field.name) for field in fields(policy)}
    given["strategy"] = tuple(strategy.value for strategy in policy.strategy)
    given["canary_steps"] = tuple(RolloutStep(step.kind.value, step.share, step.bake_s) for step in policy.canary_steps)
    return ServerPolicy(**given)
