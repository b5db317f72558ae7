"""``modelport bench``: how fast a server answers, for callers such as it will have."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelport.cli_output import counted
from modelport.exceptions import InputError, ModelportError
from modelport.names import DEFAULT_ADDRESS, DEFAULT_SIGNATURE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelport import SignatureInfo
    from modelport._load import Load

    Arrays = Mapping[str, NDArray[Any]]

CALLERS = (1, 4, 16, 64)
"""The closed loops that are run where nothing else is asked for."""
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}
_RANDOM_ROWS = 256
_PICTURES = (".png", ".svg", ".pdf")


def bench(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of rows to send, as predict takes them. Default: random numbers.", show_default=False
        ),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option("--server", "-s", envvar="MODELPORT_SERVER", help="HOST:PORT or unix:PATH; again for more."),
    ] = None,
    mode: Annotated[Literal["unary", "stream"], typer.Option(help="Single calls, or messages of streams.")] = "unary",
    rows: Annotated[list[int] | None, typer.Option(help="Rows a call; again for more.", show_default="1")] = None,
    callers: Annotated[
        list[int] | None,
        typer.Option(
            help="Closed loop: so many callers or streams, each calling again once it is answered; again for more.",
            show_default="1, 4, 16, 64",
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Open loop: calls per second, answered or not; again for more.", show_default=False),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the load.")] = 1,
    window: Annotated[int, typer.Option(min=1, help="Messages of a stream that are on their way at once.")] = 8,
    seconds: Annotated[float, typer.Option(help="How long each load is measured.")] = 5.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before that which are not counted.")] = 1.0,
    signature: Annotated[str, typer.Option(help="The signature to run. Default: serving_default.")] = "",
    outputs: Annotated[str, typer.Option(help="The outputs wanted, with commas. Default: all.")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything that was measured to this file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw latency against throughput, as .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Measure how fast a server answers, with the SDK in processes of its own.

    Closed loops have a number of callers who wait for their answers; open loops
    call at a set rate, and a call's latency counts from when it was due. Ends
    with 1 if any call failed.

    Examples:

        modelport bench digits --rows 1 --rows 32 --picture digits.png

        modelport bench digits images.npy --mode stream --rows 32 --callers 4

        modelport bench digits --rate 100 --rate 500 --seconds 30 --json digits.json
    """
    from modelport import Client

    _check_picture(picture)
    _check_folders(json_file, picture)
    address = server or [DEFAULT_ADDRESS]
    wanted = tuple(name.strip() for name in outputs.split(",") if name.strip())
    with Client(address) as client:
        info = client.model(model)
        version = info.version(info.serving_version or 0)
        if version is None:
            raise ModelportError(f"the server has no version of {model} that answers calls: modelport status {model}")
        spec = version.signatures.get(signature or DEFAULT_SIGNATURE)
        if spec is None:
            names = ", ".join(version.signatures)
            raise InputError(f"{model} has no signature {signature or DEFAULT_SIGNATURE!r}; it has {names}")
    arrays = _read(inputs, spec) if inputs else random_inputs(spec)
    plans = list(_plans(model, mode, rows or [1], callers, rate or [], window, seconds, warm_up, signature, wanted))
    stages: list[Stage] = []
    for number, plan in enumerate(plans, 1):
        typer.echo(f"{number} of {len(plans)}: {_text(plan)}", err=True)
        stages.append(run_stage(address, plan, arrays, processes))
    document = _document(model, version.version, version.engine, address, processes, stages)
    _print(stages)
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        typer.echo(f"wrote {json_file}", err=True)
    if picture is not None:
        _draw(picture, f"{model} version {version.version}, {version.engine}", stages)
        typer.echo(f"wrote {picture}", err=True)
    if problems := list(_problems(stages)):
        typer.echo(f"error: {'; '.join(problems)}", err=True)
        raise typer.Exit(1)


def _problems(stages: Sequence[Stage]) -> Iterator[str]:
    """Yields what went wrong with calls, and what can be done."""
    if failed := sum(sum(stage.errors.values()) for stage in stages):
        reasons = list(dict.fromkeys(reason for stage in stages for reason in stage.errors))
        yield f"{counted(failed, 'call')} failed: {'; '.join(reasons[:3])}"
    if not_sent := sum(stage.not_sent for stage in stages):
        yield f"{counted(not_sent, 'call')} could not be sent in time: use a lower --rate, or more --processes"


