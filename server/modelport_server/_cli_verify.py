"""``modelport verify``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from modelport.cli_output import print_json

if TYPE_CHECKING:
    from modelport_registry import Registry
    from modelport_server.gates.result import GateResult

_STYLES = {"passed": "green", "failed": "red", "skipped": "yellow"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("verify", rich_help_panel="Serve")(verify)


def verify(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    version: Annotated[str, typer.Argument(help="A version's number, or an alias.")],
    registry: Annotated[
        Path, typer.Option("--registry", "-r", envvar="MODELPORT_REGISTRY", help="The registry's folder.")
    ] = Path("models"),
    against: Annotated[
        str | None,
        typer.Option(help="Compare with this version, a number or an alias.", show_default="stable, if there is one"),
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="The most rows that run together.")] = 128,
    engine: Annotated[
        str, typer.Option(help="tensorflow, openvino, or auto: the fastest that reproduces the golden examples.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="Compute in float32, bfloat16, float16 or int8.")] = "float32",
    instances: Annotated[
        int, typer.Option(help="How many batches run at once.", show_default="what suits the machine and the model")
    ] = 0,
    threads: Annotated[
        int, typer.Option(help="Threads that one batch may use.", show_default="what suits the machine and the model")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Put a version through all gates, as a server would before it takes traffic.

    The gates are integrity, safety, signature, load, golden, warm-up and speed;
    the model's policy has their limits. Nothing is changed in the registry. Ends
    with 1 if the version is rejected. `modelport check` compares the files alone.

    Examples:

        modelport verify mnist 3

        modelport verify mnist 3 --against 2 --json
    """
    import asyncio

    from modelport_registry import Registry
    from modelport_server.engines.choice import candidates
    from modelport_server.gates.offline import OfflineCheck
    from modelport_server.options import BatchLimits, EngineLimits, EngineRules

    store = Registry(registry.absolute())
    number = store.find(model, version)
    other = _baseline(store, model, number, against)
    limits = EngineLimits()
    rules = EngineRules(engine=engine, precision=precision, instances=instances, threads=threads)
    largest = BatchLimits(max_batch_size=max_batch_size).max_batch_size
    with contextlib.ExitStack() as stack:
        for held in {number, other} - {None}:
            stack.enter_context(store.lease(model, cast("int", held)))
        on_gate = stack.enter_context(_progress(f"{model} version {number}"))
        check = OfflineCheck(
            registry=store,
            model=model,
            version=number,
            against=other,
            largest=largest,
            limits=limits,
            candidates=candidates(rules.engines, rules.precision),
            on_gate=on_gate,
            parallelism=rules.parallelism,
            on_unfit=lambda attempt: _say(f"{model} version {number}: {attempt.text}"),
        )
        results = asyncio.run(check.run())
    passed = results[-1].outcome != "failed"
    if as_json:
        _print_json(model, number, other, passed, results)
    else:
        _print_table(results)
    failed = results[-1]
    if passed:
        skipped = [result.gate for result in results if result.outcome == "skipped"]
        but = f" but {' and '.join(skipped)}, which compare it with another: --against VERSION" if skipped else ""
        _say(f"{model} version {number} passed all gates{but if other is None else ''}")
        return
    _say(f"error: {model} version {number} is rejected at the gate {failed.gate}: {failed.reason}")
    raise typer.Exit(1)


def _baseline(store: Registry, model: str, number: int, against: str | None) -> int | None:
    from modelport_registry.transitions import STABLE

    if against is not None:
        return store.find(model, against)
    stable = store.state(model).aliases.get(STABLE)
    return stable if stable != number else None


@contextlib.contextmanager
def _progress(what: str) -> Generator[Callable[[str], None]]:
    """Shows which gate is being passed: in one line on a terminal, in a line each elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda gate: _say(f"{what}: {gate}")
        return
    with console.status(what) as status:
        yield lambda gate: status.update(f"{what}: {gate}")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _print_json(model: str, version: int, against: int | None, passed: bool, results: Sequence[GateResult]) -> None:
    document: dict[str, Any] = {
        "model": model,
        "version": version,
        "against": against,
        "passed": passed,
        "gates": [result.to_json() for result in results],
    }
    print_json(document)


def _print_table(results: Sequence[GateResult]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from modelport_server.gates.result import GATES

    table = Table("gate", "outcome", "seconds", "figures", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for result in results:
        outcome = Text(result.outcome.value, _STYLES[result.outcome.value])
        table.add_row(result.gate, outcome, f"{result.seconds:.2f}", Text("\n".join(_lines(result))))
    for gate in GATES[len(results) :]:
        table.add_row(gate, Text("not run", "dim"), "", "")
    Console().print(table)


def _lines(result: GateResult) -> Iterator[str]:
    measured = cast("Sequence[Mapping[str, Any]]", result.figures.get("measured", ()))
    for case in measured:
        rows = "1 row" if case["rows"] == 1 else f"{case['rows']} rows"
        yield (
            f"{case['signature']}, {rows}: {case['candidate_us_per_row']:g} us per row, "
            f"stable {case['stable_us_per_row']:g} us ({case['ratio']:.2f} times, "
            f"{case['cpu_ratio']:.2f} times the processor time)"
        )
    shown = {name: value for name, value in result.figures.items() if value not in ([], {}) and name != "measured"}
    if shown:
        yield ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in shown.items())
    if result.outcome == "skipped":
        yield result.reason


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, object]", value).items()
        return "; ".join(f"{name} {_text(item)}" for name, item in pairs)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(map(_text, cast("Sequence[object]", value)))
