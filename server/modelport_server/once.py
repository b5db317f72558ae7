"""Something that happens once and that many want to hear of."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic


class Signal:
    """Calls every listener when it is set; at once those that come later."""

    def __init__(self) -> None:
        self._set_at: float | None = None
        self._listeners: dict[object, Callable[[], None]] = {}

    def is_set(self) -> bool:
        """Returns whether it has happened."""
        return self._set_at is not None

    @property
    def age_s(self) -> float:
        """How long ago it happened, in seconds; 0 if it has not."""
        return monotonic() - self._set_at if self._set_at is not None else 0.0

    def set(self) -> None:
        """Tells every listener, the first time."""
        if self._set_at is not None:
            return
        self._set_at = monotonic()
        listeners, self._listeners = list(self._listeners.values()), {}
        for listener in listeners:
            listener()

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Has ``listener`` called; returns how to take that back."""
        if self._set_at is not None:
            listener()
            return lambda: None
        key = object()
        self._listeners[key] = listener
        return lambda: self._listeners.pop(key, None) and None