@dataclass(frozen=True, slots=True)
class Stage:
    """A load, and what was measured under it over all processes."""

    load: Load
    calls: int
    seconds: float
    latency_ms: Mapping[str, float | None]
    """By percentile; None where nothing was answered."""
    errors: Mapping[str, int]
    not_sent: int
    driver_cores: float
    """How many cores the callers kept busy: where that is all there are, the server may be able to do more."""

    @property
    def calls_per_s(self) -> float:
        """Calls, or messages, that were answered per second."""
        return self.calls / self.seconds

    @property
    def rows_per_s(self) -> float:
        """Rows that were answered per second."""
        return self.calls_per_s * self.load.rows

    def to_json(self) -> dict[str, Any]:
        """Returns it as what JSON has."""
        return {
            **asdict(self.load),
            "calls": self.calls,
            "calls_per_s": round(self.calls_per_s, 3),
            "rows_per_s": round(self.rows_per_s, 3),
            "latency_ms": dict(self.latency_ms),
            "errors": dict(self.errors),
            "not_sent": self.not_sent,
            "driver_cores": round(self.driver_cores, 3),
        }


def _plans(
    model: str,
    mode: Literal["unary", "stream"],
    rows: Sequence[int],
    callers: Sequence[int] | None,
    rates: Sequence[float],
    window: int,
    seconds: float,
    warm_up: float,
    signature: str,
    outputs: tuple[str, ...],
) -> Iterator[Load]:
    from modelport._load import Load

    if callers is None:
        callers = () if rates else CALLERS
    for size in rows:
        common: dict[str, Any] = {
            "model": model, "mode": mode, "rows": size, "window": window, "signature": signature,
            "outputs": outputs, "seconds": seconds, "warm_up_s": warm_up,
        }  # fmt: skip
        for count in callers:
            yield Load(callers=count, **common)
        for rate in rates:
            if rate <= 0:
                raise InputError(f"--rate must be above 0, not {rate:g}")
            yield Load(rate=rate, **common)


def _text(load: Load) -> str:
    what = f"{counted(load.rows, 'row')} a {'call' if load.mode == 'unary' else 'message'}"
    if load.rate:
        return f"{what}, {load.rate:g} a second"
    who = "caller" if load.mode == "unary" else "stream"
    return f"{what}, {counted(load.callers, who)}"


def random_inputs(spec: SignatureInfo) -> dict[str, NDArray[Any]]:
    """Returns rows of random numbers for a signature.

    Raises:
        InputError: if what it takes can't be made up.
    """
    import numpy as np

    random = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        shape = tensor.shape
        if not spec.batched or shape is None or None in shape[1:] or tensor.dtype in ("string", "bfloat16"):
            raise InputError(f"nothing is known that input {tensor.name} takes: give a file of rows")
        size = (_RANDOM_ROWS, *(int(side or 0) for side in shape[1:]))
        dtype = np.dtype(tensor.dtype)
        if dtype.kind in "iu":
            arrays[tensor.name] = random.integers(0, min(256, np.iinfo(dtype).max), size).astype(dtype)
        else:
            arrays[tensor.name] = random.random(size).astype(dtype)
    return arrays


def _read(paths: Sequence[Path], spec: SignatureInfo) -> dict[str, NDArray[Any]]:
    from modelport import _cli_inputs

    options = _cli_inputs.SourceOptions(inputs=spec.inputs)
    if not spec.batched:
        raise InputError(f"signature {spec.name} does not take rows: only what takes rows can be measured")
    source = _cli_inputs.open_sources(paths, options)
    return next(source.chunks(source.rows))


