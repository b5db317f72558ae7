"""``modelport rollout``: see and steer how versions come into service, on a server or in the registry."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from modelport.cli_output import print_json
from modelport.names import DEFAULT_ADDRESS
from modelport_registry._errors import RegistryError
from modelport_registry.transitions import STABLE

if TYPE_CHECKING:
    from modelport import ModelInfo, RolloutInfo, Rollouts, RolloutState
    from modelport_registry import Registry, State

_PANEL = "Registry"
_LOOK_S = 0.5
_DRAWS_PER_S = 8

_Model = Annotated[str, typer.Argument(help="The model's name.")]
_Version = Annotated[int, typer.Argument(min=1, help="The version's number.")]
_Server = Annotated[
    str, typer.Option("--server", "-s", envvar="MODELPORT_SERVER", help="Ask this server: HOST:PORT or unix:PATH.")
]
_Folder = Annotated[
    Path | None, typer.Option("--registry", "-r", help="Work on this registry's folder instead of asking a server.")
]
_Reason = Annotated[str, typer.Option(help="Why, for the journal.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def register(app: typer.Typer) -> None:
    """Adds ``rollout`` with its commands to ``app``."""
    group = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
    for command in (start, status, pause, resume, promote, rollback, approve):
        group.command(command.__name__)(command)
    app.add_typer(group, name="rollout", rich_help_panel=_PANEL, help=_HELP)


_HELP = """See and steer how versions come into service.

All commands ask the server at --server. With --registry they work on the
registry's folder, and every server on it follows; status then shows what is
asked for, not what the servers do.

Examples:

    modelport rollout status mnist --watch

    modelport rollout start mnist 4 --strategy shadow+canary

    modelport rollout rollback mnist --reason "complaints" --registry models
"""


def start(
    model: _Model,
    version: _Version,
    strategy: Annotated[
        str | None,
        typer.Option(help="immediate, canary, shadow or shadow+canary; as the model's policy says else."),
    ] = None,
    reason: _Reason = "",
    server: _Server = DEFAULT_ADDRESS,
    registry: _Folder = None,
    as_json: _Json = False,
) -> None:
    """Make a version the candidate, whatever the model's policy says.

    Examples:

        modelport rollout start mnist 4

        modelport rollout start mnist 4 --strategy shadow+canary --reason "new data"
    """

    def here(store: Registry) -> State:
        from modelport_registry import parse_strategy

        plan = None if strategy is None else parse_strategy(strategy)
        return store.start_rollout(model, version, strategy=plan, reason=reason)

    def there(rollouts: Rollouts) -> RolloutState:
        return rollouts.start(model, version, strategy=strategy, reason=reason)

    _change(model, server, registry, here, there, as_json=as_json)


def pause(
    model: _Model,
    reason: _Reason = "",
    server: _Server = DEFAULT_ADDRESS,
    registry: _Folder = None,
    as_json: _Json = False,
) -> None:
    """Keep a rollout at its present step; evidence against it still counts.

    Examples:

        modelport rollout pause mnist
    """
    _change(
        model,
        server,
        registry,
        lambda store: store.pause_rollout(model, reason=reason),
        lambda rollouts: rollouts.pause(model, reason=reason),
        as_json=as_json,
    )


def resume(
    model: _Model,
    reason: _Reason = "",
    server: _Server = DEFAULT_ADDRESS,
    registry: _Folder = None,
    as_json: _Json = False,
) -> None:
    """Let a paused rollout go on.

    Examples:

        modelport rollout resume mnist
    """
    _change(
        model,
        server,
        registry,
        lambda store: store.resume_rollout(model, reason=reason),
        lambda rollouts: rollouts.resume(model, reason=reason),
        as_json=as_json,
    )


def promote(
    model: _Model,
    reason: _Reason = "",
    server: _Server = DEFAULT_ADDRESS,
    registry: _Folder = None,
    as_json: _Json = False,
) -> None:
    """Drop the steps that remain; the gates are never dropped.

    Examples:

        modelport rollout promote mnist --reason "seen enough"
    """
    _change(
        model,
        server,
        registry,
        lambda store: store.promote(model, reason=reason),
        lambda rollouts: rollouts.promote(model, reason=reason),
        as_json=as_json,
    )


def rollback(
    model: _Model,
    reason: _Reason = "",
    server: _Server = DEFAULT_ADDRESS,
    registry: _Folder = None,
    as_json: _Json = False,
) -> None:
    """Reject the candidate, or the version in charge if no rollout is under way.

    The version before it takes over; the rejected one is not tried again unless
    it is approved. With no rollout under way, each rollback goes back one version
    further.

    Examples:

        modelport rollout rollback mnist --reason "complaints from users"
    """
    before: list[RolloutState] = []

    def here(store: Registry) -> State:
        before.append(_state_of(store.state(model)))
        return store.rollback(model, reason=reason)

    def there(rollouts: Rollouts) -> RolloutState:
        before.append(rollouts.state(model))
        return rollouts.rollback(model, reason=reason)

    _change(model, server, registry, here, there, as_json=as_json)
    rejected = before[0].candidate or before[0].stable
    if not as_json:
        typer.echo(f"version {rejected} is not tried again, unless by modelport rollout approve {model} {rejected}")


def approve(
    model: _Model,
    version: _Version,
    reason: _Reason = "",
    server: _Server = DEFAULT_ADDRESS,
    registry: _Folder = None,
    as_json: _Json = False,
) -> None:
    """Forget that a version was rejected, and make it the candidate; it goes through the gates again.

    Examples:

        modelport rollout approve mnist 4 --reason "the check was wrong"
    """
    _change(
        model,
        server,
        registry,
        lambda store: store.approve(model, version, reason=reason),
        lambda rollouts: rollouts.approve(model, version, reason=reason),
        as_json=as_json,
    )


def status(
    model: _Model,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on until the rollout has ended; wait for one if there is none.")
    ] = False,
    server: _Server = DEFAULT_ADDRESS,
    registry: _Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch, a line a status.")] = False,
) -> None:
    """Show a model's rollout: versions, shares, gates, rates and latencies beside each other.

    With --watch the picture is live, or a line for each change where the output
    is no terminal. It ends with the rollout: 0 if the version was promoted, 1 if
    it was rejected or rolled back.

    Examples:

        modelport rollout status mnist

        modelport rollout status mnist --watch

        modelport rollout status mnist --json --registry models
    """
    with _source(model, server, registry) as source:
        if not watch:
            found = next(source.statuses)
            print_json(_document(found)) if as_json else _draw(found)
            return
        outcome = _follow(source, _show_json if as_json else _show)
    if outcome != "promoted":
        raise typer.Exit(1)


def _change(
    model: str,
    server: str,
    registry: Path | None,
    here: Callable[[Registry], State],
    there: Callable[[Rollouts], RolloutState],
    *,
    as_json: bool,
) -> None:
    """Makes a change in the registry's folder if one is given, through the server else; says what is so now."""
    note = ""
    if registry is not None:
        state = _state_of(here(_store(registry, model)))
    else:
        from modelport import Client, RpcError

        with Client(server) as client:
            state = there(client.rollouts)
            with contextlib.suppress(RpcError):  # the change is made, whether this server serves the model or not
                note = "" if as_json else _until_loaded(client.model(model), state.stable)
    if as_json:
        print_json({"model": model, **dataclasses.asdict(state)})
    else:
        typer.echo(_sentence(model, state) + note)


