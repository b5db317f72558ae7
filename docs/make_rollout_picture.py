"""Writes ``docs/images/rollout-status.svg``: what ``modelport rollout status MODEL --watch`` shows."""

from __future__ import annotations

import io
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from modelport import GateInfo, Rejection, Rollout, RolloutInfo, RolloutStep, RolloutVersion, Traffic, VersionState
from modelport_registry._cli_rollout_view import panel

_WIDTH = 120


def gates() -> tuple[GateInfo, ...]:
    """Returns what the gates found."""
    speed = [{"rows": 1, "ratio": 1.02}, {"rows": 32, "ratio": 0.98}]
    sizes = [1, 2, 4, 8, 16, 32, 64, 128]
    found = (
        ("integrity", 0.01, {"bytes": 4_912_333, "files": 4}),
        ("safety", 0.04, {"functions": 9, "nodes": 213, "operations": 24}),
        ("signature", 0.0, {"signatures": 1}),
        ("load", 0.15, {"resident_mib": 304}),
        ("golden", 0.21, {"batch_sizes": [1, 64, 128], "examples": 64}),
        ("warm-up", 0.68, {"batch_sizes": sizes, "first_row_ms": 8.4, "last_row_ms": 1.1, "runs": 41}),
        ("speed", 1.01, {"max_ratio": 2, "measured": speed}),
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
        verdict="no worse in 4757 calls",
        figures=MappingProxyType({}),
        last=None,
        rejected=MappingProxyType(
            {
                3: Rejection(
                    gate="golden",
                    reason="output 'probabilities' differs in 31 of 640 values, by up to 0.4",
                )
            }
        ),
    )


def main() -> None:
    """Writes the file."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(panel(example()))
    svg = console.export_svg(title="modelport rollout status mnist --watch", unique_id="rollout")
    (Path(__file__).parent / "images" / "rollout-status.svg").write_text(svg)


if __name__ == "__main__":
    main()
