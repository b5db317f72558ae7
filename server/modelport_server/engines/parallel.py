"""How many batches of a version run at once, and on how many threads each."""

from __future__ import annotations

from dataclasses import dataclass

MOST_INSTANCES = 8
"""Beyond this many, what an engine process does in Python for each batch keeps the others waiting."""


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How an engine process shares out its cores."""

    instances: int = 1
    """How many batches run at once."""
    threads: int = 0
    """How many threads each may use; 0 leaves it to the engine."""

    @property
    def text(self) -> str:
        """It for people."""
        batches = "1 batch" if self.instances == 1 else f"{self.instances} batches"
        threads = {0: "all threads", 1: "1 thread"}.get(self.threads, f"{self.threads} threads")
        return f"{batches} at once on {threads}" + (" each" if self.instances > 1 else "")


ALONE = Parallelism()


def settled(instances: int, threads: int, cores: int) -> Parallelism:
    """Returns what follows from what somebody has set, 0 for what nobody has.

    Many narrow batches keep the cores busier than few wide ones, since none of their threads waits for another.

    Args:
        instances: how many batches are to run at once.
        threads: how many threads each is to have.
        cores: how many cores there are.
    """
    if not instances:
        instances = max(1, min(MOST_INSTANCES, cores // threads if threads else cores))
    return Parallelism(instances, threads or max(1, cores // instances))


def wide(cores: int) -> Parallelism:
    """Returns what suits models whose single rows are much work: one batch at a time, on all cores."""
    return Parallelism(1, cores)
