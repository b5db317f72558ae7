"""Keeps those who answer calls off the cores on which versions are made ready, while they have no need of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Set
from pathlib import Path
from time import clock_gettime, monotonic

_log = logging.getLogger(__name__)

_LOOK_S = 0.05
_BUSY = 0.7
"""Above this share of the cores that are left to them, those who answer calls get all cores."""
_CALM = 0.5
_CALM_FOR_S = 1.0
_LONG_S = 0.005
"""Batches that take longer gain more from several cores than they lose by waiting for a tick of the kernel's clock."""
_WINDOW_S = 5.0
_PROCESS_CLOCK = 2  # CPUCLOCK_SCHED, <linux/posix-timers.h>


class Longest:
    """The longest of the batches that ended within the last few seconds.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._now_s = self._before_s = 0.0

    def add(self, seconds: float) -> None:
        """Counts a batch."""
        self._turn()
        self._now_s = max(seconds, self._now_s)

    def get(self) -> float:
        """Returns how long it took, in seconds; 0 for none."""
        self._turn()
        return max(self._now_s, self._before_s)

    def _turn(self) -> None:
        passed_s = self._clock() - self._began_s
        if passed_s >= _WINDOW_S:
            self._before_s = self._now_s if passed_s < 2 * _WINDOW_S else 0.0
            self._now_s = 0.0
            self._began_s += passed_s


class CoreSharing:
    """Divides the cores between this process with its engines and the versions that are being made ready.

    A kernel that preempts lazily may wake up a thread on a core where something unimportant computes, and let
    it wait there for the next tick. So who answers calls is moved to the other cores: as long as a version
    that is being made ready keeps off some, these are enough, and batches are so short that a tick matters. Needs
    no rights beyond those over its own processes; where it may not move them, all stay where they are.
    """

    def __init__(self) -> None:
        self._all: Set[int] = os.sched_getaffinity(0)
        self._loading: set[int] = set()
        self._serving: dict[int, Longest] = {os.getpid(): Longest()}
        self._task: asyncio.Task[None] | None = None
        self._refused = False

    def load(self, pid: int) -> None:
        """Counts an engine process as one that makes a version ready."""
        self._loading.add(pid)
        if self._task is None and len(self._all) > 1:
            self._task = asyncio.get_running_loop().create_task(self._share())
            self._task.add_done_callback(self._on_end)

    def serve(self, pid: int, longest: Longest) -> None:
        """Counts an engine process as one that answers calls.

        Args:
            pid: the process.
            longest: told of its batches.
        """
        self._loading.discard(pid)
        self._serving[pid] = longest

    def forget(self, pid: int) -> None:
        """Counts an engine process no more: it has ended."""
        self._loading.discard(pid)
        self._serving.pop(pid, None)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("cores can't be shared", exc_info=error)

    async def _share(self) -> None:
        placed: dict[int, Set[int]] = {}
        used, looked_at_s, calm_since_s = self._used(), monotonic(), 0.0
        try:
            while self._loading:
                await asyncio.sleep(_LOOK_S)
                before, used = used, self._used()
                passed_s, looked_at_s = monotonic() - looked_at_s, monotonic()
                free = self._all - frozenset().union(*map(_cores_of, self._loading))
                busy = sum(used[pid] - before.get(pid, used[pid]) for pid in used) / passed_s
                long = max(one.get() for one in self._serving.values()) > _LONG_S
                if not free or long or busy > _BUSY * len(free):
                    calm_since_s = 0.0
                elif not calm_since_s and busy < _CALM * len(free):
                    calm_since_s = looked_at_s
                calm = calm_since_s and looked_at_s - calm_since_s >= _CALM_FOR_S
                self._place(free if calm else self._all, placed)
        finally:
            self._place(self._all, placed)

    def _used(self) -> dict[int, float]:
        """Returns the processor time that each of those who answer calls has had, in seconds."""
        used: dict[int, float] = {}
        for pid in self._serving:
            with contextlib.suppress(OSError):
                used[pid] = clock_gettime(~pid << 3 | _PROCESS_CLOCK)  # as clock_getcpuclockid(3) of Linux makes it
        return used

    def _place(self, cores: Set[int], placed: dict[int, Set[int]]) -> None:
        """Moves to ``cores`` whoever is not there.

        Args:
            cores: where to.
            placed: where each process is; on all cores if it is not in there.
        """
        for pid in self._serving:
            if placed.get(pid, self._all) != cores and not self._refused:
                self._move(pid, cores)
                placed[pid] = cores

    def _move(self, pid: int, cores: Set[int]) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for entry in Path(f"/proc/{pid}/task").iterdir():
                try:
                    os.sched_setaffinity(int(entry.name), cores)
                except PermissionError as error:
                    self._refused = True
                    _log.info("calls and loading share all cores: %s", error.strerror)
                    return


def _cores_of(pid: int) -> Set[int]:
    try:
        return os.sched_getaffinity(pid)
    except ProcessLookupError:
        return frozenset()
