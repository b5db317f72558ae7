"""How long to wait before another attempt, and whether there shall be one."""

from __future__ import annotations

import random

from modelport._options import RetryPolicy


class RetryBudget:
    """Tokens that failures take and answers give back; below half of them nothing is tried again.

    The counterpart of gRPC's own ``retryThrottling`` for the retries that are made here.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._tokens = float(policy.budget)

    def succeeded(self) -> None:
        """Counts an answer."""
        self._tokens = min(float(self._policy.budget), self._tokens + self._policy.budget_ratio)

    def failed(self) -> bool:
        """Counts a failed attempt; returns whether another one may be made."""
        self._tokens = max(0.0, self._tokens - 1)
        return self._tokens > self._policy.budget / 2


class Retrier:
    """Decides about further attempts, for all calls of one client."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self.budget = RetryBudget(policy)
        self._random = random.Random()  # noqa: S311 - spreads callers out, guards nothing

    def wait_s(self, attempt: int, retry_after_s: float = 0.0) -> float | None:
        """Returns how long to wait after a failed attempt, in seconds; None for not to try again.

        Args:
            attempt: the number of the attempt that failed, counted from 1.
            retry_after_s: the least wait that the server asks for.
        """
        may_retry = self.budget.failed()
        if not may_retry or attempt >= self.policy.max_attempts:
            return None
        return retry_after_s + self.jittered_s(attempt)

    def jittered_s(self, attempt: int) -> float:
        """Returns a wait drawn at random between 0 and the limit after ``attempt``, in seconds."""
        return self._random.uniform(0.0, self.policy.backoff_limit_s(attempt))
