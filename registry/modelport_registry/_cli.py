"""The registry's commands. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelport.cli_output import counted, print_json
from modelport_registry import _cli_rollout
from modelport_registry._cli_server import ServerOption, aliased, check_one_place, version_of
from modelport_registry._errors import IntegrityError, RegistryError
from modelport_registry._json import JSON
from modelport_registry.transitions import STABLE

if TYPE_CHECKING:
    from modelport_registry import Golden, Manifest, Registry, SignatureSpec, State, TensorSpec

PANEL = "Registry"
_SHOWN_SIGNATURE_TENSORS = 8

RegistryOption = Annotated[
    Path, typer.Option("--registry", "-r", envvar="MODELPORT_REGISTRY", help="The registry's folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ModelArgument = Annotated[str, typer.Argument(help="The model's name.")]
VersionArgument = Annotated[str | None, typer.Argument(help="A version's number, or an alias.")]

DEFAULT_ROOT = Path("models")


def register(app: typer.Typer) -> None:
    """Adds the registry's commands to ``app``."""
    for name, command in (
        ("publish", publish),
        ("models", models),
        ("show", show),
        ("check", check),
        ("alias", alias),
        ("gc", collect_garbage),
    ):
        app.command(name, rich_help_panel=PANEL)(command)
    from modelport_registry import _cli_journal, _cli_policy

    _cli_journal.register(app)
    _cli_policy.register(app)
    _cli_rollout.register(app)


