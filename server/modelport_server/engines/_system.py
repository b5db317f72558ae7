"""What an engine process asks of the kernel: an end with its parent, a low priority, and no network."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>, as the next two
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_OOM_SCORE = 500
_LOWEST = 19
CORES = "MODELPORT_CORES"
"""The environment variable that tells an engine process and the zygote which cores there are."""
_FED = 0.7
"""What has had a core for this share of the time is not starved."""


def live_under(parent: int) -> bool:
    """Ties this process to its parent, given by its pid; returns whether the parent is still there.

    From then on it ends with the parent, ignores what a terminal or a service manager sends to the whole
    group, and is preferred to the parent when memory runs out.
    """
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it is not in the terminal's group, and may write there
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    return os.getppid() == parent  # if not, it ended before the kernel was told


def take_cores() -> None:
    """Lets this process use the cores that the server began with, whatever the server itself keeps to just now."""
    if cores := os.environ.get(CORES):
        with suppress(OSError):  # those may be gone, or not its to use any more
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})


def adopt_descendants() -> bool:
    """Makes this process the parent of those whose own parent has ended; returns whether the kernel does that."""
    return bool(_libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def cpu_s() -> float:
    """Returns the processor time of all threads and of all children, in seconds."""
    ticks = 0
    for child in children():
        with suppress(OSError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime, see proc(5)
    times = os.times()  # after that: one that ends meanwhile is counted twice rather than not at all
    return time.process_time() + times.children_user + times.children_system + ticks / os.sysconf("SC_CLK_TCK")


class Priority:
    """Lowers this process's priority and raises it again, and keeps it off some cores meanwhile; its children's, too.

    Where the process may not raise it, only the work that it is given runs at the lowest priority, on
    threads that end with it; threads that the work makes keep the ordinary one. It may always go back to
    all cores.

    Args:
        cpu_clock: returns the processor time of all threads and children, in seconds.
        stays: never lower it: nobody is to be spared.
    """

    def __init__(self, cpu_clock: Callable[[], float] = cpu_s, *, stays: bool = False) -> None:
        self._cpu_clock = cpu_clock
        self._stays = stays
        self._ordinary = os.getpriority(os.PRIO_PROCESS, 0)
        self._cores = os.sched_getaffinity(0)
        self._can_return = self._try_on_a_thread()

    @property
    def can_return(self) -> bool:
        """Whether the whole process is lowered."""
        return self._can_return

    def _try_on_a_thread(self) -> bool:
        allowed: list[bool] = []

        def attempt() -> None:
            try:
                _set_priority(threading.get_native_id(), _LOWEST)
                _set_priority(threading.get_native_id(), self._ordinary)
                allowed.append(True)
            except OSError:
                return

        _join(threading.Thread(target=attempt, name="priority"))
        return bool(allowed)

    def lower(self) -> None:
        """Gives every thread the lowest priority and fewer cores; those that are made later inherit both."""
        if not self._stays:
            _set_all(_LOWEST if self._can_return else None, fewer_cores(self._cores))

    def restore(self) -> None:
        """Gives every thread the priority and the cores that the process began with."""
        _set_all(self._ordinary if self._can_return else None, self._cores)

    def run_on_all_cores(self, work: Callable[[], Result]) -> Result:
        """Returns what ``work`` returns, which is done on a thread that may use all cores, as may any that it makes.

        They keep them until the priority is lowered again.
        """
        return _on_a_thread(work, lambda: os.sched_setaffinity(0, self._cores))

    @contextmanager
    def raised_if_starved(self, after_s: float) -> Generator[None]:
        """Restores the priority once what is done within takes long for want of a core, and lowers it again at the end.

        As long as it has a core for most of the time, nobody more important keeps it from its end.

        Args:
            after_s: how long it may take until this is first looked at, in seconds; from then on four times as often.
        """
        over = threading.Event()

        def watch() -> None:
            wait_s, before_s = after_s, self._cpu_clock()
            while not over.wait(wait_s):
                now_s = self._cpu_clock()
                if now_s - before_s < _FED * wait_s:
                    self.restore()
                    return
                wait_s, before_s = after_s / 4, now_s

        watching = threading.Thread(target=watch, name="priority", daemon=True)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()
            self.lower()

    def run(self, work: Callable[[], Result]) -> Result:
        """Returns what ``work`` returns, which is done at the lowest priority unless that ``stays``."""
        return work() if self._can_return or self._stays else at_lowest_priority(work)


def at_lowest_priority(work: Callable[[], Result]) -> Result:
    """Returns what ``work`` returns, which is done on a thread of the lowest priority.

    A thread, because an unprivileged process that has lowered its priority can't raise it again.
    """
    return _on_a_thread(work, lambda: _set_priority(threading.get_native_id(), _LOWEST))


def _on_a_thread(work: Callable[[], Result], prepare: Callable[[], None]) -> Result:
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            prepare()
            results.append(work())
        except BaseException as error:  # it is raised again on the caller's thread
            errors.append(error)

    _join(threading.Thread(target=run, name="load", daemon=True))
    if errors:
        raise errors[0]
    return results[0]


def _join(thread: threading.Thread) -> None:
    thread.start()
    thread.join()


def _set_priority(thread: int, nice: int) -> None:
    os.setpriority(os.PRIO_PROCESS, thread, nice)


def threads(pid: int | None = None) -> list[int]:
    """Returns the ids of a process's threads; of this one's by default.

    Raises:
        FileNotFoundError: if there is no such process.
    """
    return [int(entry.name) for entry in Path(f"/proc/{pid or 'self'}/task").iterdir()]


def children(pid: int | None = None) -> list[int]:
    """Returns the ids of a process's children, of this one's by default; none if it is gone."""
    found: list[int] = []
    with suppress(OSError):
        for entry in Path(f"/proc/{pid or 'self'}/task").iterdir():
            with suppress(OSError):
                found += map(int, (entry / "children").read_text().split())
    return found


def _threads_of_all() -> list[int]:
    found = threads()
    for child in children():
        with suppress(OSError):
            found += threads(child)
    return found


def _set_all(nice: int | None, cores: Set[int]) -> None:
    for _ in range(2):  # one that was made meanwhile has its maker's priority, which may be the old one
        for thread in _threads_of_all():
            with suppress(ProcessLookupError):
                if nice is not None:
                    _set_priority(thread, nice)
                os.sched_setaffinity(thread, cores)


def fewer_cores(cores: Set[int]) -> Set[int]:
    """Returns the cores that work which can wait may use: a quarter of them, but at least one, is left to callers.

    Priority alone is not enough: a kernel that preempts lazily lets whatever computes go on until its next
    tick, for milliseconds, though somebody more important has woken up.
    """
    if len(cores) == 1:
        return cores
    return frozenset(sorted(cores)[max(1, len(cores) // 4) :])


# seccomp: <linux/filter.h>, <linux/seccomp.h>, <linux/audit.h>
_LOAD_WORD = 0x20
_JUMP_IF_EQUAL = 0x15
_JUMP_IF_AT_LEAST = 0x35
_RETURN = 0x06
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_X32_BIT = 0x40000000
_IO_URING_SETUP = 425  # the same everywhere
_SET_MODE_FILTER = 1
_ALL_THREADS = 1

_Architecture = tuple[int, int, int]
_ARCHITECTURES: dict[str, _Architecture] = {"x86_64": (0xC000003E, 41, 317), "aarch64": (0xC00000B7, 198, 277)}
"""The audit number, and the numbers of the system calls ``socket`` and ``seccomp``."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def close_network() -> str:
    """Keeps this process, and all that it starts, from making sockets other than local ones.

    ``socket`` fails with EACCES for every family but AF_UNIX, and io_uring, which could make sockets
    too, is not there. Nothing is killed for trying.

    Returns:
        Why it could not be done; empty if it was.
    """
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return f"not on {platform.machine()}"
    code = _instructions(architecture)
    program = _Program(len(code) // 8, code)
    libc = _libc()
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return os.strerror(ctypes.get_errno())
    if libc.syscall(architecture[2], _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(program)) != 0:
        return os.strerror(ctypes.get_errno())
    return ""


def _instructions(architecture: _Architecture) -> bytes:
    """Returns the filter: each line is (code, lines to skip if true, if false, operand)."""
    audit, socket_call, _ = architecture
    refuse = _REFUSE | errno.ENOSYS
    lines = [
        (_LOAD_WORD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 0, 7, audit),  # else the numbers mean other calls
        (_LOAD_WORD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_AT_LEAST, 5, 0, _X32_BIT),
        (_JUMP_IF_EQUAL, 4, 0, _IO_URING_SETUP),
        (_JUMP_IF_EQUAL, 0, 2, socket_call),
        (_LOAD_WORD, 0, 0, _FIRST_ARGUMENT_AT),
        (_JUMP_IF_EQUAL, 0, 2, socket.AF_UNIX),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _REFUSE | errno.EACCES),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
