"""``python -m bench precisions``: how fast OpenVINO is in each precision, and how far its answers are off.

A published version is loaded in this process in one precision after another, on one thread, and runs its own golden
inputs: as they are, to compare the answers, and in batches of several sizes, in turns, for the time. No gate is asked.
Without ``--model`` it is the classic network with random weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench import figures, machine, models
from bench.stage import say
from modelport.names import DEFAULT_SIGNATURE
from modelport_registry import Golden, Registry
from modelport_server.engines.int8 import samples_of
from modelport_server.engines.kinds import PRECISIONS
from modelport_server.engines.openvino_engine import OpenVINOEngine, import_openvino
from modelport_server.engines.parallel import Parallelism
from modelport_server.engines.protocol import EngineError

SIZES = (1, 32, 128)
_UNCOUNTED, _ROUNDS = 3, 15


def main(arguments: Sequence[str]) -> None:
    """Measures."""
    parser = argparse.ArgumentParser(prog="python -m bench precisions", description=__doc__)
    parser.add_argument("--registry", type=Path, default=Path("models"))
    parser.add_argument("--model", help="one whose rows are independent (default: the classic network)")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a single round")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="modelport-bench-") as folder:
        if options.model:
            registry, version = Registry(options.registry.absolute()), (options.model, options.version)
            path, golden = registry.path(*version), registry.golden(*version)
        else:
            made = models.classic(Path(folder))
            path, golden = made / "saved_model", models.golden(made)
        example = next(one for one in golden if one.signature == DEFAULT_SIGNATURE)
        rows = measure(path, example, 1 if options.quick else _ROUNDS)
    if options.json:
        figures.write(options.json, {"benchmark": "precisions", "machine": machine.describe(), "precisions": rows})
    _print(rows)


def measure(path: Path, example: Golden, rounds: int) -> list[dict[str, Any]]:
    """Returns the figures of each precision."""
    import_openvino()  # it is no part of how long a model takes to load
    engines: dict[str, OpenVINOEngine] = {}
    rows: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        began = time.perf_counter()
        samples = samples_of([example], [example.signature])
        try:
            engine = OpenVINOEngine(parallelism=Parallelism(1, 1), precision=precision, samples=samples)
            engine.load(path, [example.signature])
        except EngineError as error:
            say(f"{precision} is left out: {error}")
            continue
        row: dict[str, Any] = {"precision": precision, "load_s": round(time.perf_counter() - began, 2)}
        rows.append(row | _differences(example, engine.run(example.signature, example.inputs)))
        engines[precision] = engine
    for size in SIZES:
        inputs = {name: np.resize(array, (size, *array.shape[1:])) for name, array in example.inputs.items()}
        spent: dict[str, list[float]] = {precision: [] for precision in engines}
        for number in range(_UNCOUNTED + rounds):
            for precision, engine in engines.items():
                spent_ms = _spent_ms(engine, example, inputs)
                spent[precision] += [spent_ms] * (number >= _UNCOUNTED)
        for row in rows:
            row[f"ms_{size}"] = round(median(spent[row["precision"]]), 3)
    return rows


def _spent_ms(engine: OpenVINOEngine, example: Golden, inputs: Mapping[str, NDArray[Any]]) -> float:
    began = time.perf_counter()
    engine.run(example.signature, inputs)
    return (time.perf_counter() - began) * 1e3


def _differences(example: Golden, outputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    largest, others = 0.0, 0
    for name, expected in example.outputs.items():
        if expected.dtype.kind == "f":
            largest = max(largest, float(np.abs(outputs[name] - expected).max()))
        else:
            others += int(np.count_nonzero(outputs[name] != expected))
    return {"largest_difference": float(f"{largest:.2g}"), "other_integers": others}


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("precision", "load s", *(f"ms, {size} rows" for size in SIZES), "off by", "other integers", box=None)
    for row in rows:
        table.add_row(
            *(str(value) for value in (row["precision"], row["load_s"], *(row[f"ms_{n}"] for n in SIZES))),
            f"{row['largest_difference']:g}",
            str(row["other_integers"]),
        )
    Console().print(table)
