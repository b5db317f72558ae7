"""``python -m bench transport``: what it costs to answer a gRPC call in Python, whatever is in it.

Servers that give back what they get (``bench.peer.echo``) are called in turns by ``loadgen``: gRPC's own for asyncio,
ours, and one on the library h2 where that is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench import figures, machine
from bench.peer.echo import METHOD, SERVICE, WAYS
from bench.peers import answers_a_call, build_loadgen, free_port, process
from bench.stage import say
from tests.support.server import wait_for

_MESSAGE_BYTES = 800
CONCURRENCIES = (1, 64)
_START_S = 30.0


def measure(way: str, loadgen: Path, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Returns what calls of one kind of server come to, one and many at a time."""
    port = free_port()
    payload = folder / "payload"
    payload.write_bytes(os.urandom(_MESSAGE_BYTES))
    found: list[dict[str, Any]] = []
    with process([sys.executable, "-m", "bench.peer.echo", way, port], folder / "log") as child:

        def command(duration_s: float, concurrency: int) -> list[str]:
            target = f"127.0.0.1:{port}"
            words = [loadgen, target, f"/{SERVICE}/{METHOD}", payload, duration_s, concurrency, "unary"]
            return [*map(str, words)]

        def alive() -> None:
            if child.poll() is not None:
                sys.exit(f"error: the server by {way} ended: {(folder / 'log').read_text()[-500:]}")

        wait_for(lambda: answers_a_call(command(0.2, 1)), f"the server by {way} to answer", alive, _START_S)
        server = psutil.Process(child.pid)
        for concurrency in CONCURRENCIES:
            before, began = sum(server.cpu_times()[:2]), os.times().elapsed
            done = subprocess.run(command(seconds, concurrency), capture_output=True, text=True, check=True)
            result = json.loads(done.stdout)
            if result["failed"]:
                sys.exit(f"error: calls by {way} failed: {result['error']}")
            calls = result["per_s"] * (os.times().elapsed - began)
            us = (sum(server.cpu_times()[:2]) - before) / calls * 1e6
            found.append({"way": way, "concurrency": concurrency, "us": us} | result)
    return found


def report(rows: Sequence[Mapping[str, Any]], rounds: int) -> None:
    """Prints medians."""
    table = Table(title=f"an echo of {_MESSAGE_BYTES} bytes: medians of {rounds} rounds")
    for head in ("by", "calls at a time", "calls/s", "p50, ms", "p99, ms", "processor time of the server, us a call"):
        table.add_column(head)
    for concurrency in CONCURRENCIES:
        for way in dict.fromkeys(row["way"] for row in rows):
            found = [row for row in rows if (row["way"], row["concurrency"]) == (way, concurrency)]
            columns = (("per_s", 0), ("p50_ms", 3), ("p99_ms", 3), ("us", 1))
            table.add_row(
                way, str(concurrency), *(figures.spread(figures.at(found, name), digits) for name, digits in columns)
            )
    Console(width=160).print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench transport", description="Measure what a call costs.")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement (default 2)")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--json", type=Path, default=Path("build/bench/transport.json"), help="where figures go")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = 1, 0.3
    return options


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    tools = Path("build/bench/tools").resolve()
    tools.mkdir(parents=True, exist_ok=True)
    loadgen = build_loadgen(tools)
    ways = [way for way in WAYS if way != "h2" or importlib.util.find_spec("h2") is not None]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            for way in ways:
                rows += [{"round": number} | row for row in measure(way, loadgen, Path(folder), options.seconds)]
    about = machine.describe()
    versions = {name: metadata.version(name) for name in ("grpcio", "hpack", "uvloop", *({"h2"} & set(ways)))}
    document = {"benchmark": "transport", "machine": about, "versions": versions, "rounds": rows}
    figures.write(options.json, document)
    report(rows, options.rounds)
    print(f"{about['text']}, shared with the driver; {versions}")