def run_stage(server: Sequence[str], load: Load, inputs: Arrays, processes: int) -> Stage:
    """Puts a load on the server, shared out among processes.

    Raises:
        ModelportError: if a process can't call the server.
    """
    import numpy as np

    from modelport._load import INPUT

    shares = list(_shares(load, processes))
    with tempfile.TemporaryDirectory(prefix="modelport-bench-") as name:
        folder = Path(name)
        named: dict[str, Any] = {INPUT + name: np.asarray(array) for name, array in inputs.items()}
        np.savez(folder / "inputs.npz", **named)
        document = {"server": list(server), "loads": [asdict(share) for share in shares]}
        (folder / "load.json").write_text(json.dumps(document))
        answers = _run_processes(folder, len(shares))
        latencies = np.concatenate([np.load(folder / f"{number}.npy") for number in range(len(shares))])
    errors: dict[str, int] = {}
    for answer in answers:
        for reason, count in answer["errors"].items():
            errors[reason] = errors.get(reason, 0) + count
    percentiles: dict[str, float | None] = dict.fromkeys(PERCENTILES)
    if len(latencies):
        found = np.percentile(latencies * 1e3, list(PERCENTILES.values()))
        percentiles = {name: round(float(value), 4) for name, value in zip(PERCENTILES, found, strict=True)}
    return Stage(
        load=load,
        calls=sum(answer["answered"] for answer in answers),
        seconds=load.seconds,
        latency_ms=percentiles,
        errors=errors,
        not_sent=sum(answer["not_sent"] for answer in answers),
        driver_cores=sum(answer["cpu_s"] for answer in answers) / load.seconds,
    )


def _shares(load: Load, processes: int) -> Iterator[Load]:
    """Yields what each process does."""
    from dataclasses import replace

    if load.rate:
        for number in range(processes):
            yield replace(load, rate=load.rate / processes, offset_s=number / load.rate)
        return
    for number in range(min(processes, load.callers)):
        yield replace(load, callers=len(range(number, load.callers, processes)))


def _run_processes(folder: Path, count: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "modelport._load_process", str(folder)]
    running = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(count)
    ]
    try:
        for process in running:
            _line(process)
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(_line(process)) for process in running]
    finally:
        for process in running:
            process.terminate()
            process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ModelportError(f"a process that calls the server ended with status {process.wait()}")
    if line.startswith('{"failed"'):
        raise ModelportError(json.loads(line)["failed"])
    return line


def _document(
    model: str, version: int, engine: str, server: Sequence[str], processes: int, stages: Sequence[Stage]
) -> dict[str, Any]:
    import os
    import platform
    from datetime import UTC, datetime
    from importlib import metadata

    return {
        "modelport": metadata.version("modelport"),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "server": list(server),
        "model": model,
        "version": version,
        "engine": engine,
        "processes": processes,
        "stages": [stage.to_json() for stage in stages],
    }


def _print(stages: Sequence[Stage]) -> None:
    from modelport.cli_output import Column, print_table

    columns = [Column("load"), Column("calls/s"), Column("rows/s")]
    columns += [Column(f"{name} ms") for name in PERCENTILES]
    columns += [Column("failed"), Column("driver's cores", rank=1)]
    print_table(columns, [_row(stage) for stage in stages])


def _row(stage: Stage) -> list[str]:
    failed = sum(stage.errors.values()) + stage.not_sent
    return [
        _text(stage.load),
        f"{stage.calls_per_s:,.0f}",
        f"{stage.rows_per_s:,.0f}",
        *("-" if ms is None else f"{ms:.2f}" for ms in stage.latency_ms.values()),
        f"{failed:,}" if failed else "0",
        f"{stage.driver_cores:.2f}",
    ]


def _check_picture(path: Path | None) -> None:
    """Raises before anything is measured if the picture can't be drawn in the end."""
    if path is None:
        return
    if path.suffix not in _PICTURES:
        raise InputError(f"{path}: a picture is one of {', '.join(_PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ModelportError("--picture needs: pip install 'modelport[bench]'")


def _check_folders(*paths: Path | None) -> None:
    """Raises before anything is measured if files can't be written in the end."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: there is no such folder to write it in")


def _draw(path: Path, title: str, stages: Sequence[Stage]) -> None:
    """Draws the median and p99 against the rate, a line for each number of rows and kind of loop."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    kinds: dict[tuple[int, str], list[Stage]] = {}
    for stage in stages:
        if stage.calls:
            kinds.setdefault((stage.load.rows, "open" if stage.load.rate else "closed"), []).append(stage)
    for number, ((rows, loop), points) in enumerate(kinds.items()):
        for percentile, line in (("p50", "-"), ("p99", "--")):
            axes.plot(
                [stage.rows_per_s for stage in points],
                [stage.latency_ms[percentile] or 0.0 for stage in points],
                line,
                marker="o",
                color=f"C{number}",
                label=f"{counted(rows, 'row')}, {loop} loop, {percentile}",
            )
    axes.set(title=title, xlabel="rows per second", ylabel="latency in ms")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    if kinds:
        axes.legend()
    figure.savefig(path, dpi=150)
