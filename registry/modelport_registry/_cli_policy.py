"""``modelport pin`` and ``modelport policy``: what a registry asks of every server, whether one runs or not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelport.cli_output import print_json
from modelport_registry._cli import DEFAULT_ROOT, JsonOption, ModelArgument, RegistryOption, VersionArgument
from modelport_registry._cli_server import ServerOption, change_policy, check_one_place, policy_of, version_of
from modelport_registry._errors import RegistryError

if TYPE_CHECKING:
    from modelport_registry import RolloutPolicy

_PANEL = "Registry"
ReasonOption = Annotated[str, typer.Option(help="Why, for the journal.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    for command in (pin, policy):
        app.command(command.__name__, rich_help_panel=_PANEL)(command)


def pin(
    context: typer.Context,
    model: ModelArgument,
    version: VersionArgument = None,
    registry: RegistryOption = DEFAULT_ROOT,
    server: ServerOption = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the pin off.")] = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Put a version in charge and keep it there, whatever is published.

    Without a version it is the one that is in charge now. A rollout under way ends.
    Once the pin is off, only what is newer than any version tried before is rolled out
    by itself.

    Examples:

        modelport pin mnist

        modelport pin mnist 3 --reason "the new one is slow"

        modelport pin mnist --remove
    """
    check_one_place(context, server)
    if remove and version is not None:
        raise RegistryError("give a version or --remove, not both")
    if server is None:
        pinned, generation = _pin_in_registry(registry, model, version, remove=remove, reason=reason)
    else:
        pinned, generation = _pin_through_server(server, model, version, remove=remove, reason=reason)
    if as_json:
        print_json({"model": model, "pinned": pinned, "generation": generation})
    else:
        typer.echo(f"{model} is not pinned any more" if pinned is None else f"{model} is pinned to version {pinned}")


def _pin_in_registry(
    registry: Path, model: str, version: str | None, *, remove: bool, reason: str
) -> tuple[int | None, int]:
    from modelport_registry import Registry

    store = Registry(registry)
    store.resolve(model)  # says so if there is no such model
    if remove:
        state = store.unpin(model, reason=reason)
    else:
        number = None if version is None else store.find(model, version)
        state = store.pin(model, number, reason=reason)
    return state.pin, state.generation


def _pin_through_server(
    server: str, model: str, version: str | None, *, remove: bool, reason: str
) -> tuple[int | None, int]:
    from modelport import Client

    with Client(server) as client:
        if remove:
            state = client.rollouts.unpin(model, reason=reason)
        else:
            number = None if version is None else version_of(client, model, version)
            state = client.rollouts.pin(model, number, reason=reason)
    return state.pinned, state.generation


