"""Errors that modelport raises, all of them below ``ModelportError``.

The client's part of the hierarchy is drawn in ``modelport._status``.
"""

from __future__ import annotations


class ModelportError(Exception):
    """Anything that went wrong in a way that modelport knows: its text is one line for people."""
