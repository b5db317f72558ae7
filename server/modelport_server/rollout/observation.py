"""What a servable tells those who compare versions."""

from __future__ import annotations

from typing import Protocol

from modelport_server.batching.calls import Batch, BatchOutput, Call


class Observer(Protocol):
    """Hears of a servable's calls and batches while a rollout lasts."""

    def on_call(self, call: Call, now_s: float) -> None:
        """Called when a call has ended, in whatever way.

        Args:
            call: it; ``call.future`` is done.
            now_s: the time on the monotonic clock.
        """
        ...

    def on_batch(self, batch: Batch, output: BatchOutput) -> None:
        """Called when a batch has run, before its outputs are handed out."""
        ...
