"""A process that publishes, collects or rolls out on command, in children that a tracer can attach to first.

It speaks lines of JSON on standard input and output: ``{"root": ..., "action": ...}`` forks a child and answers
its pid; ``{}`` lets the child do it, and answers how it ended. Everything is imported and run once before the first
fork, so that a child makes no system calls but those of its action.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modelport_registry import Golden, Registry, RegistryError
from tests.support.saved_models import SERVING_DEFAULT

MODEL = "digits"

PUBLISHED = 0
REFUSED = 3
BROKEN = 4


def golden() -> Golden:
    """Returns examples for ``ROW_DOUBLER``."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    return Golden(SERVING_DEFAULT, {"x": x}, {"y": x * 2})


def publish(root: Path, source: Path, report: Path) -> None:
    """Publishes one version with everything that a version can have."""
    Registry(root).publish(
        MODEL, source, golden=[golden()], metrics={"accuracy": 0.5}, report=report, aliases=["stable"]
    )


def prepare(root: Path, source: Path, report: Path) -> None:
    """Makes a registry whose first version is in charge, so that each action has something to do."""
    for _ in range(2):
        publish(root, source, report)
    Registry(root).set_alias(MODEL, "stable", 1)


def collect(root: Path) -> None:
    """Collects everything but the highest version and what aliases point at."""
    Registry(root).collect_garbage(MODEL, keep=1, staging_age_s=0)


def roll_out(root: Path) -> None:
    """Makes the highest version the candidate, in place of the one in charge."""
    registry = Registry(root)
    registry.unpin(MODEL)
    registry.start_rollout(MODEL, registry.versions(MODEL)[-1], reason="a test")


def _child(act: Callable[[], None], max_file_bytes: int | None) -> None:
    code = BROKEN
    try:
        signal.sigwait({signal.SIGUSR1})
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        try:
            act()
        except RegistryError as exc:
            code = REFUSED if "\n" not in str(exc) else BROKEN
        else:
            code = PUBLISHED
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    source, report = Path(sys.argv[1]), Path(sys.argv[2])

    def actions(root: Path) -> dict[str, Callable[[], None]]:
        return {
            "roll out": partial(roll_out, root),
            "publish": partial(publish, root, source, report),
            "collect": partial(collect, root),
        }

    with tempfile.TemporaryDirectory() as warm_up:
        prepare(Path(warm_up), source, report)
        for action in actions(Path(warm_up)).values():
            action()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            act = actions(Path(request["root"]))[request["action"]]
            _child(act, request.get("max_file_bytes"))
        print(json.dumps(pid), flush=True)
        sys.stdin.readline()
        os.kill(pid, signal.SIGUSR1)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