def publish(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(help="The SavedModel's folder.")],
    registry: RegistryOption = DEFAULT_ROOT,
    golden: Annotated[
        Path | None,
        typer.Option(
            help="Examples to check every server with: an .npz whose arrays are called inputs/NAME and "
            "outputs/NAME, or SIGNATURE/inputs/NAME; or the golden.npz of a version."
        ),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(help="Relative tolerance of the golden outputs.", show_default="0.0001, or what the version has"),
    ] = None,
    atol: Annotated[
        float | None,
        typer.Option(help="Absolute tolerance of the golden outputs.", show_default="1e-05, or what the version has"),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER; again for more.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A word of your own; again for more.")] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="An alias to point at the new version; again for more. stable pins it.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="A folder to keep with the version.")] = None,
    param: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, a hyper-parameter; again for more.")] = None,
    code_revision: Annotated[str | None, typer.Option(help="The training code's commit.")] = None,
    data_sha256: Annotated[str | None, typer.Option(help="The digest of the training data.")] = None,
    source: Annotated[str | None, typer.Option(help="What made the model, in words.")] = None,
    version: Annotated[int | None, typer.Option(help="The number to use; the next free one else.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when the version is in charge; 1 if it is rejected.")
    ] = False,
    server: Annotated[
        str | None, typer.Option(help="Wait by what the server at HOST:PORT says, not by the registry alone.")
    ] = None,
    wait_timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait at most.", show_default="as long as it takes")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a SavedModel folder as a new version, whole or not at all.

    Every file is hashed, and nothing is visible until all of it is on disk.
    Golden examples are inputs with the outputs that the model gave for them:
    a server reproduces them before the version takes traffic.

    Examples:

        modelport publish mnist ./export --golden golden.npz

        modelport publish mnist ./export --metric accuracy=0.991 --json

        modelport publish mnist ./export --wait --wait-timeout 600
    """
    from modelport_registry import Lineage, Registry
    from modelport_registry._cli_wait import WaitFor

    waiting = WaitFor.parse(wait, server, wait_timeout)
    lineage = Lineage(data_sha256, _parameters(param or []), code_revision, source)
    metrics = {name: _number(name, text) for name, text in map(_pair, metric or [])}
    waiting.check(registry, model)
    with _progress(f"publishing {model}") as on_progress:
        result = Registry(registry).publish(
            model,
            folder,
            golden=_golden(golden, rtol, atol),
            metrics=metrics,
            lineage=lineage,
            tags=tag or [],
            report=report,
            version=version,
            aliases=alias or [],
            on_progress=on_progress,
        )
    for warning in result.warnings:
        _diagnose(f"warning: {warning}")
    if as_json:
        document = _manifest_document(result.manifest)
        rollout = waiting.outcome(registry, model, result.version)
        print_json({**document, "path": str(result.path), "warnings": result.warnings, **rollout})
        waiting.finish()
        return
    count, size = len(result.manifest.files), _size(result.manifest.size_bytes)
    checked = f"{result.manifest.golden} golden examples" if result.manifest.golden else "no golden examples"
    _print(f"published {model} version {result.version}: {count} files, {size}, {checked}, in {result.path}")
    if waiting.outcome(registry, model, result.version):
        waiting.finish()
        _print(f"{model} version {result.version} is in charge")


def models(registry: RegistryOption = DEFAULT_ROOT, as_json: JsonOption = False) -> None:
    """List the models of a registry.

    Examples:

        modelport models

        modelport models --json
    """
    from modelport_registry import Registry

    hint = "name the registry with --registry, or publish: modelport publish NAME FOLDER"
    if not registry.is_dir():
        raise RegistryError(f"there is no {registry.absolute()}; {hint}")
    store = Registry(registry)
    found: dict[str, tuple[list[int], Mapping[str, int]]] = {}
    for name in store.models():
        with _tolerated():
            found[name] = store.versions(name), store.state(name).aliases
    if as_json:
        rows: list[JSON] = [{"model": n, "versions": v, "aliases": dict(a)} for n, (v, a) in found.items()]
        print_json({"models": rows})
        return
    if not found:
        _diagnose(f"no models in {registry.absolute()}; {hint}")
        return
    from modelport.cli_output import Column, print_table

    columns = [Column("model"), Column("versions", rank=1), Column("highest"), Column("aliases", wraps=True)]
    texts = {name: " ".join(f"{alias}={number}" for alias, number in a.items()) for name, (_, a) in found.items()}
    print_table(columns, [[n, str(len(v)), str(v[-1]), texts[n]] for n, (v, _) in found.items()])


def show(
    model: ModelArgument,
    version: VersionArgument = None,
    registry: RegistryOption = DEFAULT_ROOT,
    as_json: JsonOption = False,
) -> None:
    """Show a model's versions, or all about one of them.

    Examples:

        modelport show mnist

        modelport show mnist 3

        modelport show mnist stable --json
    """
    from modelport_registry import Registry

    store = Registry(registry)
    if version is not None:
        manifest = store.manifest(model, store.find(model, version))
        if as_json:
            print_json(_manifest_document(manifest))
        else:
            _show_version(store, manifest)
        return
    store.resolve(model)
    state = store.state(model)
    manifests: list[Manifest] = []
    for number in store.versions(model):
        with _tolerated():
            manifests.append(store.manifest(model, number))
    if as_json:
        print_json(
            {
                "model": model,
                "generation": state.generation,
                "aliases": dict(state.aliases),
                "versions": [_manifest_document(manifest) for manifest in manifests],
            }
        )
        return
    _print_versions(manifests, state)


def _print_versions(manifests: Sequence[Manifest], state: State) -> None:
    from modelport.cli_output import Column, print_table

    columns = [
        Column("version"),
        Column("created", rank=1),
        Column("size", rank=3),
        Column("golden", rank=4),
        Column("aliases", wraps=True),
        Column("rejected"),
        Column("metrics", rank=2, wraps=True),
        Column("tags", wraps=True),
    ]
    rows = [
        [
            str(manifest.version),
            f"{manifest.created:%Y-%m-%d %H:%M:%S}",
            _size(manifest.size_bytes),
            str(manifest.golden),
            " ".join(name for name, number in state.aliases.items() if number == manifest.version),
            state.rejected[manifest.version].gate if manifest.version in state.rejected else "",
            _metrics_text(manifest),
            " ".join(manifest.tags),
        ]
        for manifest in manifests
    ]
    print_table(columns, rows)


def check(
    model: ModelArgument,
    version: VersionArgument = None,
    registry: RegistryOption = DEFAULT_ROOT,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a version, or of all versions, against what was published.

    Ends with 1 if anything was changed, added, removed or linked. `modelport verify`
    also loads a version and tries it out.

    Examples:

        modelport check mnist

        modelport check mnist 3 --json
    """
    from modelport_registry import Registry

    store = Registry(registry)
    wanted = store.find(model, version) if version is not None else None
    store.resolve(model, version=wanted)
    rows: list[dict[str, JSON]] = []
    for number in store.versions(model) if wanted is None else [wanted]:
        try:
            manifest = store.verify(model, number)
        except RegistryError as exc:
            rows.append({"version": number, "ok": False, "error": str(exc)})
        else:
            rows.append({"version": number, "ok": True, "files": len(manifest.files), "bytes": manifest.size_bytes})
    if as_json:
        print_json({"model": model, "ok": all(row["ok"] for row in rows), "versions": rows})
    for row in rows:
        if not row["ok"]:
            _diagnose(f"error: {row['error']}")
        elif not as_json:
            _print(f"{model} version {row['version']} is as it was published: {row['files']} files")
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def alias(
    context: typer.Context,
    model: ModelArgument,
    alias: Annotated[str, typer.Argument(help="The alias, for example stable.")],
    version: Annotated[
        str | None, typer.Argument(help="The version to point it at: a number, or another alias.")
    ] = None,
    registry: RegistryOption = DEFAULT_ROOT,
    server: ServerOption = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the alias.")] = False,
    expected_generation: Annotated[
        int | None, typer.Option(help="Change nothing unless the state has this generation.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version; show it when no version is given.

    Callers that name nothing get the version that the alias stable points at. To set
    stable by hand pins that version, as modelport pin does: nothing is rolled out by
    itself until the pin is off. With --server only stable can be set, and none removed.

    Examples:

        modelport alias mnist stable 3

        modelport alias mnist stable

        modelport alias mnist canary --delete

        modelport alias mnist stable 3 --server 10.0.0.7:8500
    """
    check_one_place(context, server)
    if delete and version is not None:
        raise RegistryError("give a version or --delete, not both")
    if server is not None:
        if delete or (version is not None and alias != STABLE):
            raise RegistryError("a server sets the alias stable and no other: use the registry's folder, --registry")
        number, pin, generation = _served_alias(server, model, alias, version, expected_generation)
    else:
        number, pin, generation = _stored_alias(registry, model, alias, version, expected_generation, delete=delete)
    if as_json:
        print_json({"model": model, "alias": alias, "version": number, "generation": generation})
    elif number is None:
        _print(f"{model} has no alias {alias} any more")
    else:
        pinned = alias == STABLE and pin is not None
        _print(f"{model} {alias} is version {number}{', pinned' if pinned else ''}")
        if pinned and version is not None:
            _diagnose(f"later versions wait until the pin is off: modelport pin {model} --remove")


def _stored_alias(
    registry: Path, model: str, alias: str, version: str | None, expected_generation: int | None, *, delete: bool
) -> tuple[int | None, int | None, int]:
    """Changes an alias in the registry, or looks it up; returns its version, the pin and the generation."""
    from modelport_registry import Registry

    store = Registry(registry)
    if delete:
        state, number = store.remove_alias(model, alias, expected_generation=expected_generation), None
    elif version is None:
        number, state = store.resolve(model, alias=alias), store.state(model)
    else:
        number = store.find(model, version)
        state = store.set_alias(model, alias, number, expected_generation=expected_generation)
    return number, state.pin, state.generation


def _served_alias(
    server: str, model: str, alias: str, version: str | None, expected_generation: int | None
) -> tuple[int | None, int | None, int]:
    """Pins the version that ``stable`` is to point at, or looks an alias up; returns the same as ``_stored_alias``."""
    from modelport import Client

    with Client(server) as client:
        if version is None:
            number = aliased(client, model, alias)
            found = client.rollouts.get(model)
            return number, found.pinned, found.generation
        number = version_of(client, model, version)
        state = client.rollouts.pin(model, number, expected_generation=expected_generation)
        return number, state.pinned, state.generation


def collect_garbage(
    model: Annotated[str | None, typer.Argument(help="The model's name; all models else.")] = None,
    registry: RegistryOption = DEFAULT_ROOT,
    keep: Annotated[int, typer.Option(help="How many of the highest versions stay in any case.")] = 3,
    staging_age: Annotated[
        float, typer.Option(help="Spare leftovers of publishes that are younger than this, in seconds.")
    ] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove old versions, and what publishes that died left behind.

    Versions that an alias points at, that a rollback would lead to, or that a server
    holds, always stay.

    Examples:

        modelport gc --keep 5 --dry-run

        modelport gc mnist --keep 2
    """
    from modelport_registry import Registry

    report = Registry(registry).collect_garbage(model, keep=keep, dry_run=dry_run, staging_age_s=staging_age)
    if as_json:
        print_json(
            {
                "removed": dict(report.removed),
                "leased": dict(report.leased),
                "leftovers": report.leftovers,
                "freed_bytes": report.freed_bytes,
                "dry_run": report.dry_run,
            }
        )
        return
    done = "would remove" if dry_run else "removed"
    for name, versions in report.removed.items():
        _print(f"{done} {name} {_numbers(versions)}")
    for name, versions in report.leased.items():
        _print(f"kept {name} {_numbers(versions)}: a server holds it")
    count = sum(map(len, report.removed.values()))
    _print(
        f"{done} {counted(count, 'version')} and {counted(report.leftovers, 'leftover')}, {_size(report.freed_bytes)}"
    )


def _show_version(store: Registry, manifest: Manifest) -> None:
    state = store.state(manifest.model)
    aliases = [n for n, v in state.aliases.items() if v == manifest.version]
    rejected = state.rejected.get(manifest.version)
    lineage = manifest.lineage
    facts = {
        "model": manifest.model,
        "version": str(manifest.version),
        "aliases": " ".join(aliases),
        "rejected": f"{rejected.gate}: {rejected.reason}" if rejected is not None else "",
        "created": f"{manifest.created:%Y-%m-%d %H:%M:%S} UTC by {manifest.publisher}",
        "framework": " ".join(f"{name} {number}" for name, number in manifest.framework.items()),
        "metrics": _metrics_text(manifest),
        "tags": " ".join(manifest.tags),
        "golden": f"{manifest.golden} examples",
        "data": lineage.data_sha256 or "",
        "code": lineage.code_revision or "",
        "source": lineage.source or "",
        "parameters": " ".join(f"{name}={json.dumps(value)}" for name, value in lineage.parameters.items()),
    }
    from modelport.cli_output import Column, print_table

    rows = [(name, value) for name, value in facts.items() if value]
    rows += [("signature", _signature_text(signature)) for signature in manifest.signatures.values()]
    rows += [("file", f"{e.path}  {_size(e.size)}  sha256 {e.sha256[:12]}") for e in manifest.files]
    print_table([Column(""), Column("", wraps=True)], rows)


def _signature_text(signature: SignatureSpec) -> str:
    def side(specs: Sequence[TensorSpec]) -> str:
        texts = [f"{t.name} {t.dtype}{_shape_text(t.shape)}" for t in specs[:_SHOWN_SIGNATURE_TENSORS]]
        more = len(specs) - len(texts)
        return ", ".join(texts) + (f" and {more} more" if more > 0 else "")

    return f"{signature.name}({side(signature.inputs)}) -> {side(signature.outputs)}"


def _shape_text(shape: tuple[int | None, ...] | None) -> str:
    if shape is None:
        return " of any rank"
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def _manifest_document(manifest: Manifest) -> dict[str, JSON]:
    document: dict[str, JSON] = json.loads(manifest.to_json())
    return document


def _golden(path: Path | None, rtol: float | None, atol: float | None) -> list[Golden]:
    if path is None:
        return []
    from modelport_registry._golden import read_npz

    return read_npz(path, rtol=rtol, atol=atol)


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise RegistryError(f"{text!r} is not NAME=VALUE")
    return name, value


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as exc:
        raise RegistryError(f"the metric {name!r} is {text!r}: give a number") from exc


def _parameters(texts: list[str]) -> dict[str, JSON]:
    return {name: _value(text) for name, text in map(_pair, texts)}


def _value(text: str) -> JSON:
    """Returns what the JSON ``text`` means, or the text itself: ``epochs=10`` is a number."""
    from modelport_registry._json import parse

    try:
        return parse(f'{{"value": {text}}}', "the value").any("value")
    except IntegrityError:
        return text


@contextlib.contextmanager
def _tolerated() -> Generator[None]:
    """Says what is wrong with one item, and lets the others be listed."""
    try:
        yield
    except RegistryError as exc:
        _diagnose(f"warning: {exc}")


@contextlib.contextmanager
def _progress(what: str) -> Generator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _diagnose(text: str) -> None:
    typer.echo(text, err=True)


def _metrics_text(manifest: Manifest) -> str:
    return " ".join(f"{name}={value:.6g}" for name, value in manifest.metrics.items())


def _numbers(versions: tuple[int, ...]) -> str:
    return ("version " if len(versions) == 1 else "versions ") + ", ".join(map(str, versions))


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
