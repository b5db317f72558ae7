"""What ``modelport rollout status`` draws: one picture of a rollout, and its changes as lines."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from modelport import GateInfo, Rollout, RolloutInfo, RolloutStep, RolloutVersion, VersionState

_BAR_CELLS = 10
_TIME_BAR_CELLS = 40
_SHOWN_FIGURES = 5
_SHOWN_ITEMS = 8
_NO_LIMIT = 1 << 16
_TRAFFIC: tuple[str, ...] = ("calls", "calls/s", "errors", "p50 ms", "p99 ms")
_LAYOUTS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (_BAR_CELLS, ()),
    (0, ()),
    (0, ("calls/s",)),
    (0, ("calls/s", "p50 ms")),
)
"""The cells of a bar and the columns that are left out, from wide to narrow."""
_UNITS = {"_mib": " MiB", "_ms": " ms", "_s": " s"}
_COLOURS = {"stable": "green", "candidate": "cyan", "previous": "yellow"}
_GATE_SIGNS = {"passed": ("✓", "green"), "failed": ("✗", "red"), "skipped": ("-", "dim")}
_STATE_COLOURS = {
    VersionState.AVAILABLE: "green",
    VersionState.REJECTED: "red",
    VersionState.DRAINING: "yellow",
    VersionState.RETIRED: "dim",
    VersionState.UNKNOWN: "dim",
}
_GOOD, _BAD = "promoted", ("rejected", "rolled back")


@dataclass
class LiveView:
    """The newest status, drawn with the time that has passed since it came."""

    status: RolloutInfo
    received_s: float
    """On the monotonic clock."""

    def __rich__(self) -> RenderableType:
        return panel(self.status, time.monotonic() - self.received_s)


def panel(status: RolloutInfo, older_s: float = 0.0) -> RenderableType:
    """Returns the picture of a status.

    Args:
        status: what to draw.
        older_s: how long ago it was so, in seconds: time goes on between two statuses.
    """
    parts: list[RenderableType] = [_headline(status)]
    if status.rollout is not None:
        parts.append(_plan(status.rollout))
        if (bar := _time_bar(status.rollout, older_s)) is not None:
            parts.append(bar)
    if status.versions:
        parts += [Text(), _Versions(status.versions)]
    if (candidate := status.candidate or _gated(status)) is not None and candidate.gates:
        parts += [Text(), _gates(candidate)]
    if status.verdict:
        parts += [Text(), Text.assemble(("verdict  ", "bold"), status.verdict)]
    parts += [Text.assemble(("rejected ", "bold red"), _rejected(status, number)) for number in sorted(status.rejected)]
    title = f"[bold]{escape(status.model)}[/] [dim]generation {status.generation}[/]"
    return Panel(Group(*parts), title=title, title_align="left", border_style=_border(status), padding=(1, 2))


def lines(before: RolloutInfo | None, after: RolloutInfo) -> Iterator[str]:
    """Yields a line for each thing that has changed from one status to the next."""
    rollout = after.rollout
    if rollout is None:
        if before is None or before.rollout is not None:
            yield f"{after.model}: {_headline(after).plain}"
        return
    was = before.rollout if before is not None else None
    if was is None or was.id != rollout.id or _where(was) != _where(rollout):
        yield f"{after.model} version {rollout.version}: {_phase_text(rollout)}{', paused' if rollout.paused else ''}"
    yield from _gate_lines(before, after, rollout)
    if after.verdict and (before is None or _words(before.verdict) != _words(after.verdict)):
        yield f"{after.model} version {rollout.version}: {after.verdict}"


def outcome(status: RolloutInfo, watched: int) -> str | None:
    """Returns how a version's rollout ended that was under way; None while it is, or another follows at once."""
    if status.rollout is not None and status.rollout.version == watched:
        return None
    if status.last is not None and status.last.version == watched:
        return status.last.outcome
    if watched in status.rejected:
        return "rejected"
    return _GOOD if status.stable == watched else "replaced"


def _words(verdict: str) -> str:
    """Returns a verdict without its numbers, which change all the time."""
    return re.sub(r"[\d.,]+", "", verdict)


def _where(rollout: Rollout) -> tuple[str, int, bool]:
    return rollout.phase, rollout.step, rollout.paused