def _until_loaded(info: ModelInfo, stable: int | None) -> str:
    """Returns who answers calls until the version in charge can."""
    wanted = info.version(stable) if stable is not None else None
    answering = info.serving_version
    if wanted is None or wanted.state.value in ("available", "rejected") or answering in (None, stable):
        return ""
    return f"; until version {stable} is loaded, version {answering} goes on answering"


def _sentence(model: str, state: RolloutState) -> str:
    stable = f"version {state.stable} is in charge" if state.stable else "no version is in charge yet"
    paused = ", paused" if state.paused else ""
    if state.candidate is None:
        rollout = "; no rollout is under way"
    elif state.candidate == state.stable:
        rollout = f", and watched{paused}"
    else:
        what = f"step {state.step + 1}" if state.phase == "step" else state.phase
        rollout = f"; version {state.candidate} is the candidate, {what}{paused}"
    pinned = f"; pinned to version {state.pinned}" if state.pinned else ""
    return f"{model}: {stable}{rollout}{pinned}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """Where a model's statuses come from."""

    statuses: Iterator[RolloutInfo]
    is_manual: Callable[[], bool]
    """Says whether versions become candidates by name only."""


@contextlib.contextmanager
def _source(model: str, server: str, registry: Path | None) -> Generator[_Source]:
    if registry is not None:
        store = _store(registry, model)
        yield _Source(_looks(store, model), lambda: store.state(model).policy.manual)
        return
    from modelport import Client

    with Client(server) as client, contextlib.closing(client.rollouts.watch(model)) as statuses:
        yield _Source(statuses, lambda: "manual" in client.rollouts.policy(model).strategy)


def _looks(store: Registry, model: str) -> Iterator[RolloutInfo]:
    while True:
        yield _info(model, store.state(model))
        time.sleep(_LOOK_S)


