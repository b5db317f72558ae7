"""Writes ``docs/images/rollout-status.svg``: what ``modelport rollout status MODEL --watch`` shows."""

from __future__ import annotations

import io
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from modelport import GateInfo, Rejection, Rollout, RolloutInfo, RolloutStep, RolloutVersion, Traffic, VersionState
from modelport_registry._cli_rollout_view import panel

_WIDTH = 112


def gates() -> tuple[GateInfo, ...]:
    """Returns what the gates found."""
    found = (
        ("integrity", 0.01, {"files": 4, "bytes": 4_912_333}),
        ("safety", 0.02, {"operations": 24, "nodes": 213, "functions": 9}),
        ("signature", 0.0, {"signatures": 1, "added": []}),
        ("load", 0.15, {"resident_mib": 251}),
        ("golden", 0.21, {"examples": 64, "batch_sizes": [1, 64, 128]}),
        ("warm-up", 0.68, {"batch_sizes": [1, 2, 4, 8, 16, 32, 64, 128], "runs": 41, "requests": 0}),
    )
    return tuple(
        GateInfo(gate=gate, outcome="passed", duration_s=seconds, figures=figures, reason="")
        for gate, seconds, figures in found
    )


def example() -> RolloutInfo:
    """Returns a rollout in its second canary step."""
    steps = (
        RolloutStep("shadow", 1.0, 60),
        RolloutStep("canary", 0.01, 60),
        RolloutStep("canary", 0.1, 60),
        RolloutStep("canary", 0.5, 60),
    )
    rollout = Rollout(
        id="5-3f9c", version=5, previous=4, steps=steps, phase="step", step=2, paused=False, phase_age_s=38, bake_s=60
    )
    stable = RolloutVersion(
        version=4, place="stable", state=VersionState.AVAILABLE, share=0.9, gates=(),
        traffic=Traffic(calls=42_811, errors=2, calls_per_s=1126, p50_ms=1.21, p99_ms=3.84),
    )  # fmt: skip
    candidate = RolloutVersion(
        version=5, place="candidate", state=VersionState.AVAILABLE, share=0.1, gates=gates(),
        traffic=Traffic(calls=4_757, errors=0, calls_per_s=125, p50_ms=1.24, p99_ms=3.91),
    )  # fmt: skip
    return RolloutInfo(
        model="mnist",
        generation=17,
        stable=4,
        pinned=None,
        rollout=rollout,
        versions=(stable, candidate),
        verdict="as good as version 4 so far: errors 0.00% against 0.00%, p99 1.02 times, classes alike",
        figures=MappingProxyType({}),
        last=None,
        rejected=MappingProxyType({3: Rejection(gate="golden", reason="row 17 of classes is 4, published as 9")}),
    )


def main() -> None:
    """Writes the file."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(panel(example()))
    svg = console.export_svg(title="modelport rollout status mnist --watch", unique_id="rollout")
    (Path(__file__).parent / "images" / "rollout-status.svg").write_text(svg)


if __name__ == "__main__":
    main()
