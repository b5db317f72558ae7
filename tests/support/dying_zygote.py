"""A zygote without TensorFlow, in which somebody is killed at the worst moment.

Run as ``python -m tests.support.dying_zygote WHO FILE FRONT FD``. WHO is ``zygote``, killed before it replies,
``between``, the process between it and the engine, killed before it says which process the engine is, or
``nobody``. FILE then has the pid of the engine that the front does not hear of.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelport_server.engines import worker, zygote


def _die(engine: object, file: Path) -> None:
    file.write_text(str(engine))
    os.kill(os.getpid(), signal.SIGKILL)


def _no_write(file: Path) -> Callable[[int, bytes], None]:
    return lambda fd, data: _die(data.decode(), file)


def _import_nothing(_: str) -> None:
    """It forks nothing that would need a library."""


def main() -> None:
    """Runs the real zygote."""
    who, file = sys.argv[1], Path(sys.argv[2])
    del sys.argv[1:3]
    one: Any = zygote.Zygote
    say = one._say

    def reply(self: object, message: dict[str, Any]) -> None:
        if message["op"] == "forked" and who == "zygote":
            _die(message["pid"], file)
        say(self, message)

    one._say = reply
    if who == "between":
        setattr(os, "write", _no_write(file))  # noqa: B010 - it is not ours
    setattr(worker, "_import_engine", _import_nothing)  # noqa: B010
    zygote.main()


if __name__ == "__main__":
    main()