def _store(root: Path, model: str) -> Registry:
    from modelport_registry import Registry

    store = Registry(root)
    if not store.versions(model):
        raise RegistryError(f"there is no model {model!r} in {root.absolute()}")
    return store


def _follow(source: _Source, show: Callable[[Iterator[RolloutInfo]], None]) -> str:
    """Shows statuses until a rollout that was under way has ended, and no other followed; returns how it did."""
    ends: list[str] = []

    def until_ended() -> Iterator[RolloutInfo]:
        from modelport_registry._cli_rollout_view import outcome

        watched: int | None = None
        for number, found in enumerate(source.statuses):
            if number == 0 and found.rollout is None:
                typer.echo(_waiting(found, manual=source.is_manual()), err=True)
            yield found
            end = None if watched is None else outcome(found, watched)
            if end is not None and found.rollout is None:
                ends.append(end)
                return
            watched = watched if found.rollout is None else found.rollout.version

    show(until_ended())
    return ends[0]


def _waiting(found: RolloutInfo, *, manual: bool) -> str:
    """Returns that a rollout is waited for, and what would begin one."""
    start = f"modelport rollout start {found.model} VERSION"
    if found.pinned is not None:
        begins = f"version {found.pinned} is pinned, so take the pin off first: modelport pin {found.model} --remove"
    elif manual:
        begins = f"the model's policy is manual, so begin it with: {start}"
    else:
        begins = f"it begins when a newer version is published, or with: {start}"
    return f"waiting for a rollout of {found.model}; {begins}"


def _show(statuses: Iterator[RolloutInfo]) -> None:
    if sys.stdout.isatty():
        _show_live(statuses)
        return
    from modelport_registry._cli_rollout_view import lines

    before: RolloutInfo | None = None
    for found in statuses:
        for line in lines(before, found):
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        before = found


def _show_live(statuses: Iterator[RolloutInfo]) -> None:
    from rich.console import Console
    from rich.live import Live

    from modelport_registry._cli_rollout_view import LiveView

    first = next(statuses)
    view = LiveView(first, time.monotonic())
    with Live(view, console=Console(highlight=False), refresh_per_second=_DRAWS_PER_S) as live:
        for found in statuses:
            view.received_s = time.monotonic()
            view.status = found
        live.refresh()


def _show_json(statuses: Iterator[RolloutInfo]) -> None:
    for found in statuses:
        sys.stdout.write(json.dumps(_document(found)) + "\n")
        sys.stdout.flush()


def _draw(found: RolloutInfo) -> None:
    from rich.console import Console

    from modelport_registry._cli_rollout_view import panel

    Console(highlight=False).print(panel(found))


def _document(found: RolloutInfo) -> dict[str, Any]:
    document: dict[str, Any] = _plain(found)
    return document | {"rejected": {str(number): _plain(r) for number, r in found.rejected.items()}}


def _plain(value: object) -> Any:
    """Returns values as JSON has them."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    return value.value if isinstance(value, enum.Enum) else value


def _state_of(state: State) -> RolloutState:
    from modelport import RolloutState

    rollout = state.rollout
    return RolloutState(
        generation=state.generation,
        stable=state.aliases.get(STABLE),
        pinned=state.pin,
        candidate=None if rollout is None else rollout.version,
        phase="" if rollout is None else rollout.phase.value,
        step=0 if rollout is None else rollout.step,
        paused=rollout is not None and rollout.paused,
    )


def _info(model: str, state: State) -> RolloutInfo:
    """Returns what the registry asks for in the form of what a server says; what servers do is not in it."""
    from modelport import EndedRollout, Rejection, RolloutInfo

    last = state.last
    return RolloutInfo(
        model=model,
        generation=state.generation,
        stable=state.aliases.get(STABLE),
        pinned=state.pin,
        rollout=_rollout(state),
        versions=(),
        verdict="",
        figures={},
        last=None if last is None else EndedRollout(version=last.version, outcome=last.outcome, reason=last.reason),
        rejected={n: Rejection(gate=r.gate, reason=r.reason) for n, r in state.rejected.items()},
        considered=state.considered or None,
    )


def _rollout(state: State) -> Any:
    from modelport import Rollout, RolloutStep

    rollout = state.rollout
    if rollout is None:
        return None
    return Rollout(
        id=rollout.id,
        version=rollout.version,
        previous=rollout.previous,
        steps=tuple(RolloutStep(step.kind.value, step.share, step.bake_s) for step in rollout.steps),
        phase=rollout.phase.value,
        step=rollout.step,
        paused=rollout.paused,
        phase_age_s=0.0,
        bake_s=0.0,
    )
