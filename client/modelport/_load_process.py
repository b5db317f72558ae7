"""A process that puts load on a server, for ``modelport bench``.

Started as ``python -m modelport._load_process FOLDER NUMBER``. ``FOLDER`` holds ``inputs.npz`` and ``load.json``; the
process says ``ready`` once the model has answered it, waits for a line, puts the load on, and prints one JSON line
of what it measured; the latencies, in seconds, lie in ``FOLDER/NUMBER.npy``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from modelport import AsyncClient, ModelportError
from modelport._load import INPUT, Driver, Load


def main() -> None:
    """Runs the process."""
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    try:
        asyncio.run(_run(folder, number))
    except ModelportError as error:
        print(json.dumps({"failed": str(error)}), flush=True)


async def _run(folder: Path, number: int) -> None:
    document: dict[str, Any] = json.loads((folder / "load.json").read_text())
    with np.load(folder / "inputs.npz", allow_pickle=False) as file:
        inputs = {name.removeprefix(INPUT): file[name] for name in file}
    load = Load(**document["loads"][number] | {"outputs": tuple(document["loads"][number]["outputs"])})
    async with AsyncClient(document["server"]) as client:
        driver = Driver(client, load, inputs)
        await driver.call_once()
        gc.collect()
        gc.freeze()
        print("ready", flush=True)
        if not await asyncio.to_thread(sys.stdin.readline):
            return  # nobody wants it any more
        measured = await driver.run()
    np.save(folder / f"{number}.npy", np.array(measured.latencies_s))
    counts = {
        "answered": measured.answered,
        "errors": measured.errors,
        "not_sent": measured.not_sent,
        "cpu_s": measured.cpu_s,
    }
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
