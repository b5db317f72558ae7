"""Calls a model many times at once from asyncio; the server runs the rows of many calls together.

python examples/client_async.py MODEL
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import numpy as np

from modelport import AsyncClient, ModelportError

ADDRESS = os.environ.get("MODELPORT_SERVER", "127.0.0.1:8500")
CALLS = 500
AT_ONCE = 32


async def main() -> None:
    """Makes the calls and says how long they took."""
    model = sys.argv[1] if len(sys.argv) > 1 else "digits"
    async with AsyncClient(ADDRESS) as client:
        await client.wait_ready(timeout_s=10)
        info = await client.model(model)
        serving = next(v for v in info.versions if v.version == info.serving_version)
        (spec,) = serving.signatures["serving_default"].inputs
        row = np.zeros([1, *(size or 1 for size in (spec.shape or ())[1:])], spec.dtype)
        turns = asyncio.Semaphore(AT_ONCE)

        async def call() -> float:
            async with turns:
                started = time.perf_counter()
                await client.predict(model, {spec.name: row})
                return time.perf_counter() - started

        started = time.perf_counter()
        times_s = sorted(await asyncio.gather(*(call() for _ in range(CALLS))))
        elapsed_s = time.perf_counter() - started
    print(f"{CALLS / elapsed_s:.0f} calls/s, median {times_s[CALLS // 2] * 1000:.1f} ms")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except ModelportError as error:
        sys.exit(f"error: {error}")