def _gate_lines(before: RolloutInfo | None, after: RolloutInfo, rollout: Rollout) -> Iterator[str]:
    candidate = after.candidate
    if candidate is None:
        return
    known = before.candidate if before is not None else None
    same = known is not None and known.version == candidate.version
    seen = {gate.gate for gate in known.gates} if known is not None and same else set[str]()
    for gate in candidate.gates:
        if gate.gate not in seen:
            why = f", {gate.reason}" if gate.reason else ""
            took = _seconds(gate.duration_s)
            yield f"{after.model} version {rollout.version}: gate {gate.gate} {gate.outcome} in {took}{why}"


def _headline(status: RolloutInfo) -> Text:
    rollout = status.rollout
    if rollout is not None:
        paused = ("  paused", "bold yellow") if rollout.paused else ""
        return Text.assemble((f"version {rollout.version}", "bold cyan"), "  ", _phase_text(rollout), paused)
    stable = f"version {status.stable} is in charge" if status.stable else "no version is in charge yet"
    pinned = f", pinned to version {status.pinned}" if status.pinned else ""
    text = Text.assemble((stable, "bold green" if status.stable else "bold"), pinned)
    if (last := status.last) is not None:
        colour = "green" if last.outcome == _GOOD else "red" if last.outcome in _BAD else "yellow"
        text.append_text(Text.assemble("; version ", str(last.version), " was ", (last.outcome, f"bold {colour}")))
        text.append(f": {last.reason}" if last.reason else "")
    return text


def _phase_text(rollout: Rollout) -> str:
    if (step := rollout.current) is not None:
        return f"step {rollout.step + 1} of {len(rollout.steps)}: {_step_text(step)} of the calls"
    texts = {"gates": "is in the gates", "watch": "is in charge, and watched"}
    return texts.get(rollout.phase, rollout.phase)


def _step_text(step: RolloutStep) -> str:
    return f"{step.kind} {_percent(step.share)}"


def _plan(rollout: Rollout) -> Text:
    """Returns the whole way of a rollout as a line of stations."""
    stations = ["gates", *map(_step_text, rollout.steps), "watch"]
    at = {"gates": 0, "step": 1 + rollout.step}.get(rollout.phase, len(stations) - 1)
    text = Text()
    for number, name in enumerate(stations):
        if number:
            text.append(" ━━ " if number <= at else " ── ", "green" if number <= at else "dim")
        sign, style = ("●", "green") if number < at else ("◉", "bold cyan") if number == at else ("○", "dim")
        text.append(f"{sign} {name}", style)
    return text


def _time_bar(rollout: Rollout, older_s: float) -> Text | None:
    if rollout.bake_s <= 0:
        return None
    age_s = rollout.phase_age_s + (0.0 if rollout.paused else older_s)
    left_s = rollout.bake_s - age_s
    rest = f"{_duration(left_s)} left" if left_s > 0 else "time is up, waiting for evidence"
    if rollout.paused:
        rest = "paused"
    elif left_s <= 0 and rollout.phase == "watch":
        rest = "time is up"
    bar = _bar(min(1.0, age_s / rollout.bake_s), _TIME_BAR_CELLS, "cyan")
    shown_s = min(age_s, rollout.bake_s)
    return Text.assemble(bar, f" {_duration(shown_s)} of {_duration(rollout.bake_s)}, ", rest)


