"""The command line as people run it: a process, against a real gRPC server."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.support.fake_server import FakeServer, signature, spec

MODELPORT = [sys.executable, "-c", "from modelport.cli import main; main()"]


def classify(inputs: Any, version: int) -> Any:
    images = inputs["images"]
    means = images.mean((1, 2), dtype=np.float32) / 255
    return {"probabilities": np.stack([means, 1 - means], 1), "classes": images[:, 0, 0].astype(np.int64)}


def classifier(**settings: Any) -> FakeServer:
    inputs = [spec("images", "uint8", -1, 4, 3)]
    outputs = [spec("probabilities", "float32", -1, 2), spec("classes", "int64", -1)]
    return FakeServer(sign=signature(inputs, outputs), run=classify, **settings)


def images(rows: int) -> np.ndarray[Any, Any]:
    return np.arange(rows * 12, dtype=np.uint32).reshape(rows, 4, 3).astype(np.uint8)


class Ran:
    def __init__(self, status: int | None, out: bytes, err: bytes) -> None:
        self.status = status
        self.out = out.decode()
        self.err = err.decode()


async def modelport(*arguments: object, environment: dict[str, str] | None = None) -> Ran:
    process = await asyncio.create_subprocess_exec(
        *MODELPORT,
        *map(str, arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "120", **(environment or {})},
    )
    out, err = await process.communicate()
    return Ran(process.returncode, out, err)


async def test_help_lists_the_commands_and_their_help_has_examples() -> None:
    shown = await modelport("--help")
    assert shown.status == 0
    assert "predict" in shown.out
    assert "status" in shown.out
    for command in ("predict", "status"):
        assert f"modelport {command}" in (await modelport(command, "--help")).out
    version = await modelport("--version")
    assert version.out.startswith("modelport ")
    nothing = await modelport()
    assert "Usage" in nothing.out + nothing.err


async def test_an_unknown_command_is_a_usage_error() -> None:
    ran = await modelport("fly")
    assert ran.status == 2
    assert "No such command 'fly'" in ran.err


async def test_idx_to_npz(tmp_path: Path) -> None:
    rows = images(500)
    head = struct.pack(">BBBB3I", 0, 0, 8, 3, *rows.shape)
    (tmp_path / "images.gz").write_bytes(gzip.compress(head + rows.tobytes()))
    async with classifier() as server:
        ran = await modelport(
            "predict", "m", tmp_path / "images.gz", "-o", tmp_path / "o.npz", "-s", server.address, "--batch-size", 64
        )
    assert (ran.status, ran.out) == (0, "")
    assert "500 rows in" in ran.err
    assert "version 1" in ran.err
    assert len(server.requests) == 8
    with np.load(tmp_path / "o.npz") as file:
        np.testing.assert_array_equal(file["classes"], rows[:, 0, 0])
        assert file["probabilities"].shape == (500, 2)


@pytest.mark.parametrize("output", ["classes.npy", "o.jsonl", "o.csv"])
async def test_other_outputs(tmp_path: Path, output: str) -> None:
    np.save(tmp_path / "x.npy", images(10))
    async with classifier() as server:
        ran = await modelport(
            "predict", "m", tmp_path / "x.npy", "-o", tmp_path / output, "--outputs", "classes", "--progress",
            environment={"MODELPORT_SERVER": server.address},
        )  # fmt: skip
    assert ran.status == 0, ran.err
    assert "10/10" in ran.err
    expected = images(10)[:, 0, 0].tolist()
    if output.endswith(".npy"):
        assert np.load(tmp_path / output).tolist() == expected
    elif output.endswith(".csv"):
        assert (tmp_path / output).read_text().split() == ["classes", *map(str, expected)]
    else:
        lines = (tmp_path / output).read_text().splitlines()
        assert [json.loads(line)["classes"] for line in lines] == expected


async def test_a_table_is_the_default(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(30))
    async with classifier(versions={1, 2}, aliases={"beta": 2}) as server:
        ran = await modelport("predict", "m", tmp_path / "x.npy", "-s", server.address, "--alias", "beta")
    assert ran.status == 0
    assert "probabilities" in ran.out
    assert len(ran.out.splitlines()) == 14
    assert "30 rows" in ran.err
    assert "version 2" in ran.err


async def test_a_model_without_rows_gets_one_call(tmp_path: Path) -> None:
    sign = signature([spec("a", "float32"), spec("b", "float32", 2)], [spec("y", "float32", 2)], batched=False)
    np.savez(tmp_path / "ab.npz", a=np.float32(2), b=np.array([1, 2], np.float32))
    async with FakeServer(sign=sign, run=lambda inputs, version: {"y": inputs["a"] * inputs["b"]}) as server:
        at = ("-s", server.address)
        ran = await modelport("predict", "m", tmp_path / "ab.npz", "-o", tmp_path / "y.npy", *at)
        shown = await modelport("predict", "m", tmp_path / "ab.npz", "--format", "jsonl", *at)
    assert ran.status == 0, ran.err
    assert np.load(tmp_path / "y.npy").tolist() == [2, 4]
    assert json.loads(shown.out) == {"y": [2.0, 4.0]}


async def test_more_rows_than_fit_stream_through(tmp_path: Path) -> None:
    source = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.uint8, (400_000, 4, 3))
    source[:, 0, 0] = np.arange(400_000) % 251
    source.flush()
    async with classifier() as server:
        ran = await modelport("predict", "m", tmp_path / "big.npy", "-o", tmp_path / "o.npz", "-s", server.address)
    assert ran.status == 0, ran.err
    assert "400,000 rows" in ran.err
    with np.load(tmp_path / "o.npz") as file:
        np.testing.assert_array_equal(file["classes"], np.arange(400_000) % 251)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["predict", "n", "x.npy"], "error: there is no model 'n'"),
        (["predict", "m", "none.npy"], "none.npy: there is no such file"),
        (["predict", "m", "x.npy", "--version", "9"], "error: the server has no version 9 of m"),
        (["predict", "m", "x.npy", "--version", "1", "--alias", "a"], "error: give a version or an alias, not both"),
        (["predict", "m", "x.npy", "-o", "o.xyz"], "say what to write with --format"),
        (["predict", "m", "x.npy", "--signature", "s"], "has no signature 's'"),
        (["predict", "m", "x.npy", "--server", "here"], "error: 'here' is not an address"),
        (["status", "n"], "error: there is no model 'n'"),
        (["predict", "m", "x.npy", "--local", "--registry", "nowhere"], "error: "),
    ],
)
async def test_mistakes_get_one_line_and_status_1(tmp_path: Path, arguments: Sequence[str], text: str) -> None:
    np.save(tmp_path / "x.npy", images(3))
    placed = [str(tmp_path / a) if a.endswith(".npy") else a for a in arguments]
    async with classifier() as server:
        ran = await modelport(*placed, environment={"MODELPORT_SERVER": server.address})
    assert ran.status == 1
    assert text in ran.err
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert ran.out == ""


async def test_nobody_there() -> None:
    async with FakeServer() as server:
        pass
    ran = await modelport("status", "-s", server.address)
    assert ran.status == 1
    assert ran.err.strip().startswith(f"error: no server answers at {server.address} (connection refused)")


async def test_status_shows_what_the_server_says() -> None:
    async with FakeServer(versions={1, 2}, serving=2, aliases={"stable": 2}) as server:
        table = await modelport("status", "--server", server.address)
        document = await modelport("status", "m", "--json", "--server", server.address)
    assert "serves version 2" in table.out
    assert "stable" in table.out
    assert "accuracy 0.5" in table.out
    (model,) = json.loads(document.out)
    assert model["serving_version"] == 2
    assert [v["state"] for v in model["versions"]] == ["available", "available"]
    assert model["versions"][0]["signatures"]["serving_default"]["inputs"][0]["name"] == "x"


async def test_status_watches_until_it_is_interrupted() -> None:
    async with FakeServer() as server:
        process = await asyncio.create_subprocess_exec(
            *MODELPORT, "status", "--watch", "--json", "-s", server.address, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert json.loads(await process.stdout.readline())["serving_version"] == 1
        server.publish(2)
        await server.model_changed()
        assert json.loads(await process.stdout.readline())["serving_version"] == 2
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        await process.communicate()


async def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(200_000))
    async with classifier() as server:
        command = [*MODELPORT, "predict", "m", str(tmp_path / "x.npy"), "--format", "jsonl", "-s", server.address]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        await process.stdout.readline()
        cast("Any", process)._transport.get_pipe_transport(1).close()
        _, err = await process.communicate()
    assert b"Traceback" not in err
    assert process.returncode == 1


async def test_without_typer_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    ran = await modelport("--help", environment={"PYTHONPATH": str(tmp_path)})
    assert ran.status == 1
    assert ran.err.strip() == "the command line needs: pip install 'modelport[cli]'"
