"""Which rows run together: a pure function of what waits, the limits and the clock.

Batching is work-conserving: an engine that runs nothing takes what waits at once. While batches run, rows
gather, and a further batch is closed only when it is full or has as many rows as are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from modelport_server.batching.calls import Call
from modelport_server.options import BatchLimits


@dataclass(frozen=True, slots=True)
class Selection:
    """The next batch: which rows of which calls."""

    parts: tuple[tuple[Call, int, int], ...]
    """Each a call, its first row and the row after its last."""


def close_batch(
    waiting: Iterable[Call],
    limits: BatchLimits,
    *,
    gather: float = 1,
    most: int | None = None,
    enough: float = math.inf,
) -> Selection | None:
    """Returns the rows that should run next, or None to go on gathering.

    Args:
        waiting: the calls that can run together, oldest first, none ended and each with rows left.
        limits: bounds of a batch.
        gather: how many rows there have to be if the batch is not full.
        most: how many rows it may have if that is fewer than the limits say.
        enough: with how many rows it is full, though it may have more: for that no call is divided, nor are calls of
            one message that wait one after another.
    """
    parts: list[tuple[Call, int, int]] = []
    size = rows_left = limits.max_batch_size if most is None else min(most, limits.max_batch_size)
    bytes_left = limits.max_batch_bytes
    full = False
    last: object = None
    for call in waiting:
        if size - rows_left >= enough and (call.message is None or call.message is not last):
            break
        last = call.message
        if not call.splittable:
            full = True
            if not parts:
                parts.append((call, 0, call.rows))
            break
        left = call.rows - call.taken_rows
        row_bytes = call.bytes / max(call.rows, 1)
        fitting = min(left, rows_left, int(bytes_left // row_bytes) if row_bytes else left)
        if fitting == 0 and not parts:
            fitting = min(left, 1)  # a row larger than a batch may be runs alone
        if fitting:
            parts.append((call, call.taken_rows, call.taken_rows + fitting))
            rows_left -= fitting
            bytes_left = max(bytes_left - int(fitting * row_bytes), 0)
        if fitting < left or rows_left == 0:
            full = True
            break
    if not parts or not (full or size - rows_left >= min(gather, enough)):
        return None
    return Selection(tuple(parts))
