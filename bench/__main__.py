"""``python -m bench``: one of ``BENCHMARKS``; ``docs/benchmarks.md`` says what they measure."""

from __future__ import annotations

import signal
import sys
from importlib import import_module

BENCHMARKS = (
    "serving",
    "startup",
    "loading",
    "shadow",
    "gates",
    "peers",
    "sdk",
    "scaling",
    "cost",
    "transport",
    "accurate",
    "precisions",
)


def main() -> None:
    """Runs the benchmark that the first argument names."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the server ends too
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else BENCHMARKS[0]
    if name not in BENCHMARKS:
        sys.exit(f"error: there is no benchmark {name!r}: it is one of {', '.join(BENCHMARKS)}")
    import_module(f"bench.{name}").main(arguments)


if __name__ == "__main__":
    main()
