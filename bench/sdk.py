"""``python -m bench sdk``: our SDK beside ``tritonclient``, each in one Python process, each with its own server.

The network is served by modelport and by PyTriton, with the same engine, as ``peers`` does it. One process calls
modelport through ``modelport``, another PyTriton through ``tritonclient``, in turns; the server that is not being
called waits idle. Each SDK is called as its documentation has it, from arrays to arrays, and brings its own gRPC: both
have the same version of it. A network of a single layer shows the SDKs where hardly anything is computed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import figures, machine, models, peers
from bench.stage import say
from modelport_registry import Registry

OURS, TRITONCLIENT = "modelport", "tritonclient"
SERVERS = {OURS: peers.MODELPORT, TRITONCLIENT: peers.PYTRITON}
"""The server of each SDK."""
MODELS = {models.CLASSIC: models.classic, models.LIGHT: models.light}
_INSTALLED = "tritonclient[grpc]==2.73.0"
_SAME = ("grpcio", "numpy")
"""Installed for tritonclient at the versions that modelport's own environment has."""
_CALLER = Path(__file__).parent / "peer" / "sdk_caller.py"


@dataclass(frozen=True, slots=True)
class Case:
    """One way to call."""

    text: str
    programs: tuple[str, ...]
    """Of ``sdk_caller``; the better one counts, for either SDK."""
    unit: str = "rows_per_s"
    least: float | None = None
    """How many times as fast as tritonclient our SDK is to be; None where that is for information."""


CASES = (
    Case("a stream of 32-row batches", ("stream", "async_stream"), least=3.0),
    Case("1 row, 64 tasks of asyncio", ("tasks",), least=4.0),
    Case("1 row, 64 threads", ("threads",)),
    Case("1 row, one call at a time, p50 in ms", ("one_at_a_time",), unit="p50_ms"),
)


def measure(python: Path, sdk: str, target: str, program: str, options: argparse.Namespace) -> dict[str, Any]:
    """Calls a server in one way; returns what the caller says."""
    command = [python, _CALLER, sdk, target, program, options.seconds, options.window]
    environ = os.environ | {"GRPC_VERBOSITY": "NONE"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        sys.exit(f"error: {sdk} failed: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(bench: peers.Bench, model: str, pythons: dict[str, Path]) -> list[dict[str, Any]]:
    """Measures everything with one model; returns a row for each measurement."""
    rows: list[dict[str, Any]] = []
    options = bench.options
    for engine in options.engines:
        with ExitStack() as stack:
            targets: dict[str, str] = {}
            for sdk in options.sdks:
                say(f"{model}, {engine}: starting {SERVERS[sdk]}")
                targets[sdk] = stack.enter_context(peers.SERVERS[SERVERS[sdk]](bench, engine)).target
            for number in range(options.rounds):
                say(f"{model}, {engine}: round {number + 1} of {options.rounds}")
                for case in CASES:
                    for program in case.programs:
                        for sdk, target in targets.items():
                            head = {"model": model, "engine": engine, "round": number, "case": case.text}
                            found = measure(pythons[sdk], sdk, target, program, options)
                            rows.append(head | {"sdk": sdk, "program": program} | found)
    return rows


def best(rows: Sequence[dict[str, Any]], case: Case, sdk: str) -> tuple[str, list[float]]:
    """Returns the better program of an SDK in one case, by its median, and what it reached in each round."""
    some = [row for row in rows if (row["case"], row["sdk"]) == (case.text, sdk)]
    found = {name: [row[case.unit] for row in some if row["program"] == name] for name in case.programs}
    pick = min if case.unit == "p50_ms" else max
    program = pick(found, key=lambda name: statistics.median(found[name]))
    return program, found[program]


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints what was found."""
    for model in options.models:
        for engine in options.engines:
            some = [row for row in rows if (row["model"], row["engine"]) == (model, engine)]
            title = f"{model}, {engine}: rows/s, or times: medians of {options.rounds} rounds"
            table = Table("", *options.sdks, "ratio", "goal", title=title)
            for case in CASES:
                found = [best(some, case, sdk)[1] for sdk in options.sdks]
                cells = [figures.spread(one, 3 if case.unit == "p50_ms" else 0) for one in found]
                ratios = [a / b for a, b in zip(found[0], found[-1], strict=True)] if len(found) > 1 else []
                table.add_row(case.text, *cells, figures.spread(ratios), f"{case.least:g}" if case.least else "")
            Console(width=140).print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench sdk", description="Compare SDKs, one process each.")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement (default 5)")
    engines = ["openvino-bfloat16", "tensorflow"]
    parser.add_argument("--engines", nargs="+", choices=peers.ENGINES, default=engines)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--window", type=int, default=8, help="batches of a stream under way (default 8)")
    parser.add_argument("--python", default="/usr/bin/python3.11", help="of all: one with a shared library")
    parser.add_argument(
        "--environments", type=Path, default=Path("build/bench/peers"), help="where servers are installed"
    )
    parser.add_argument("--sdks", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument(
        "--clients", type=Path, default=Path("build/bench/clients"), help="where tritonclient is installed"
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench/sdk.json"), help="where figures go")
    options = parser.parse_args(arguments)
    options.servers = [SERVERS[sdk] for sdk in options.sdks]
    return options


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    environments, clients = options.environments.resolve(), options.clients.resolve()
    for one in (environments, clients):
        one.mkdir(parents=True, exist_ok=True)
    packages = ("modelport", "tensorflow", "openvino", "protobuf", *_SAME)
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions["python of all"] = peers.python_version(options.python)
    loadgen = peers.build_loadgen(environments)
    servers = {name: peers.environment(environments, name, options.python) for name in peers.environments_of(options)}
    pythons = {OURS: servers[peers.MODELPORT]}
    if TRITONCLIENT in options.sdks:
        wanted = [_INSTALLED, *(f"{name}=={versions[name]}" for name in _SAME)]
        pythons[TRITONCLIENT] = peers.installed(clients, TRITONCLIENT, options.python, wanted)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    rows: list[dict[str, Any]] = []
    try:
        for model in options.models:
            made = MODELS[model](folder / "models")
            (folder / model).mkdir()
            bench = peers.Bench(folder / model, environments, made / "saved_model", loadgen, options)
            peers.write_payloads(bench)
            Registry(folder / model / "registry").publish(peers.MODEL, bench.model, golden=models.golden(made))
            rows += run(bench, model, pythons)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = machine.describe()
    figures.write(options.json, {"benchmark": "sdk", "machine": about, "versions": versions, "rows": rows})
    report(rows, options)
    print(f"{about['text']}, shared by SDK and server; {_INSTALLED}, {versions}")
