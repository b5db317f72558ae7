"""Importing large libraries without those parts that running a model does not take."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without(*names: str) -> Generator[None]:
    """Lets what is imported within find some modules missing, if they have not been imported yet.

    Only for modules that the library does without where they are not installed. Afterwards they are there again.
    """
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(hidden))  # None says that there is no such module
    try:
        yield
    finally:
        for name in hidden:
            modules.pop(name, None)
