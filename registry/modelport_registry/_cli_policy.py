"""``modelport pin`` and ``modelport policy``: what a registry asks of every server, whether one runs or not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelport_registry._cli import DEFAULT_ROOT, JsonOption, ModelArgument, RegistryOption, VersionArgument
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
    model: ModelArgument,
    version: VersionArgument = None,
    registry: RegistryOption = DEFAULT_ROOT,
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
    from modelport_registry import Registry
    from modelport_registry._cli import resolve

    if remove and version is not None:
        raise RegistryError("give a version or --remove, not both")
    store = Registry(registry)
    store.resolve(model)  # says so if there is no such model
    if remove:
        state = store.unpin(model, reason=reason)
    else:
        number = None if version is None else resolve(store, model, version)
        state = store.pin(model, number, reason=reason)
    if as_json:
        _print_json({"model": model, "pinned": state.pin, "generation": state.generation})
    else:
        typer.echo(
            f"{model} is not pinned any more" if state.pin is None else f"{model} is pinned to version {state.pin}"
        )


def policy(
    model: ModelArgument,
    registry: RegistryOption = DEFAULT_ROOT,
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

        modelport policy mnist --strategy shadow+canary --step 1%:5m --step 25%:10m

        modelport policy mnist --strategy manual --reason "a release freeze"

        modelport policy mnist --reset
    """
    from modelport_registry import Registry
    from modelport_registry._policy import parse_duration, parse_share, parse_step, parse_strategy

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
    store = Registry(registry)
    store.resolve(model)  # says so if there is no such model
    state = store.state(model)
    if changes or reset:
        rules = _changed(state.policy, changes, reset=reset)
        state = store.set_policy(model, rules, reason=reason, expected_generation=state.generation)
    if step and not any(one.kind == "canary" for one in state.policy.plan()):
        print("note: steps are used with --strategy canary", file=sys.stderr)
    _show(model, state.policy, as_json=as_json)


def _changed(policy: RolloutPolicy, changes: Mapping[str, Any], *, reset: bool) -> RolloutPolicy:
    from dataclasses import replace

    return replace(type(policy)() if reset else policy, **changes)


def _show(model: str, policy: RolloutPolicy, *, as_json: bool) -> None:
    document = policy.to_json(whole=True)
    if as_json:
        _print_json({"model": model, "policy": document})
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


def _print_json(document: Mapping[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")
