"""The machine that is measured on: what it is, and who else uses it meanwhile."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from bench.stage import say

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_QUIET_S = 2.0


def describe() -> dict[str, object]:
    """Returns what the machine is, with a line for people under ``text``."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    name = cpu.partition(":")[2].strip() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{cores} cores of {name}, {memory_gib:.0f} GiB, Linux {platform.release()}, Python {python}"
    return {
        "text": text,
        "cpu": name,
        "cores": cores,
        "memory_gib": round(memory_gib, 1),
        "kernel": platform.release(),
        "python": python,
    }


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor time so far, in seconds."""

    at_s: float
    """When, by the monotonic clock."""
    busy_s: float
    """What all cores together spent on anything."""
    stolen_s: float
    """What other virtual machines took."""
    ours_s: float
    """What this process and all under it spent."""

    @staticmethod
    def now() -> Usage:
        """Returns the usage until now."""
        return Usage(time.monotonic(), *_machine_s(), _tree_s(os.getpid()))

    def others(self, later: Usage) -> float:
        """Returns how many cores processes other than ours kept busy from here until ``later``."""
        theirs = (later.busy_s - self.busy_s) - (later.ours_s - self.ours_s)
        return max(0.0, theirs / (later.at_s - self.at_s))

    def ours(self, later: Usage) -> float:
        """Returns how many cores our processes kept busy from here until ``later``."""
        return (later.ours_s - self.ours_s) / (later.at_s - self.at_s)

    def stolen(self, later: Usage) -> float:
        """Returns how many cores other virtual machines took from here until ``later``."""
        return (later.stolen_s - self.stolen_s) / (later.at_s - self.at_s)


def wait_quiet(limit_cores: float, timeout_s: float) -> bool:
    """Returns once others keep at most so many cores busy, or after a while; and whether they do."""
    deadline, told = time.monotonic() + timeout_s, False
    while True:
        before = Usage.now()
        time.sleep(_QUIET_S)
        if before.others(Usage.now()) <= limit_cores:
            return True
        if time.monotonic() > deadline:
            return False
        if not told:
            say("waiting until other processes leave the machine alone")
            told = True


def _machine_s() -> tuple[float, float]:
    """Returns busy and stolen time: the first line of /proc/stat (proc(5))."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq) / _TICKS_PER_S, steal / _TICKS_PER_S


def _tree_s(root: int) -> float:
    """Returns the time of a process and all under it, with that of ended children: /proc/pid/stat (proc(5))."""
    parents: dict[int, int] = {}
    spent: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            spent[int(entry.name)] = sum(map(int, fields[11:15]))
    return sum(ticks for pid, ticks in spent.items() if _is_under(pid, root, parents)) / _TICKS_PER_S


def _is_under(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root