def policy(
    context: typer.Context,
    model: ModelArgument,
    registry: RegistryOption = DEFAULT_ROOT,
    server: ServerOption = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="immediate, canary, shadow, shadow+canary; with manual+ only versions that somebody names."),
    ] = None,
    step: Annotated[
        list[str] | None, typer.Option(help="SHARE:TIME of a canary, such as 10%:60s; again for the next step.")
    ] = None,
    shadow_share: Annotated[
        str | None, typer.Option(help="The share of the calls that a shadow gets, such as 50%.")
    ] = None,
    shadow_bake: Annotated[str | None, typer.Option(help="How long a shadow step lasts, such as 5m.")] = None,
    watch: Annotated[
        str | None, typer.Option(help="How long a promoted version is compared with the one before.")
    ] = None,
    keep_warm: Annotated[str | None, typer.Option(help="How long the version before stays loaded after that.")] = None,
    min_calls: Annotated[int | None, typer.Option(help="The candidate's calls that a step needs.")] = None,
    max_error_increase: Annotated[
        float | None, typer.Option(help="By how much its share of failed calls may be larger.")
    ] = None,
    max_latency_ratio: Annotated[float | None, typer.Option(help="How many times as long it may take.")] = None,
    max_speed_ratio: Annotated[
        float | None, typer.Option(help="How many times as long a row may take in the speed gate.")
    ] = None,
    min_agreement: Annotated[float | None, typer.Option(help="The share of rows on which a shadow must agree.")] = None,
    allow_op: Annotated[
        list[str] | None, typer.Option(help="An operation that the safety gate lets pass; again for more.")
    ] = None,
    allow_signature_changes: Annotated[
        bool | None,
        typer.Option(
            "--allow-signature-changes/--refuse-signature-changes", help="Whether versions may break callers."
        ),
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Begin with the defaults, not with what is set.")] = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show how a model's versions come into service; each option changes one of the rules.

    What is given with --step or --allow-op replaces the whole list. A rollout under way
    keeps its plan.

    Examples:

        modelport policy mnist

        modelport policy mnist --strategy shadow+canary --step 1%:5m --step 50%:10m

        modelport policy mnist --strategy manual --reason "a release freeze"

        modelport policy mnist --reset
    """
    from modelport_registry._policy import parse_duration, parse_share, parse_step, parse_strategy

    check_one_place(context, server)

    def given(text: str | None, read: Callable[[str], Any]) -> Any:
        return None if text is None else read(text)

    options: dict[str, Any] = {
        "strategy": given(strategy, parse_strategy),
        "canary_steps": tuple(map(parse_step, step)) if step else None,
        "shadow_share": given(shadow_share, parse_share),
        "shadow_bake_s": given(shadow_bake, parse_duration),
        "watch_s": given(watch, parse_duration),
        "keep_warm_s": given(keep_warm, parse_duration),
        "min_calls": min_calls,
        "max_error_increase": max_error_increase,
        "max_latency_ratio": max_latency_ratio,
        "max_speed_ratio": max_speed_ratio,
        "min_agreement": min_agreement,
        "allow_ops": tuple(allow_op) if allow_op else None,
        "allow_signature_changes": allow_signature_changes,
    }
    changes = {name: value for name, value in options.items() if value is not None}
    change = _Change(changes, reset=reset) if changes or reset else None
    rules = (
        _policy_of_registry(registry, model, change, reason)
        if server is None
        else _policy_of_server(server, model, change, reason)
    )
    if step and not any(one.kind == "canary" for one in rules.plan()):
        print("note: steps are used with --strategy canary", file=sys.stderr)
    _show(model, rules, as_json=as_json)


class _Change:
    """Puts other rules in place of a policy's, or of the defaults."""

    def __init__(self, rules: Mapping[str, Any], *, reset: bool) -> None:
        self._rules = rules
        self._reset = reset

    def __call__(self, policy: RolloutPolicy) -> RolloutPolicy:
        return replace(type(policy)() if self._reset else policy, **self._rules)


def _policy_of_registry(registry: Path, model: str, change: _Change | None, reason: str) -> RolloutPolicy:
    from modelport_registry import Registry

    store = Registry(registry)
    store.resolve(model)  # says so if there is no such model
    state = store.state(model)
    if change is not None:
        rules = change(state.policy)
        state = store.set_policy(model, rules, reason=reason, expected_generation=state.generation)
    return state.policy


def _policy_of_server(server: str, model: str, change: _Change | None, reason: str) -> RolloutPolicy:
    from modelport import Client

    with Client(server) as client:
        if change is None:
            return policy_of(client, model)
        return change_policy(client, model, change, reason)


def _show(model: str, policy: RolloutPolicy, *, as_json: bool) -> None:
    document = policy.to_json(whole=True)
    if as_json:
        print_json({"model": model, "policy": document})
        return
    own = policy.to_json()
    texts = {name: _text(name, getattr(policy, name)) for name in document}
    width = max(map(len, texts))
    for name, text in texts.items():
        typer.echo(f"{name:{width}}  {text}{'' if name in own else '  (default)'}")


def _text(name: str, value: Any) -> str:
    if name == "strategy":
        return "+".join(value)
    if name == "canary_steps":
        return " ".join(f"{one.share * 100:.6g}%:{one.bake_s:g}s" for one in value)
    if name == "allow_ops":
        return " ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g} s" if name.endswith("_s") else f"{value:g}"
