"""The rules for names that come from outside, checked before anything else is done with them."""

from __future__ import annotations

import re

DEFAULT_SIGNATURE = "serving_default"
"""The signature that a call runs if it names none."""

DEFAULT_ADDRESS = "127.0.0.1:8500"
"""Where a server listens, and where commands ask for one, if nothing else is said."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHOWN_CHARACTERS = 40


def is_valid_name(name: str) -> bool:
    """Returns whether ``name`` may name a model or an alias: ``[a-z0-9][a-z0-9_-]{0,63}``."""
    return _NAME.fullmatch(name) is not None


def shown(text: str) -> str:
    """Returns ``text`` quoted, escaped and cut to a length that fits into a message."""
    return ascii(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
