"""``python -m bench peers``: modelport beside other servers, with the same model, engine, messages and machine.

The classic network with random weights is served by modelport, PyTriton (Triton's own server) and MLServer, each
with an environment of its own, which the benchmark installs, all of the same Python. ``loadgen``, built from
``bench/loadgen.cc``, sends each the same images: to modelport as ``modelport.v1``, to the others by the open inference
protocol. Each round measures every server in turns; those that are not being measured wait idle. What the engine does
at best in a process of its own is measured with them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import figures, machine, models
from bench.stage import START_S, say, wait_for
from modelport.tensors import encode
from modelport.v1 import prediction_pb2 as pb
from modelport_registry import Registry

_OPEN_LOAD = 0.8
"""The part of the lesser peak rate at which messages come in the open loop."""
MODEL = "classic"
ENGINES = ("openvino-bfloat16", "openvino", "tensorflow")
MODELPORT, PYTRITON, MLSERVER = "modelport", "pytriton", "mlserver"
LARGEST = 128
_HERE = Path(__file__).parent
_ROOT = _HERE.parent
_V2 = "/inference.GRPCInferenceService"
_OURS = "/modelport.v1.PredictionService"
_INSTALLED = {
    PYTRITON: ("nvidia-pytriton==0.7.0",),
    MLSERVER: ("mlserver==1.7.1", "uvloop==0.21.0"),  # its workers do not start with newer ones
}
"""Peers, by what is installed besides the engines."""
_OURS_INSTALLED = ("--constraint", str(_ROOT / "constraints.txt"), "--editable", f"{_ROOT}[server,openvino]")
_WITH_ENGINES = ("tensorflow", "openvino")
"""Installed at the versions that modelport's own environment has."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of load."""

    name: str
    rows: int
    """Of each message."""
    concurrency: int
    """Calls under way at once, or streams."""
    window: int = 0
    """Messages under way in each stream; 0 for calls."""


CASES = (
    Case("1 row, 1 call at a time", 1, 1),
    Case("1 row, 64 at a time", 1, 64),
    Case("32 rows, 16 at a time", 32, 16),
    Case("128 rows, 8 at a time", 128, 8),
    Case("32 rows, 4 streams of 8", 32, 4, 8),
)


@dataclass(frozen=True, slots=True)
class Server:
    """Something that is running and takes calls."""

    name: str
    target: str
    unary: str
    stream: str
    payload: str
    """The beginning of its messages' file names."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything is."""

    folder: Path
    environments: Path
    model: Path
    """The SavedModel."""
    loadgen: Path
    options: argparse.Namespace

    def python(self, name: str) -> Path:
        """Returns the Python of a server's environment."""
        return self.environments / name / "bin" / "python"

    def measure(self, server: Server, case: Case, *, rate: float = 0.0) -> dict[str, Any]:
        """Puts one load on a server; returns what ``loadgen`` says, with the cores that it needed itself.

        Args:
            server: it.
            case: the load.
            rate: messages per second of an open loop; 0 for a closed one.
        """
        kind = "stream" if case.window else "unary"
        if kind == "unary":
            kind_arguments = [server.unary, case.rows, "u", "unary", 0]
        else:
            kind_arguments = [server.stream, case.rows, "s", "stream", case.window]
        method, rows, suffix, mode, window = kind_arguments
        payload = self.folder / f"{server.payload}-{suffix}-{rows}"
        load = [self.options.seconds, case.concurrency, mode, window, 1, rate]
        command = [self.loadgen, server.target, method, payload, *load]
        before = os.times()
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        after = os.times()
        result: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"failed": 1, "error": done.stderr[-500:]}
        if result["failed"]:
            at_rate = f" at {rate:.0f} a second" if rate else ""
            sys.exit(f"error: {server.name}, {case.name}{at_rate}: {result['failed']} failed: {result['error']}")
        spent_s = after.children_user + after.children_system - before.children_user - before.children_system
        return result | {
            "rows_per_s": result["per_s"] * rows,
            "driver_cores": spent_s / (after.elapsed - before.elapsed),
        }


