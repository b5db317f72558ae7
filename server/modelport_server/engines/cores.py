"""Keeps those who answer calls off the cores on which versions are made ready, while they have no need of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Generator, Mapping, Set
from contextlib import contextmanager
from time import monotonic

from modelport_server.engines._system import fewer_cores, threads

_log = logging.getLogger(__name__)

_LOOK_S = 0.05
_BUSY = 1.5
"""With more calls under way than this, for each core that is left to them, those who answer get all cores."""
_BURST = 4.0
"""With so many they get them at once."""
_CALM = 1.2
_CALM_FOR_S = 1.0
_MEMORY = 0.8
"""The part of the average number of calls that is kept from one look to the next."""
_LONG_S = 0.005
"""Longer batches may gain more from several cores than they lose by waiting for a tick of the kernel's clock."""
_WIDE = 1.25
"""They do if they keep more cores busy than this, for each core that they would be left with."""
_WIDTH_S = 0.1
"""How long batches have to have run in all until it is known how many cores they keep busy."""
_FADING = 0.98
"""The part of what was seen of earlier batches that is kept from one to the next."""
_WINDOW_S = 5.0


class BatchTimes:
    """How long an engine's batches take, and how many cores they keep busy.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._now = self._before = (0.0, 0.0)
        self._long_s = self._long_cpu_s = 0.0
        self.confined = False
        """Whether the engine has fewer cores than there are: then nothing shows how many it would use."""

    def add(self, seconds: float, cpu_s: float, busy_s: float | None = None) -> None:
        """Counts a batch.

        Args:
            seconds: how long it took.
            cpu_s: the processor time of all threads.
            busy_s: its part of the time in which the engine was busy: less if others ran at the same time. None: all
                of it.
        """
        self._turn()
        total, squares = self._now
        self._now = (total + seconds, squares + seconds * seconds)
        if seconds > _LONG_S and not self.confined:
            self._long_s = _FADING * self._long_s + (seconds if busy_s is None else busy_s)
            self._long_cpu_s = _FADING * self._long_cpu_s + cpu_s

    def gain(self, cores: int) -> bool:
        """Returns whether batches gain more from all cores than they lose by a tick, which ``cores`` would spare them.

        Long ones do, unless they are known to keep no more cores busy than that.
        """
        if self.typical() <= _LONG_S:
            return False
        return self._long_s < _WIDTH_S or self._long_cpu_s > _WIDE * cores * self._long_s

    def typical(self) -> float:
        """Returns the mean, in seconds, each batch weighted by what it took; 0 for none.

        So a few long ones among many short ones count, and a single hiccup does not.
        """
        self._turn()
        total, squares = (now + before for now, before in zip(self._now, self._before, strict=True))
        return squares / total if total else 0.0

    def _turn(self) -> None:
        passed_s = self._clock() - self._began_s
        if passed_s >= _WINDOW_S:
            self._before = self._now if passed_s < 2 * _WINDOW_S else (0.0, 0.0)
            self._now = (0.0, 0.0)
            self._began_s += passed_s


class Calm:
    """Whether those who answer have been content with a few cores for a while.

    Args:
        calls: how many calls are under way.
        now_s: the time, in seconds.
    """

    def __init__(self, calls: int, now_s: float) -> None:
        self._average = float(calls)
        self._since_s: float | None = now_s - _CALM_FOR_S  # until something says otherwise

    def look(self, calls: int, cores: int, *, gain: bool, now_s: float) -> bool:
        """Returns whether it is calm, as of a look that comes every ``_LOOK_S``.

        Args:
            calls: how many calls are under way.
            cores: how many cores those who answer would be left with.
            gain: whether their batches gain from more.
            now_s: the time, in seconds.
        """
        self._average = _MEMORY * self._average + (1 - _MEMORY) * calls
        if not cores or gain or self._average > _BUSY * cores or calls > _BURST * cores:
            self._since_s = None
        elif self._since_s is None and self._average < _CALM * cores:
            self._since_s = now_s
        return self._since_s is not None and now_s - self._since_s >= _CALM_FOR_S


class CoreSharing:
    """Divides the cores between this process with its engines and work that nobody waits for.

    Such work are versions that are being made ready, that get nothing but copies of calls, or that are measured.

    A kernel that preempts lazily may wake up a thread on a core where something unimportant computes, and let
    it wait there for the next tick. So who answers calls is moved to the other cores: as long as the others keep
    off some, these are enough, and their batches so short that a tick matters, or without use for more cores.
    Versions that are being made ready keep off some by themselves; those that get copies, or are measured
    beside those who answer, are moved, to as many cores as these have. Needs no rights beyond those over its own
    processes; where it may not move them, all stay where they are.

    Args:
        calls: returns how many calls are under way.
    """

    def __init__(self, calls: Callable[[], int]) -> None:
        self._calls = calls
        self._all: Set[int] = os.sched_getaffinity(0)
        self._loading: set[int] = set()
        self._copied_to: Set[int] = frozenset()
        self._measured: list[Callable[[], Set[int]]] = []
        self._serving: dict[int, BatchTimes] = {os.getpid(): BatchTimes()}
        self._task: asyncio.Task[None] | None = None
        self._over = len(self._all) == 1
        """Whether nobody is to be moved any more."""

    async def stop(self) -> None:
        """Moves everybody back, and nobody from then on."""
        self._over = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def load(self, pid: int) -> None:
        """Counts an engine process as one that makes a version ready."""
        self._loading.add(pid)
        self._begin()

    def copy_to(self, pids: Set[int]) -> None:
        """Says which of the engine processes that answer calls get nothing but copies for now."""
        self._copied_to = pids
        self._begin()

    @contextmanager
    def measuring(self, pids: Callable[[], Set[int]]) -> Generator[None]:
        """Counts engine processes within as ones that are measured and that nobody calls.

        Args:
            pids: returns them; asked again and again, because somebody may begin to call one.
        """
        self._measured.append(pids)
        self._begin()
        try:
            yield
        finally:
            self._measured.remove(pids)

    def _begin(self) -> None:
        if self._behind and self._task is None and not self._over:
            self._task = asyncio.get_running_loop().create_task(self._share())
            self._task.add_done_callback(self._on_end)

    @property
    def _behind(self) -> bool:
        return bool(self._loading or self._copied_to or self._measured)

    def serve(self, pid: int, times: BatchTimes) -> None:
        """Counts an engine process as one that answers calls.

        Args:
            pid: the process.
            times: told of its batches.
        """
        self._loading.discard(pid)
        self._serving[pid] = times

    def forget(self, pid: int) -> None:
        """Counts an engine process no more: it has ended."""
        self._loading.discard(pid)
        self._serving.pop(pid, None)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            _log.error("cores can't be shared", exc_info=error)
            return
        self._begin()  # for one that has begun to load this moment

    async def _share(self) -> None:
        placed: dict[int, Set[int]] = {}
        calm = Calm(self._calls(), monotonic())
        try:
            while self._behind and not self._over:
                await asyncio.sleep(_LOOK_S)
                aside = frozenset(self._copied_to).union(*(pids() for pids in self._measured))
                taken: Set[int] = fewer_cores(self._all) if aside else frozenset()
                free = self._all - taken - frozenset().union(*map(_cores_of, self._loading))
                answering = [times for pid, times in self._serving.items() if pid not in aside]
                gain = any(times.gain(len(free)) for times in answering)
                if calm.look(self._calls(), len(free), gain=gain, now_s=monotonic()):
                    beside = frozenset(sorted(taken)[-len(free) :])
                    self._place({pid: beside if pid in aside else free for pid in self._serving}, placed)
                else:
                    self._place({}, placed)
        finally:
            self._place({}, placed)

    def _place(self, wanted: Mapping[int, Set[int]], placed: dict[int, Set[int]]) -> None:
        """Moves whoever is not where it should be.

        Args:
            wanted: the cores of each process; all of them if it is not in there.
            placed: where each process is, likewise.
        """
        for pid, times in self._serving.items():
            cores = wanted.get(pid, self._all)
            if placed.get(pid, self._all) != cores:
                self._move(pid, cores)
                placed[pid] = cores
                times.confined = cores != self._all

    def _move(self, pid: int, cores: Set[int]) -> None:
        try:
            for _ in range(2):  # one that was made meanwhile may have the cores that its maker had
                for thread in threads(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(thread, cores)
        except FileNotFoundError:
            return  # it has ended
        except OSError as error:
            self._over = True
            _log.info("calls and loading share all cores: %s", error.strerror)


def _cores_of(pid: int) -> Set[int]:
    try:
        return os.sched_getaffinity(pid)
    except ProcessLookupError:
        return frozenset()
