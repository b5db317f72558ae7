"""What a line of the journal has room for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from modelport_registry import _journal as journal

CHARACTERS = st.sampled_from(["a", '"', "ü", "\U0001f600", "\0"])
"""They take from 1 to 12 bytes in a line."""
SMALL: st.SearchStrategy[Any] = st.sampled_from([1, "", [], {}, None, True, 12345.678])


@st.composite
def details_of_any_size(draw: st.DrawFn) -> dict[str, Any]:
    """Draws details of up to some hundred thousand bytes: many small ones, or a few large ones."""
    details: dict[str, Any] = {f"large {i}": draw(CHARACTERS) * draw(st.integers(0, 60_000)) for i in range(3)}
    count, length = draw(st.sampled_from([(0, 0), (10, 1), (1000, 10), (5000, 10), (20, 10_000)]))
    name, value = draw(CHARACTERS) * length, draw(SMALL)
    details |= {f"{name}{i}": value for i in range(count)}
    return details | {journal.GENERATION: draw(st.integers(1, 2**63))}


def write(folder: Path, reason: str, actor: str, details: dict[str, Any]) -> dict[str, Any]:
    """Writes a line that must fit, and returns what it says."""
    path = folder / "journal.jsonl"
    path.unlink(missing_ok=True)
    journal.append(path, "rejected", version=3, reason=reason, details=details, actor=actor, fit=True)
    (line,) = path.read_bytes().splitlines()
    assert len(line) < journal.MAX_LINE_BYTES
    document: dict[str, Any] = json.loads(line)
    return document


@settings(deadline=None)
@given(st.data())
def test_whatever_there_is_to_say_a_line_has_room_for_the_decision(tmp_path_factory: Any, data: st.DataObject) -> None:
    details = data.draw(details_of_any_size())
    reason, actor = (data.draw(CHARACTERS) * data.draw(st.integers(1, 100_000)) for _ in range(2))
    folder = tmp_path_factory.getbasetemp()
    document = write(folder, reason, actor, details)
    assert reason.startswith(document["reason"])
    assert actor.startswith(document["actor"])
    said = document["details"]
    assert said.keys() <= details.keys()
    assert all(value in (None, details[name]) for name, value in said.items())
    assert said[journal.GENERATION] == details[journal.GENERATION]


def test_what_fits_is_said_in_full(tmp_path: Path) -> None:
    details = {"figures": ["x" * 40_000], "why": None, journal.GENERATION: 7}
    document = write(tmp_path, "slow" * 250, "somebody", details)
    assert (document["details"], document["reason"], document["actor"]) == (details, "slow" * 250, "somebody")


def test_the_largest_is_left_out_first(tmp_path: Path) -> None:
    details = {"large": "x" * 30_000, "larger": "x" * 40_000, "small": 1}
    assert write(tmp_path, "", "somebody", details)["details"] == {**details, "larger": None}