def build_loadgen(folder: Path) -> Path:
    """Compiles the load generator; ends the benchmark if that can't be done."""
    target = folder / "loadgen"
    source = _HERE / "loadgen.cc"
    if target.exists() and target.stat().st_mtime > source.stat().st_mtime:
        return target
    say("building loadgen")
    libraries = subprocess.run(["pkg-config", "--libs", "grpc++"], capture_output=True, text=True, check=False)
    if libraries.returncode:
        sys.exit("error: gRPC for C++ is not installed: on Debian, apt-get install g++ pkg-config libgrpc++-dev")
    command = ["g++", "-O2", "-std=c++17", source, "-o", target, *libraries.stdout.split(), "-lgpr"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: loadgen can't be built: {done.stderr[-1000:]}")
    return target


def environment(folder: Path, name: str, python: str) -> Path:
    """Returns the Python of a server's environment, which is installed if it is not there yet."""
    engines = [f"{one}=={importlib.metadata.version(one)}" for one in _WITH_ENGINES]
    if name != MODELPORT:
        return installed(folder, name, python, [*_INSTALLED[name], *engines])
    read = [_ROOT / "pyproject.toml", _ROOT / "constraints.txt"]
    return installed(folder, name, python, [*_OURS_INSTALLED, *engines], read=read)


def installed(folder: Path, name: str, python: str, wanted: Sequence[str], *, read: Sequence[Path] = ()) -> Path:
    """Returns the Python of an environment, which is made if it is not there yet, or not of what is wanted now.

    Args:
        folder: where environments are.
        name: its own.
        python: what it is made with.
        wanted: arguments of ``pip install``.
        read: files from which pip learns more; the environment is made anew when these have changed.
    """
    found = folder / name / "bin" / "python"
    done = folder / name / "installed"
    text = "\n".join([python, *wanted, *(file.read_text() for file in read)])
    if done.exists() and done.read_text() == text:
        return found
    say(f"installing {name} and what it needs, which may take minutes")
    shutil.rmtree(folder / name, ignore_errors=True)
    for command in ([python, "-m", "venv", folder / name], [found, "-m", "pip", "install", "-q", *wanted]):
        ran = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(f"error: {name} can't be installed: {ran.stderr[-1000:]}")
    done.write_text(text)
    return found


def python_version(python: str) -> str:
    """Returns which Python that is, for people."""
    code = "import platform; print(platform.python_implementation(), platform.python_version())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def free_port() -> int:
    """Returns a port of this machine that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(
    command: Sequence[object], log: Path, *, cwd: Path | None = None, environ: Mapping[str, str] | None = None
) -> Generator[subprocess.Popen[bytes]]:
    """Runs a server, in a group of its own so that all of it ends."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*map(str, command)], stdout=output, stderr=output, cwd=cwd, env=environ, start_new_session=True
        )
    try:
        yield child
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(20)
        with suppress(ProcessLookupError):  # some leave others behind
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def answers_a_call(command: Sequence[str]) -> bool:
    """Whether ``loadgen``, told so to call a server, gets an answer."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and json.loads(done.stdout)["ok"] > 0


def answers(bench: Bench, server: Server, child: subprocess.Popen[bytes], log: Path) -> Server:
    """Returns a server once it answers."""
    command = [bench.loadgen, server.target, server.unary, bench.folder / f"{server.payload}-u-1", 0.2, 1, "unary"]

    def alive() -> None:
        if child.poll() is not None:
            sys.exit(f"error: {server.name} ended: {log.read_text()[-2000:]}")

    wait_for(lambda: answers_a_call([*map(str, command)]), f"{server.name} to answer", alive, START_S)
    return server


@contextmanager
def ours(bench: Bench, engine: str) -> Generator[Server]:
    """Serves with modelport."""
    folder = Path(tempfile.mkdtemp(prefix="modelport-", dir=bench.folder))
    kind, _, precision = engine.partition("-")
    arguments = ["--engine", kind, "--precision", precision or "float32"]
    port, log = folder / "port", folder / "log"
    command = [bench.python(MODELPORT), "-m", "modelport", "serve", "--registry", bench.folder / "registry"]
    with process([*command, "--address", "127.0.0.1:0", "--port-file", port, *arguments], log) as child:
        wait_for(port.exists, "modelport to listen", timeout_s=START_S)
        target = f"127.0.0.1:{port.read_text().strip()}"
        yield answers(
            bench, Server(MODELPORT, target, f"{_OURS}/Predict", f"{_OURS}/PredictStream", "ours"), child, log
        )


@contextmanager
def pytriton(bench: Bench, engine: str) -> Generator[Server]:
    """Serves with PyTriton: Triton's own server, dynamic batching, the model in a Python process."""
    python = bench.python(PYTRITON)
    ports, log = [free_port() for _ in range(3)], bench.folder / "pytriton.log"
    command = [python, _HERE / "peer" / "pytriton_server.py", engine, bench.model, *map(str, ports), str(LARGEST)]
    with process(command, log, environ=_environ()) as child:
        target = f"127.0.0.1:{ports[0]}"
        server = Server(PYTRITON, target, f"{_V2}/ModelInfer", f"{_V2}/ModelStreamInfer", "v2")
        yield answers(bench, server, child, log)


