"""The process that engine processes are forked from: it has imported TensorFlow and does nothing else.

Started by ``modelport_server.engines.ahead``; the command line gives the front's pid and the
socket pair's end. The front sends ``fork`` with the file descriptors of an engine process, and the
zygote answers ``forked`` with its pid, or ``failed``.

An engine process is forked twice over, and the process between the two ends at once, so that
the front, which adopts its descendants, becomes the engine's parent. Then the front waits for it as for
any child, and an engine lives on when the zygote dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Never

from modelport_server.engines import _messages as messages
from modelport_server.engines._system import at_lowest_priority, live_under, take_cores, threads
from modelport_server.engines.ahead import IN_HASTE
from modelport_server.engines.worker import preload, run_engine

MAX_FDS = 253
"""As many as the kernel puts into one message (SCM_MAX_FD); an engine process takes two and more for each instance."""
_ADOPTION_POLL_S = 0.0002
_ENDING_S = 1.0
_ENDING_POLL_S = 0.001


class Zygote:
    """Forks engine processes as the front asks.

    Args:
        front: the front's pid.
        control: the socket pair's end.
        in_haste: whether it may import at the ordinary priority, because nobody is served yet.
    """

    def __init__(self, front: int, control: socket.socket, *, in_haste: bool = False) -> None:
        self._front = front
        self._control = control
        self._in_haste = in_haste

    def serve(self) -> None:
        """Imports what engines need, then forks until the front is gone."""
        started = time.monotonic()
        if self._in_haste:
            preload()
        else:
            at_lowest_priority(preload)
        if (count := _settled_threads()) > 1:  # a lock that one of them holds would stay locked in every engine
            self._say({"op": "unusable", "reason": f"importing it leaves {count} threads"})
            return
        gc.collect()
        gc.freeze()  # else the collector writes to every object, and shared pages become private ones
        self._say({"op": "ready", "seconds": time.monotonic() - started})
        while (request := self._receive()) is not None:
            number, fds = request
            try:
                pid = self._fork(fds)
                self._say({"op": "forked", "id": number, "pid": pid})
            except OSError as error:
                self._say({"op": "failed", "id": number, "reason": str(error)})
            finally:
                for fd in fds:
                    os.close(fd)

    def _say(self, message: messages.Message) -> None:
        self._control.send(messages.pack(message))

    def _receive(self) -> tuple[int, list[int]] | None:
        packet, fds, _, _ = socket.recv_fds(self._control, messages.MAX_MESSAGE_BYTES, MAX_FDS)
        return (int(messages.unpack(packet)["id"]), fds) if packet else None

    def _fork(self, fds: list[int]) -> int:
        """Starts an engine process and returns its pid once it is the front's child."""
        said, says = os.pipe()
        with os.fdopen(said, "rb", 0) as report, os.fdopen(says, "wb", 0) as theirs:
            middle = os.fork()
            if middle == 0:
                os.close(said)
                self._fork_engine(fds, says)
            theirs.close()
            text = report.read(32)
            _, status = os.waitpid(middle, 0)
        if not text and os.WIFSIGNALED(status):  # it may have forked one, which the front ends with this group
            sys.exit("the process that forks an engine process was killed")
        if not text:
            raise OSError("the engine process can't be forked")
        engine = int(text)
        if _parent(engine) != self._front:
            os.kill(engine, signal.SIGKILL)
            raise OSError("the kernel did not make the engine process the server's child")
        return engine

    def _fork_engine(self, fds: list[int], says: int) -> Never:
        """Goes on as the process between, which ends at once, and as the engine process."""
        with _no_way_back():
            middle = os.getpid()
            engine = os.fork()
            if engine:
                with contextlib.suppress(BrokenPipeError):  # the zygote was killed just now; so is the engine
                    os.write(says, str(engine).encode())
                os._exit(0)
            os.close(says)
            self._control.close()
            rename("zygote")
            while os.getppid() == middle:
                time.sleep(_ADOPTION_POLL_S)
            run_engine(self._front, fds)


def _settled_threads() -> int:
    """Returns how many threads there are, once those that are just ending are gone."""
    deadline = time.monotonic() + _ENDING_S
    while (count := len(threads())) > 1 and time.monotonic() < deadline:
        time.sleep(_ENDING_POLL_S)
    return count


def _parent(pid: int) -> int:
    """Returns the parent of a process, from the second field after its name in brackets."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def _no_way_back() -> Generator[None]:
    """Ends the process where its work ends: what called it is the zygote's."""
    try:
        yield
    except BaseException:  # it has nowhere else to go
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def rename(module: str) -> None:
    """Shows this process as an engine process to those who list processes.

    Args:
        module: what it was started as; its name has six letters, as ``worker``.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, see proc(5)
    old, new = f"engines.{module}".encode(), b"engines.worker"
    at = ctypes.string_at(start, end - start).find(old) if start else -1
    if at >= 0:
        ctypes.memmove(start + at, new, len(new))


def main() -> None:
    """Runs a zygote; the arguments are the front's pid and a file descriptor."""
    front, fd = (int(argument) for argument in sys.argv[1:])
    if not live_under(front):
        return
    take_cores()
    control = socket.socket(fileno=fd)
    with contextlib.suppress(ConnectionError):
        Zygote(front, control, in_haste=IN_HASTE in os.environ).serve()


if __name__ == "__main__":
    main()
