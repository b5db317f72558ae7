"""The code in ``docs/sdk.md`` and the client's examples run."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_client_cli import classify
from tests.support.fake_server import FakeServer, signature, spec

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "sdk.md").read_text(), re.MULTILINE | re.DOTALL)
USUAL = "127.0.0.1:8500"


def mnist() -> FakeServer:
    inputs = [spec("images", "uint8", -1, 28, 28)]
    outputs = [spec("probabilities", "float32", -1, 2), spec("classes", "int64", -1)]
    return FakeServer(name="mnist", sign=signature(inputs, outputs), run=classify)


async def started(code: str, folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    (folder / "code.py").write_text(code)
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "code.py",
        *arguments,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_the_document_has_code() -> None:
    assert len(BLOCKS) >= 7


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
async def test_the_documents_code_runs(block: str, tmp_path: Path) -> None:
    async with mnist() as server:
        process = await started(block.replace(USUAL, server.address), tmp_path)
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert err == b""


async def test_the_asynchronous_example(tmp_path: Path) -> None:
    async with mnist() as server:
        code = (ROOT / "examples" / "client_async.py").read_text().replace(USUAL, server.address)
        process = await started(code, tmp_path, "mnist")
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert b"calls/s, median" in out


async def test_the_stream_example_survives_a_restart(tmp_path: Path) -> None:
    async with mnist() as server:
        code = (ROOT / "examples" / "client_stream.py").read_text().replace(USUAL, server.address)
        process = await started(code, tmp_path, "mnist", "--follow")
        assert process.stdout is not None
        assert (await process.stdout.readline()).startswith(b"batch 0: answers by version {1: 1}")
        await server.kill()
        server.publish(2)
        await server.start()
        while b"2:" not in (line := await process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 130, err.decode()
