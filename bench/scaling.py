"""``python -m bench scaling``: how cost grows with rows in flight, with models loaded and with the length of a stream.

The classic network is called by ``loadgen`` with ever more rows in flight; a small model is called alone, and again
among a hundred of its like; and one stream sends a million rows while the memory of the server is looked at.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench import figures, machine, models
from bench.peers import answers_a_call, build_loadgen, free_port, process
from bench.stage import START_S, modelport, say, wait_for
from modelport.tensors import encode
from modelport.v1 import prediction_pb2 as pb
from modelport_registry import Registry
from tests.support.rpc import engines

MODEL = "classic"
SMALL = "small"
MESSAGE_ROWS = (1, 32)
MOST_ROWS = 4096
STREAM_ROWS = 1_000_000
_STREAM_MESSAGE_ROWS = 32
_STREAM_WINDOW = 16
_CALLS_PER_CONNECTION = 1024
"""As many as the server takes; more would wait in the load generator."""
_LONGER_FROM = 1024
"""With so many rows in flight it is measured for twice as long, with twice as many for three times: each takes longer.
"""
_METHODS = "/modelport.v1.PredictionService"
_MIB = 1 << 20
_LOOK_S = 0.5
_LEAST_SECONDS = 0.2


class Stage:
    """A server and what drives it.

    Args:
        loadgen: the load generator.
        folder: where messages are written to.
        target: where the server listens.
        pid: the front's process id.
    """

    def __init__(self, loadgen: Path, folder: Path, target: str, pid: int) -> None:
        self._loadgen = loadgen
        self._folder = folder
        self.target = target
        self.front = psutil.Process(pid)

    def command(self, model: str, rows: int, seconds: float, concurrency: int, *, window: int = 0) -> list[str]:
        """Returns the command that puts a load on the server: calls, or with a window streams."""
        path = self._folder / f"{model}-{rows}-{bool(window)}"
        if not path.exists():
            path.write_bytes(_message(model, rows, stream=bool(window)))
        method = f"{_METHODS}/{'PredictStream' if window else 'Predict'}"
        channels = -(-concurrency // _CALLS_PER_CONNECTION)
        load = [seconds, concurrency, "stream" if window else "unary", window, channels]
        return [*map(str, [self._loadgen, self.target, method, path, *load])]

    def measure(self, model: str, rows: int, seconds: float, concurrency: int, *, window: int = 0) -> dict[str, Any]:
        """Returns what ``loadgen`` says of calls, or with a window of streams, in a closed loop."""
        command = self.command(model, rows, seconds, concurrency, window=window)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"failed": 1, "error": done.stderr[-500:]}
        if result["failed"]:
            sys.exit(f"error: {result['failed']} calls failed: {result['error']}")
        return result


def _message(model: str, rows: int, *, stream: bool) -> bytes:
    images = np.random.default_rng(rows).integers(0, 256, (rows, *models.IMAGE)).astype(np.uint8)
    request = pb.PredictRequest(model=model, inputs=[encode("images", images)])
    return (pb.PredictStreamRequest(request=request) if stream else request).SerializeToString()


@contextmanager
def serving(registry: Path, folder: Path, loadgen: Path, names: Sequence[str], engine: str) -> Generator[Stage]:
    """Serves a registry until the models named answer."""
    port, log = folder / "port", folder / "log"
    address = f"127.0.0.1:{free_port()}"
    port.unlink(missing_ok=True)
    options = ("--registry", registry, "--address", address, "--port-file", port, "--engine", engine)
    with process(modelport("serve", *options), log) as child:
        wait_for(port.exists, "the server to listen")
        stage = Stage(loadgen, folder, address, child.pid)
        began = time.monotonic()

        def alive() -> None:
            if child.poll() is not None:
                sys.exit(f"error: the server ended: {log.read_text()[-2000:]}")

        for name in names:
            command = stage.command(name, 1, _LEAST_SECONDS, 1)
            wait_for(lambda: answers_a_call(command), f"{name} to answer", alive, START_S * 4)  # noqa: B023
        say(f"{len(names)} models answer after {time.monotonic() - began:.0f} s")
        yield stage


def rows_in_flight(stage: Stage, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns rates by rows in flight, in rounds."""
    found: list[dict[str, Any]] = []
    for number in range(options.rounds):
        say(f"rows in flight: round {number + 1} of {options.rounds}")
        for rows in MESSAGE_ROWS:
            concurrency = 1
            while rows * concurrency <= MOST_ROWS:
                flight = rows * concurrency
                seconds = options.seconds * (1 + flight / _LONGER_FROM)
                result = stage.measure(MODEL, rows, seconds, concurrency)
                about = {"round": number, "rows": rows, "in_flight": flight}
                found.append(about | result | {"rows_per_s": result["per_s"] * rows})
                concurrency *= 2
    return found


