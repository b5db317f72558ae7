"""Trains the presets classic and accurate in turns: how often each is right, and how long each takes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import figures, machine
from bench.machine import Usage
from bench.stage import modelport, say

_OPTIONS: dict[str, tuple[str, ...]] = {"classic": ("--epochs", "10", "--patience", "0"), "accurate": ()}
"""What is asked for beside each preset: ten epochs of the classic network, not fewer when it stops getting better."""
PRESETS = tuple(_OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What one training came to."""

    preset: str
    seed: int
    accuracy: float
    """Share of the test images that the exported model names right."""
    wrong: int
    epochs: int
    best_epoch: int
    training_s: float
    """All epochs, with augmentation and validation."""
    command_s: float
    """The command from start to end, with imports, data, test and report."""
    others_cores: float
    """Cores that other processes kept busy meanwhile."""


def train(preset: str, seed: int, folder: Path, options: argparse.Namespace) -> Training:
    """Trains once, by the command line in a process of its own."""
    extra = ("--epochs", "1") if options.quick else _OPTIONS[preset]
    run = ("--run-dir", folder / f"{preset}-{seed}", "--no-publish", "--json")
    before, began = Usage.now(), time.monotonic()
    command = modelport("train", "--preset", preset, "--seed", str(seed), *_data(options), *extra, *run)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took_s = time.monotonic() - began
    if done.returncode:
        sys.exit(f"error: the training failed: {done.stderr[-2000:]}")
    told = json.loads(done.stdout)
    history = told["training"]["history"]
    found = Training(
        preset=preset,
        seed=seed,
        accuracy=told["evaluation"]["accuracy"],
        wrong=len(told["evaluation"]["mistakes"]),
        epochs=len(history),
        best_epoch=told["training"]["best_epoch"],
        training_s=round(sum(epoch["duration_s"] for epoch in history), 1),
        command_s=round(took_s, 1),
        others_cores=round(before.others(Usage.now()), 3),
    )
    say(
        f"{preset}, seed {seed}: accuracy {found.accuracy:.4f} after {found.training_s:.1f} s of training; "
        f"others had {found.others_cores:.2f} cores"
    )
    return found


def _data(options: argparse.Namespace) -> tuple[str, str]:
    if options.quick:
        return "--data", "digits"
    return ("--data-dir", options.data_dir) if options.data_dir else ("--data", "mnist")


def run(folder: Path, options: argparse.Namespace) -> list[Training]:
    """Trains each preset with each seed; the one that went first goes second next time."""
    found: list[Training] = []
    for number, seed in enumerate(options.seed):
        order = PRESETS if number % 2 == 0 else PRESETS[::-1]
        found += [train(preset, seed, folder, options) for preset in order]
    return found


def summary(found: Sequence[Training]) -> dict[str, float]:
    """Returns what counts: the mean accuracy of each preset, and the median of the ratios of their times."""
    of = {preset: {one.seed: one for one in found if one.preset == preset} for preset in PRESETS}
    pairs = [(of["accurate"][seed], of["classic"][seed]) for seed in of["classic"]]
    return {
        **{f"{preset}_accuracy": statistics.mean(one.accuracy for one in of[preset].values()) for preset in PRESETS},
        "training_ratio": statistics.median(mine.training_s / other.training_s for mine, other in pairs),
        "training_ratio_highest": max(mine.training_s / other.training_s for mine, other in pairs),
        "command_ratio": statistics.median(mine.command_s / other.command_s for mine, other in pairs),
    }


def report(found: Sequence[Training]) -> None:
    """Prints every training, then each preset's mean accuracy and median times."""
    table = Table()
    for heading in (
        "preset",
        "seed",
        "accuracy",
        "wrong",
        "epochs",
        "best",
        "training, s",
        "command, s",
        "others, cores",
    ):
        table.add_column(heading, justify="left" if heading == "preset" else "right")
    for preset in PRESETS:
        trained = sorted((one for one in found if one.preset == preset), key=lambda one: one.seed)
        for one in trained:
            counts = (f"{one.wrong}", f"{one.epochs}", f"{one.best_epoch}")
            times = (f"{one.training_s:.1f}", f"{one.command_s:.1f}", f"{one.others_cores:.2f}")
            table.add_row(preset, f"{one.seed}", f"{one.accuracy:.4f}", *counts, *times)
        accuracy = statistics.mean(one.accuracy for one in trained)
        medians = (figures.median_text([value(one) for one in trained], 1) for value in (_training_s, _command_s))
        table.add_row(f"[bold]{preset}", "all", f"[bold]{accuracy:.4f}", "", "", "", *medians, "", end_section=True)
    Console(width=120).print(table)
    said = summary(found)
    ratios = (f"{said[name]:.2f}" for name in ("training_ratio", "training_ratio_highest", "command_ratio"))
    print("training takes {} times as long as classic's (at most {}), the whole command {} times".format(*ratios))


def _training_s(one: Training) -> float:
    return one.training_s


def _command_s(one: Training) -> float:
    return one.command_s


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench accurate", description="Train both presets on MNIST.")
    parser.add_argument("--seed", type=int, action="append", help="train with this seed; repeatable (default 1, 2, 3)")
    parser.add_argument(
        "--data-dir",
        default=os.environ.get("MODELPORT_MNIST_DIR"),
        help="the folder of MNIST's four IDX files (default $MODELPORT_MNIST_DIR, else Keras downloads them)",
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench/accurate.json"), help="where figures go")
    parser.add_argument("--quick", action="store_true", help="one epoch on the 8x8 digits: shows that it runs")
    options = parser.parse_args(arguments)
    options.seed = options.seed or ([1] if options.quick else [1, 2, 3])
    if len(set(options.seed)) < len(options.seed):
        parser.error("give each seed once")
    return options


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        found = run(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = machine.describe()
    rounds = [asdict(one) for one in found]
    figures.write(
        options.json, {"benchmark": "accurate", "machine": about, "rounds": rounds, "summary": summary(found)}
    )
    report(found)
    print(f"{about['text']}; all figures are in {options.json}")
