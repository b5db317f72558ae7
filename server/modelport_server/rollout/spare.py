"""Whether the machine has a core to spare."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic

_LEAST_LOOK_S = 0.2
_GOOD_FOR_S = 2.0
"""For how long what was seen holds; looks come several times a second, if nothing is wrong."""
_LEAST_SPARE_CORES = 0.5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class SpareTime:
    """Says how busy the machine was lately.

    What it is busy with on behalf of one process, given by its pid, counts as spare: it would be idle without it.
    To look takes so long that it is apart from asking, for which callers wait.

    Args:
        pid_of: returns the process that uses the spare time, which may be another one later; 0 for none.
    """

    def __init__(self, pid_of: Callable[[], int]) -> None:
        self._pid_of = pid_of
        self._pid = pid_of()
        self._looked_at_s = monotonic()
        self._before = (_idle_s(), _used_s(self._pid))
        self._spare = False

    def there_is(self) -> bool:
        """Returns whether half a core was to spare when last looked; no before the first look, and long after one."""
        return self._spare and monotonic() - self._looked_at_s < _GOOD_FOR_S

    def look(self) -> None:
        """Looks at the machine; what it has been busy with since a look of a moment ago says too little."""
        now = monotonic()
        passed_s = now - self._looked_at_s
        if passed_s < _LEAST_LOOK_S:
            return
        if (pid := self._pid_of()) != self._pid:  # started again: its time begins at nothing
            self._pid, self._before = pid, (self._before[0], 0.0)
        seen = (_idle_s(), _used_s(pid))
        free_s = sum(after - before for after, before in zip(seen, self._before, strict=True))
        self._spare = free_s / passed_s >= _LEAST_SPARE_CORES
        self._looked_at_s, self._before = now, seen


def _idle_s() -> float:
    """Returns how long all cores together have been idle: the fourth and fifth number of /proc/stat (proc(5))."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / _TICKS_PER_S


def _used_s(pid: int) -> float:
    """Returns the processor time of a process: utime and stime of /proc/pid/stat (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