def many_models(folder: Path, loadgen: Path, made: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns how long calls of one model take, alone and among as many as are asked for; each in turns."""
    names = [f"{SMALL}{number}" for number in range(options.models)]
    registries = {1: folder / "alone", options.models: folder / "many"}
    for count, root in registries.items():
        for name in names[:count]:
            Registry(root).publish(name, made / "saved_model", golden=models.golden(made))
    found: list[dict[str, Any]] = []
    counts = sorted(registries)
    folders = {count: Path(tempfile.mkdtemp(dir=folder)) for count in counts}
    with (
        serving(registries[counts[0]], folders[counts[0]], loadgen, names[:1], options.engine) as alone,
        serving(registries[counts[-1]], folders[counts[-1]], loadgen, names, options.engine) as many,
    ):
        for number in range(options.rounds):
            say(f"many models: round {number + 1} of {options.rounds}")
            for count, stage in ((counts[0], alone), (counts[-1], many)):
                for concurrency in (1, 16):
                    result = stage.measure(names[0], 1, options.seconds, concurrency)
                    found.append({"round": number, "models": count, "concurrency": concurrency} | result)
    return found


def long_stream(stage: Stage, rows: int, seconds: float) -> dict[str, Any]:
    """Returns the memory of the server's processes while one stream sends at least so many rows.

    Args:
        stage: the server.
        rows: how many.
        seconds: how long to measure first how many it takes in a second.
    """
    rate = stage.measure(MODEL, _STREAM_MESSAGE_ROWS, seconds, 1, window=_STREAM_WINDOW)["per_s"] * _STREAM_MESSAGE_ROWS
    seconds = 1.5 * rows / rate  # the first fifth, in which it warms up, does not count
    say(f"a stream of {rows:,} rows, about {seconds:.0f} s")
    command = stage.command(MODEL, _STREAM_MESSAGE_ROWS, seconds, 1, window=_STREAM_WINDOW)
    (engine,) = engines(stage.front)
    watched: Mapping[str, psutil.Process] = {"front": stage.front, "engine": engine}
    looks: list[dict[str, float]] = []
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None:
        look = {name: one.memory_info().rss / _MIB for name, one in watched.items()}
        looks.append({"s": time.monotonic() - began} | look)
        time.sleep(_LOOK_S)
    output, error = child.communicate()
    result: dict[str, Any] = json.loads(output) if output else {"failed": 1, "error": error[-500:]}
    if result["failed"]:
        sys.exit(f"error: the stream failed: {result['error']}")
    done = result["ok"] * _STREAM_MESSAGE_ROWS
    if done < rows:
        sys.exit(f"error: the stream had {done:,} rows, not {rows:,}: the machine got slower; try again")
    return {"rows": done, "rss_mib": looks} | result


def report(document: Mapping[str, Any]) -> None:
    """Prints what was found."""
    for rows, curve in _curves(document["rows_in_flight"]).items():
        peak = max(curve.values())
        after = [rate for flight, rate in curve.items() if flight >= max(curve, key=lambda one: curve[one])]
        rates = ", ".join(f"{flight}: {rate:,.0f}" for flight, rate in curve.items())
        print(f"messages of {rows} rows: rows/s by rows in flight {rates}; beyond the peak never below ", end="")
        print(f"{min(after) / peak:.2f} of it")
    by_count: dict[tuple[int, int], list[float]] = {}
    for row in document["many_models"]:
        by_count.setdefault((row["concurrency"], row["models"]), []).append(row["p50_ms"])
    for (concurrency, count), times in sorted(by_count.items()):
        print(f"{count} models, {concurrency} calls at a time: p50 {figures.spread(times, 3)} ms")
    stream = document["stream"]
    looks = stream["rss_mib"]
    for name in ("front", "engine"):
        quarter, last = looks[len(looks) // 4][name], looks[-1][name]
        most = max(look[name] for look in looks)
        print(f"a stream of {stream['rows']:,} rows: {name} {quarter:.0f} MiB after a quarter, {last:.0f} MiB ", end="")
        print(f"at the end, {most:.0f} MiB at most")


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[int, float]]:
    """Returns the median rate by rows in flight, for each size of message."""
    rates: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        rates.setdefault(row["rows"], {}).setdefault(row["in_flight"], []).append(row["rows_per_s"])
    return {
        rows: {flight: statistics.median(found) for flight, found in sorted(curve.items())}
        for rows, curve in rates.items()
    }


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draws the curves."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure: Any
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for rows, curve in _curves(document["rows_in_flight"]).items():
        left.plot(list(curve), list(curve.values()), marker="o", label=f"messages of {rows} rows")
    left.set(xscale="log", xlabel="rows in flight", ylabel="rows/s", title="classic network", ylim=(0, None))
    left.legend()
    looks = document["stream"]["rss_mib"]
    for name in ("front", "engine"):
        right.plot([look["s"] for look in looks], [look[name] for look in looks], label=name)
    right.set(xlabel="seconds", ylabel="resident MiB", ylim=(0, None))
    right.set_title(f"a stream of {document['stream']['rows']:,} rows")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description="Measure how cost grows.")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement (default 2)")
    parser.add_argument("--engine", choices=("openvino", "tensorflow"), default="openvino")
    parser.add_argument("--models", type=int, default=100, help="how many small ones (default 100)")
    parser.add_argument("--stream-rows", type=int, default=STREAM_ROWS, help="of the long stream (default a million)")
    parser.add_argument("--json", type=Path, default=Path("build/bench/scaling.json"), help="where figures go")
    parser.add_argument("--picture", type=Path, default=Path("build/bench/scaling.png"), help="where curves go")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    tools = Path("build/bench/tools").resolve()
    tools.mkdir(parents=True, exist_ok=True)
    loadgen = build_loadgen(tools)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        classic, light = models.classic(folder / "models"), models.light(folder / "models")
        registry = folder / "registry"
        Registry(registry).publish(MODEL, classic / "saved_model", golden=models.golden(classic))
        with serving(registry, folder, loadgen, [MODEL], options.engine) as stage:
            flights = rows_in_flight(stage, options)
            stream = long_stream(stage, options.stream_rows, options.seconds)
        many = many_models(folder, loadgen, light, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = machine.describe()
    document = {"benchmark": "scaling", "machine": about, "engine": options.engine}
    document |= {"rows_in_flight": flights, "many_models": many, "stream": stream}
    figures.write(options.json, document)
    draw(document, options.picture)
    report(document)
    print(f"{about['text']}, shared with the driver; engine {options.engine}; curves in {options.picture}")
