"""A server with limits that the command line has no options for, or with an engine that is not TensorFlow.

``python -m tests.support.launch '{"engine": {"golden_timeout_s": 5}, "stub": false}' serve ...``: what comes
after the settings is what ``modelport`` takes. With ``stub`` the engine processes run
``tests.support.stub_engine``, whose folder is ``hold``, and their speed is measured for an instant only,
callers or not; with ``spare`` the machine always has a core to spare, whatever else it does. Everything else is what it
always is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modelport.cli import main as modelport
from modelport_server import options
from modelport_server.engines import ahead, spawner
from modelport_server.gates.result import GateResult
from modelport_server.gates.speed import compare_speed
from modelport_server.rollout import model
from modelport_server.rollout.spare import SpareTime
from tests.support.stub_engine import HOLD

_SPEED_S = 0.01
"""What a stub's speed is measured for: all are alike, and thousands of seconds would be lost."""


def program(*, stub: bool = False, hold: Path | None = None, spare: bool = False, **engine: Any) -> tuple[str, ...]:
    """Returns what ``run_server`` takes as program for engines with these limits."""
    settings = {"engine": engine, "stub": stub, "hold": str(hold or ""), "spare": spare}
    return "tests.support.launch", json.dumps(settings)


def run_stub(
    module: str, arguments: Sequence[int], fds: Sequence[int], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Runs a module of the engines' with ``StubEngine`` in it; takes the place of ``ahead.run_module``."""
    # The module's own name, because engine processes are known by it.
    command = [sys.executable, "-m", "tests.support.stub_engine", f"modelport_server.engines.{module}"]
    command += map(str, arguments)
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, env=environment, process_group=0)


def compare_speed_at_once(*versions: Any, **options: Any) -> Awaitable[GateResult]:
    """Takes the place of ``compare_speed`` where all versions are stubs."""
    return compare_speed(*versions, **options | {"budget_s": _SPEED_S, "has_callers": lambda: False})


def _always(spare: SpareTime) -> bool:
    return True


def main() -> None:
    """Runs ``modelport`` with the settings changed."""
    settings: dict[str, Any] = json.loads(sys.argv.pop(1))
    setattr(options, "EngineLimits", partial(options.EngineLimits, **settings["engine"]))  # noqa: B010
    if settings["stub"]:
        os.environ[HOLD] = settings["hold"]
        for module in (ahead, spawner):
            setattr(module, "run_module", run_stub)  # noqa: B010 - it is not ours
        setattr(model, "compare_speed", compare_speed_at_once)  # noqa: B010
    if settings["spare"]:
        setattr(SpareTime, "there_is", _always)  # noqa: B010
    modelport()


if __name__ == "__main__":
    main()
