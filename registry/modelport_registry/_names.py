"""Model names, aliases and version numbers: checked before they become part of a path."""

from __future__ import annotations

import re

from modelport.names import is_valid_name, shown
from modelport_registry._errors import RegistryError

MAX_VERSION = 2**63 - 1
"""The highest version number: what the wire format's int64 holds."""

_RULE = "use 1 to 64 of a-z, 0-9, - and _, beginning with a letter or digit"
_VERSION = re.compile(r"[1-9][0-9]{0,18}")


def check_model(model: str) -> None:
    """Checks that ``model`` may name a model.

    Raises:
        RegistryError: if it may not.
    """
    if not is_valid_name(model):
        raise RegistryError(f"{shown(model)} is not a model name: {_RULE}")


def check_alias(alias: str) -> None:
    """Checks that ``alias`` may name a version; digits alone may not, they would look like one.

    Raises:
        RegistryError: if it may not.
    """
    if not is_valid_name(alias):
        raise RegistryError(f"{shown(alias)} is not an alias: {_RULE}")
    if alias.isdigit():
        raise RegistryError(f"{shown(alias)} is not an alias: it looks like a version number")


def is_version(version: int) -> bool:
    """Returns whether ``version`` may number a version."""
    return 1 <= version <= MAX_VERSION


def check_version(version: int) -> None:
    """Checks that ``version`` may number a version.

    Raises:
        RegistryError: if it may not.
    """
    if not is_version(version):
        raise RegistryError(f"{version} is not a version number: use 1 or more, below 2^63")


def parse_version(name: str) -> int | None:
    """Returns the number that a folder's name stands for; None for ``007``, ``+3``, ``3.tmp``."""
    if _VERSION.fullmatch(name) is None:
        return None
    number = int(name)
    return number if number <= MAX_VERSION else None
