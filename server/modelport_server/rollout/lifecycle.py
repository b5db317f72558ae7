"""Where a version can be in its life."""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where a version is in its life."""

    DISCOVERED = "discovered"
    VERIFYING = "verifying"
    LOADING = "loading"
    WARMING = "warming"
    AVAILABLE = "available"
    DRAINING = "draining"
    RETIRED = "retired"
    REJECTED = "rejected"


COMING = frozenset({State.VERIFYING, State.LOADING, State.WARMING})
LOADED = COMING | {State.AVAILABLE, State.DRAINING}