@contextmanager
def mlserver(bench: Bench, engine: str) -> Generator[Server]:
    """Serves with MLServer: adaptive batching, one worker."""
    folder = Path(tempfile.mkdtemp(prefix="mlserver-", dir=bench.folder))
    ports, log = [free_port() for _ in range(3)], folder / "log"
    settings: dict[str, Any] = dict(zip(("grpc_port", "http_port", "metrics_port"), ports, strict=True))
    settings |= {"host": "127.0.0.1", "parallel_workers": 1}
    parameters = {"uri": str(bench.model), "extra": {"engine": engine}}
    model = {
        "name": MODEL, "implementation": "mlserver_runtime.Classic", "parameters": parameters,
        "max_batch_size": LARGEST, "max_batch_time": 0.001,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    program = bench.python(MLSERVER).with_name("mlserver")
    with process([program, "start", folder], log, cwd=folder, environ=_environ()) as child:
        server = Server(MLSERVER, f"127.0.0.1:{ports[0]}", f"{_V2}/ModelInfer", f"{_V2}/ModelStreamInfer", "v2")
        yield answers(bench, server, child, log)


def _environ() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(_HERE / "peer"), str(_ROOT / "server")])}


SERVERS = {MODELPORT: ours, PYTRITON: pytriton, MLSERVER: mlserver}


def write_payloads(bench: Bench) -> None:
    """Writes the messages of all cases."""
    rows = sorted({case.rows for case in CASES})
    for count in rows:
        images = np.random.default_rng(count).integers(0, 256, (count, *models.IMAGE)).astype(np.uint8)
        request = pb.PredictRequest(model=MODEL, inputs=[encode("images", images)])
        (bench.folder / f"ours-u-{count}").write_bytes(request.SerializeToString())
        streamed = pb.PredictStreamRequest(request=request)
        (bench.folder / f"ours-s-{count}").write_bytes(streamed.SerializeToString())
    if PYTRITON not in environments_of(bench.options):
        return
    python = bench.python(PYTRITON)
    command = [python, _HERE / "peer" / "payload.py", bench.folder, *map(str, rows)]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    for count in rows:
        for kind in "us":
            shutil.copy(bench.folder / f"v2-{count}", bench.folder / f"v2-{kind}-{count}")


def environments_of(options: argparse.Namespace) -> list[str]:
    """Returns what has to be installed: ours measures the limit, PyTriton's writes the messages of all peers."""
    peers = [name for name in options.servers if name != MODELPORT]
    return list(dict.fromkeys([MODELPORT, PYTRITON, *peers])) if peers else [MODELPORT]