@dataclass(frozen=True, slots=True)
class _Versions:
    """The versions that have a part in a rollout, side by side, with as much as there is room for."""

    versions: tuple[RolloutVersion, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(max_width=_NO_LIMIT)
        tables = [self._table(cells, left_out) for cells, left_out in _LAYOUTS]
        fitting = (t for t in tables if console.measure(t, options=unlimited).maximum <= options.max_width)
        yield next(fitting, tables[-1])

    def _table(self, bar_cells: int, left_out: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
        for name in ("version", "place", "state", "share"):
            table.add_column(name, overflow="fold")
        shown = [name for name in _TRAFFIC if name not in left_out]
        for name in shown:
            table.add_column(name, justify="right", overflow="fold")
        for version in self.versions:
            colour = _COLOURS.get(version.place, "white")
            share = Text(f"{_percent(version.share):>5}")
            if bar_cells:
                share = Text.assemble(share, " ", _bar(version.share, bar_cells, colour))
            cells = dict(zip(_TRAFFIC, _traffic_cells(version), strict=True))
            table.add_row(
                Text(str(version.version), f"bold {colour}"),
                Text(version.place, colour),
                Text(version.state.value, _STATE_COLOURS.get(version.state, "cyan")),
                share,
                *(cells[name] for name in shown),
            )
        return table


def _traffic_cells(version: RolloutVersion) -> list[Text]:
    traffic = version.traffic
    if traffic is None:
        return [Text("-", "dim")] * len(_TRAFFIC)
    answered = traffic.calls > traffic.errors
    return [
        Text(f"{traffic.calls:,}"),
        Text(f"{traffic.calls_per_s:,.0f}" if traffic.calls_per_s >= 10 else f"{traffic.calls_per_s:.1f}"),
        Text(f"{traffic.errors:,}", "bold red" if traffic.errors else "dim"),
        *(Text(_milliseconds(ms)) if answered else Text("-", "dim") for ms in (traffic.p50_ms, traffic.p99_ms)),
    ]


def _gates(version: RolloutVersion) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for gate in version.gates:
        sign, colour = _GATE_SIGNS.get(gate.outcome, ("?", "dim"))
        table.add_row(
            Text(sign, f"bold {colour}"),
            Text(gate.gate, colour if gate.outcome == "failed" else ""),
            Text(_seconds(gate.duration_s), "dim", justify="right"),
            _finding(gate),
        )
    return Group(Text(f"gates of version {version.version}", "dim"), Padding(table, (0, 0, 0, 0)))


def _finding(gate: GateInfo) -> Text:
    figures = Text(figures_text(gate.figures), "dim")
    if not gate.reason:
        return figures
    reason = Text(gate.reason, "red" if gate.outcome == "failed" else "dim")
    return Text.assemble(reason, "  ", figures) if figures.plain else reason


def figures_text(figures: Mapping[str, Any]) -> str:
    """Returns the first figures in words; those with more inside than a few numbers are left out."""
    texts = [text for name, value in figures.items() if (text := _figure(name, value))]
    return " · ".join(texts[:_SHOWN_FIGURES])


def _figure(name: str, value: object) -> str:
    text = _value(value)
    if not text:
        return ""
    stem, unit = next(
        ((name.removesuffix(end), unit) for end, unit in _UNITS.items() if name.endswith(end)), (name, "")
    )
    return f"{stem.replace('_', ' ')} {text}{unit}"


def _value(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case str():
            return value
        case list():
            return _list_value(cast("list[object]", value))
        case {"ratio": float() | int() as ratio, "rows": int() as rows}:
            text = f"{ratio:.2f} at {rows} {'row' if rows == 1 else 'rows'}"
            work = cast("dict[str, object]", value).get("cpu_ratio")
            return f"{text} ({work:.2f} of the processor time)" if isinstance(work, float | int) else text
        case _:
            return ""


def _list_value(items: list[object]) -> str:
    texts = [text for item in items if (text := _value(item))]
    return ", ".join(texts) if len(texts) <= _SHOWN_ITEMS else f"{len(texts):,}"


def _gated(status: RolloutInfo) -> RolloutVersion | None:
    """Returns the version that last went through the gates where no rollout is under way."""
    wanted = status.last.version if status.last is not None else None
    return next((version for version in status.versions if version.version == wanted), None)


def _rejected(status: RolloutInfo, number: int) -> str:
    rejection = status.rejected[number]
    return f"version {number}, {rejection.gate}: {rejection.reason}"


def _border(status: RolloutInfo) -> str:
    if status.rollout is None:
        return "red" if status.last is not None and status.last.outcome in _BAD else "green"
    return "yellow" if status.rollout.paused else "cyan"


def _bar(share: float, cells: int, colour: str) -> Text:
    """Returns a bar with steps of an eighth of a cell, so that 1% can be seen."""
    eighths = max(round(share * cells * 8), 1 if share > 0 else 0)
    whole, part = divmod(eighths, 8)
    filled = "█" * whole + ("▏▎▍▌▋▊▉"[part - 1] if part else "")
    return Text.assemble((filled, colour), ("░" * (cells - len(filled)), "bright_black"))


def _percent(share: float) -> str:
    return f"{share * 100:.4g}%"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def _duration(value_s: float) -> str:
    seconds = max(0, round(value_s))
    if seconds < 120:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds:02} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
