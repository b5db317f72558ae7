"""A front that loads one version twice, forked and by itself, and waits: ``python -m tests.support.engine_front``.

Its one line names the process ids of the zygote and of the two engine processes.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from modelport_server.engines.process import EngineProcess, LoadOrder
from modelport_server.engines.spawner import Spawner
from modelport_server.options import EngineLimits


async def _main() -> None:
    spawner = Spawner()
    spawner.start()
    order = LoadOrder(Path(sys.argv[1]), sys.argv[2], 1, 8)
    engines = [EngineProcess(EngineLimits(), lambda _: None, way) for way in (spawner, None)]
    for engine in engines:
        await engine.load(order)
    print(spawner.pid, *(engine.pid for engine in engines), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
