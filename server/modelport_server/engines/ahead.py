"""Processes that are begun before the server itself is there, so that they import what takes long meanwhile.

It imports little itself: it runs before anything else of the server is imported.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from modelport_server.engines._system import CORES

ALL_CORES = sorted(os.sched_getaffinity(0))
"""Those that the server begins with; later it may keep to some of them."""
IN_HASTE = "MODELPORT_IN_HASTE"
"""The environment variable that tells a zygote to import at the ordinary priority: nobody is served yet."""

PRIMED = b"."
"""What an engine process that was begun ahead says once it has imported OpenVINO, and what it is then told, with the
file descriptors."""


def run_module(
    module: str, arguments: Sequence[int], fds: Sequence[int], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Starts a module of this package in a process that leads a group of its own.

    Raises:
        OSError: if it can't be started.
    """
    # -P: what lies in the folder that the server was started in must not be imported.
    command = [sys.executable, "-P", "-m", f"modelport_server.engines.{module}", *map(str, arguments)]
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, **environment, CORES: ",".join(map(str, ALL_CORES))}
    return subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, env=environment, process_group=0)


@dataclass(frozen=True, slots=True)
class Begun:
    """A process that waits for file descriptors, and this one's end of the socket pair over which it gets them."""

    process: subprocess.Popen[bytes]
    control: socket.socket

    def end(self) -> None:
        """Ends it at once."""
        self.control.close()
        self.process.kill()
        self.process.wait()


def begin_zygote(*, in_haste: bool = False) -> Begun:
    """Starts a process that imports TensorFlow and from which engine processes are forked.

    Args:
        in_haste: import it at the ordinary priority, because nobody is served yet.

    Raises:
        OSError: if it can't be started.
    """
    # One thread, because what forks must have no other.
    return _begin("zygote", {"OPENBLAS_NUM_THREADS": "1"} | ({IN_HASTE: "1"} if in_haste else {}))


def begin_primed() -> Begun:
    """Starts an engine process that imports OpenVINO before it is told what to load.

    Raises:
        OSError: if it can't be started.
    """
    return _begin("primed", {})


def _begin(module: str, environment: Mapping[str, str]) -> Begun:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            process = run_module(module, [os.getpid(), theirs.fileno()], [theirs.fileno()], environment)
    except OSError:
        ours.close()
        raise
    ours.setblocking(False)
    return Begun(process, ours)


@dataclass(slots=True)
class Ahead:
    """What has been begun and not been taken yet."""

    zygote: Begun | None = None
    primed: Begun | None = None

    def take_zygote(self) -> Begun | None:
        """Returns the zygote, which is the caller's from now on; None if there is none."""
        taken, self.zygote = self.zygote, None
        return taken

    def take_primed(self) -> Begun | None:
        """Returns the engine process, which is the caller's from now on; None if there is none."""
        taken, self.primed = self.primed, None
        return taken

    def end_zygote(self) -> None:
        """Ends the zygote, if nobody has taken it."""
        if (zygote := self.take_zygote()) is not None:
            zygote.end()

    def end(self) -> None:
        """Ends what nobody has taken."""
        self.end_zygote()
        if (primed := self.take_primed()) is not None:
            primed.end()


@contextmanager
def begun(*, zygote: bool, primed: bool) -> Generator[Ahead]:
    """Begins what a server will need that serves nobody yet; at the end ends what it has not taken."""
    ahead = Ahead()
    try:
        with suppress(OSError):  # the server tries again, and says what is wrong
            if zygote:
                ahead.zygote = begin_zygote(in_haste=True)
            if primed:
                ahead.primed = begin_primed()
        yield ahead
    finally:
        ahead.end()