def limits(bench: Bench, engine: str) -> dict[str, float]:
    """Returns an engine's own rates, in rows per second, by how many batches run at once and the size of a batch."""
    cores = len(os.sched_getaffinity(0))
    rates: dict[str, float] = {}
    for instances, threads in {(1, cores), (cores, 1)}:
        arguments = [engine, bench.model, bench.options.seconds, instances, threads]
        command = [*map(str, [bench.python(MODELPORT), "-m", "bench.in_process", *arguments])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
        if done.returncode:
            sys.exit(f"error: {engine} can't be measured: {done.stderr[-1000:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        rates |= {f"{instances} of {rows} rows": rate for rows, rate in found.items()}
    return rates


def run(bench: Bench) -> list[dict[str, Any]]:
    """Measures everything; returns a row for each measurement."""
    rows: list[dict[str, Any]] = []
    for engine in bench.options.engines:
        with ExitStack() as stack:
            servers: list[Server] = []
            for name in bench.options.servers:
                say(f"{engine}: starting {name}")
                servers.append(stack.enter_context(SERVERS[name](bench, engine)))
            for number in range(bench.options.rounds):
                say(f"{engine}: round {number + 1} of {bench.options.rounds}")
                rows.append({"engine": engine, "round": number, "rates": limits(bench, engine)})
                for case in CASES:
                    # MLServer refuses streams while it batches.
                    able = [server for server in servers if not (case.window and server.name == MLSERVER)]
                    about = {"engine": engine, "round": number, "case": case.name}
                    rates: dict[str, float] = {}
                    for server in able:
                        result = bench.measure(server, case)
                        rates[server.name] = result["per_s"]
                        rows.append(about | {"server": server.name} | result)
                    rows += [about | row for row in _at_a_set_rate(bench, case, able, rates)]
    return rows


def _at_a_set_rate(
    bench: Bench, case: Case, servers: Sequence[Server], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Measures the first two servers while messages come at a rate that both can take."""
    both = servers[:2]
    if case.concurrency == 1 or len(both) < 2:
        return []
    rate = _OPEN_LOAD * min(rates[server.name] for server in both)
    return [{"open": server.name} | bench.measure(server, case, rate=rate) for server in both]


def _of(
    rows: Sequence[dict[str, Any]], engine: str, server: str, case: str, loop: str = "server"
) -> list[dict[str, Any]]:
    return [row for row in rows if (row["engine"], row.get(loop), row.get("case")) == (engine, server, case)]


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints what was found."""
    for engine in options.engines:
        table = Table(title=f"{engine}: rows/s, and the time of one call at a time: medians of {options.rounds} rounds")
        table.add_column("")
        for name in options.servers:
            table.add_column(name)
        for name in options.servers[1:]:
            table.add_column(f"{options.servers[0]} / {name}")
        for case in CASES:
            alone = case.concurrency == 1 and not case.window
            what = "p50_ms" if alone else "rows_per_s"
            found = {name: figures.at(_of(rows, engine, name, case.name), what) for name in options.servers}
            first = found[options.servers[0]]
            cells = [figures.spread(found[name], 3 if alone else 0) for name in options.servers]
            for name in options.servers[1:]:
                ratios = [a / b for a, b in zip(first, found[name], strict=False)]
                cells.append(figures.spread(ratios))
            table.add_row(case.name + (", p50 in ms" if alone else ""), *cells)
        Console(width=160).print(table)
        report_latency(rows, engine, options)
        report_limit(rows, engine, options)


def report_latency(rows: Sequence[dict[str, Any]], engine: str, options: argparse.Namespace) -> None:
    """Prints how long messages took that came at a set rate."""
    both = options.servers[:2]
    part = f"{_OPEN_LOAD:.0%} of the lesser peak rate"
    table = Table(title=f"{engine}: p99 in ms at {part}, an open loop: medians of {options.rounds} rounds")
    for name in ("", "messages/s", *both, " / ".join(both)):
        table.add_column(name)
    for case in CASES:
        found = {name: _of(rows, engine, name, case.name, "open") for name in both}
        if not all(found.values()) or len(found) < 2:
            continue
        times = [figures.at(found[name], "p99_ms") for name in both]
        cells = [figures.spread(one, 2) for one in times]
        ratios = [a / b for a, b in zip(*times, strict=True)]
        table.add_row(case.name, figures.spread(figures.at(found[both[0]], "per_s"), 0), *cells, figures.spread(ratios))
    if table.row_count:
        Console(width=160).print(table)


def report_limit(rows: Sequence[dict[str, Any]], engine: str, options: argparse.Namespace) -> None:
    """Prints how much of the engine's own best rate comes through streams."""
    best = [max(row["rates"].values()) for row in rows if row["engine"] == engine and "rates" in row]
    streamed = _of(rows, engine, options.servers[0], CASES[-1].name)
    parts = [row["rows_per_s"] / limit for row, limit in zip(streamed, best, strict=True)]
    print(
        f"{engine} in a process of its own: {figures.spread(best, 0)} rows/s at best; through streams of "
        f"{options.servers[0]} {figures.spread(parts)} of that, while the driver had "
        f"{figures.spread(figures.at(streamed, 'driver_cores'))} cores"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench peers", description="Compare servers on one model.")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement (default 5)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--python", default="/usr/bin/python3.11", help="of all servers: one with a shared library")
    parser.add_argument(
        "--environments", type=Path, default=Path("build/bench/peers"), help="where servers are installed"
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench/peers.json"), help="where figures go")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    if missing := [name for name in _WITH_ENGINES if importlib.util.find_spec(name) is None]:
        sys.exit(f"error: {' and '.join(missing)} is not installed: run make setup")
    environments = options.environments.resolve()
    environments.mkdir(parents=True, exist_ok=True)
    loadgen = build_loadgen(environments)
    for name in environments_of(options):
        environment(environments, name, options.python)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        made = models.classic(folder / "models")
        bench = Bench(folder, environments, made / "saved_model", loadgen, options)
        write_payloads(bench)
        registry = Registry(folder / "registry")
        registry.publish(MODEL, bench.model, golden=models.golden(made))
        rows = run(bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = machine.describe()
    versions = {name: importlib.metadata.version(name) for name in ("modelport", *_WITH_ENGINES)}
    versions["python of all servers"] = python_version(options.python)
    figures.write(options.json, {"benchmark": "peers", "machine": about, "versions": versions, "rows": rows})
    report(rows, options)
    peers = ", ".join(one for name in options.servers for one in _INSTALLED.get(name, ()))
    print(f"{about['text']}, shared with the driver; {peers}, {versions}")
