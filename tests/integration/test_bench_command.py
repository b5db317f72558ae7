"""``modelport bench`` puts the load on that it says, and measures what callers would see."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from modelport._cli_bench import random_inputs, run_stage
from modelport._load import Load
from modelport._models import SignatureInfo, TensorInfo
from modelport.exceptions import InputError
from modelport.tensors import decode
from tests.support.fake_server import FakeServer, RefusalError, signature, spec

HELD_S = 0.05


async def bench(*arguments: object) -> tuple[int | None, str, str]:
    """Runs the command; returns status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "modelport", "bench", *map(str, arguments),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    out, err = await process.communicate()
    assert b"Traceback" not in err, err.decode()
    return process.returncode, out.decode(), err.decode()


def one_by_one() -> Any:
    """Returns what makes a server answer one call after another, each after a while."""
    turn = asyncio.Lock()

    async def wait(*_: object) -> None:
        async with turn:
            await asyncio.sleep(HELD_S)

    return wait


async def test_loops_of_both_kinds_with_figures_and_a_picture(tmp_path: Path) -> None:
    document, picture = tmp_path / "b.json", tmp_path / "b.png"
    async with FakeServer() as server:
        status, out, err = await bench(
            "m", "-s", server.address, "--rows", 1, "--rows", 5, "--callers", 2, "--rate", 50, "--seconds", 0.5,
            "--warm-up", 0.1, "--processes", 2, "--json", document, "--picture", picture,
        )  # fmt: skip
        sizes = {len(decode(tensor)) for request in server.requests for tensor in request.inputs}
    assert status == 0, err
    assert sizes == {1, 5}
    assert "1 row a call, 2 callers" in out
    assert "5 rows a call, 50 a second" in out
    measured = json.loads(document.read_text())
    assert (measured["model"], measured["version"], measured["processes"]) == ("m", 1, 2)
    assert [(stage["rows"], stage["callers"], stage["rate"]) for stage in measured["stages"]] == [
        (1, 2, 0.0), (1, 1, 50.0), (5, 2, 0.0), (5, 1, 50.0),
    ]  # fmt: skip
    for stage in measured["stages"]:
        times = list(stage["latency_ms"].values())
        assert times == sorted(times)
        assert times[0] > 0
        assert stage["rows_per_s"] == pytest.approx(stage["rows"] * stage["calls"] / 0.5)
        assert not stage["errors"]
    assert all(0 < stage["calls"] <= 26 for stage in measured["stages"] if stage["rate"])
    assert picture.read_bytes().startswith(b"\x89PNG")


async def test_an_open_loop_counts_from_when_a_call_was_due() -> None:
    """Forty calls a second of which twenty are answered wait for each other; a caller who waits sees nothing of it."""
    async with FakeServer(on_request=one_by_one()) as server:
        inputs = {"x": np.ones(4, np.float32)}
        common: dict[str, Any] = {"model": "m", "warm_up_s": 0.0, "seconds": 1.0}
        load = Load(rate=2 / HELD_S, **common)
        stage = await asyncio.to_thread(run_stage, [server.address], load, inputs, 1)
    assert 0 < stage.calls <= 1 / HELD_S  # whatever was asked for, no more were answered in a second
    assert stage.latency_ms["max"] is not None
    assert stage.latency_ms["max"] > 1e3 * (40 * HELD_S - 1.0)
    assert stage.latency_ms["p50"] is not None
    assert stage.latency_ms["p50"] > 1e3 * (20 * HELD_S - 0.5)


@pytest.mark.parametrize("load", [["--callers", 2], ["--rate", 40]], ids=["closed", "open"])
async def test_messages_of_streams(load: list[object]) -> None:
    async with FakeServer() as server:
        status, out, err = await bench(
            "m", "-s", server.address, "--mode", "stream", "--rows", 3, "--seconds", 0.5, "--warm-up", 0.1, *load
        )
    assert status == 0, err
    assert "3 rows a message" in out


async def test_failed_calls_are_counted_and_named() -> None:
    async def refuse(*_: object) -> None:
        if len(server.requests) % 3 == 0:  # not the first
            raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")

    async with FakeServer(on_request=refuse) as server:
        status, out, err = await bench("m", "-s", server.address, "--callers", 1, "--seconds", 0.2, "--warm-up", 0)
    assert status == 1
    assert "no such thing" in err.splitlines()[-1]
    assert "1 row a call, 1 caller" in out


@pytest.mark.parametrize("mode", ["unary", "stream"])
async def test_a_server_that_refuses_everything_is_not_measured(mode: str) -> None:
    async def refuse(*_: object) -> None:
        raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")

    async with FakeServer(on_request=refuse) as server:
        status, out, err = await bench("m", "-s", server.address, "--mode", mode)
    assert (status, out) == (1, "")
    assert "no such thing" in err.splitlines()[-1]


async def test_rows_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float32))
    async with FakeServer() as server:
        status, _, err = await bench(
            "m", tmp_path / "x.npy", "-s", server.address, "--rows", 4, "--callers", 1, "--seconds", 0.2, "--warm-up", 0
        )
        sent = {tuple(decode(tensor).tolist()) for request in server.requests for tensor in request.inputs}
    assert status == 0, err
    assert sent == {(0.0, 1.0, 2.0, 3.0)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nope"], "nope"),
        (["m", "--rows", 0], "rows must be at least 1"),
        (["m", "--rate", -1], "--rate must be above 0"),
        (["m", "--seconds", 0], "seconds must be above 0"),
        (["m", "--picture", "x.txt"], ".png, .svg, .pdf"),
        (["m", "--json", "nowhere/x.json"], "nowhere/x.json: there is no such folder"),
        (["m", "--signature", "other"], "no signature 'other'"),
        (["m", "missing.npy"], "no such file"),
    ],
)
async def test_mistakes_get_one_line(arguments: list[object], text: str) -> None:
    async with FakeServer() as server:
        status, out, err = await bench(*arguments, "-s", server.address)
    assert (status, out) == (1, "")
    assert text in err
    assert len(err.splitlines()) == 1


async def test_what_a_model_takes_can_not_always_be_made_up() -> None:
    async with FakeServer(sign=signature([spec("text", "string", -1)], [spec("y", "float32", -1)])) as server:
        status, _, err = await bench("m", "-s", server.address)
    assert status == 1
    assert "give a file of rows" in err


def test_random_inputs_have_the_shapes_and_types_of_the_signature() -> None:
    inputs = (
        TensorInfo(name="a", dtype="uint8", shape=(None, 2, 3)),
        TensorInfo(name="b", dtype="float16", shape=(None,)),
    )
    made = random_inputs(SignatureInfo(name="f", inputs=inputs, outputs=(), batched=True))
    assert {name: (array.dtype.name, array.shape[1:]) for name, array in made.items()} == {
        "a": ("uint8", (2, 3)),
        "b": ("float16", ()),
    }
    with pytest.raises(InputError, match="give a file"):
        random_inputs(SignatureInfo(name="f", inputs=inputs, outputs=(), batched=False))
