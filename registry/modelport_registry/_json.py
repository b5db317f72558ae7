"""Strict JSON: what is read is checked field by field, and has no NaN and no key twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar, cast

from modelport.names import shown
from modelport_registry._errors import IntegrityError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""Anything that JSON can hold."""

T = TypeVar("T")


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def parse(data: bytes | str, what: str) -> Fields:
    """Returns the JSON object that ``data`` holds; ``what`` names it in messages.

    Raises:
        IntegrityError: if it is not strict JSON, or not an object.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        document: object = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as exc:
        raise IntegrityError(f"{what} is damaged: it is not JSON") from exc
    if not isinstance(document, dict):
        raise IntegrityError(f"{what} is damaged: it is not a JSON object")
    return Fields(what, cast("dict[str, object]", document))


class Fields:
    """One JSON object, whose fields are read with their types checked."""

    def __init__(self, what: str, fields: Mapping[str, object]) -> None:
        self._what = what
        self._fields = fields

    def wrong(self, key: str) -> IntegrityError:
        """Returns the error that says that the field ``key`` is missing or wrong."""
        return IntegrityError(f"{self._what} is damaged: {shown(key)} is missing or wrong")

    def integer(self, key: str, *, at_least: int = 0) -> int:
        """Returns the whole number at ``key``."""
        value = self._fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise self.wrong(key)
        return value

    def number(self, key: str) -> float:
        """Returns the finite number at ``key``."""
        value = self._fields.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key)
        try:
            number = float(value)
        except OverflowError as exc:
            raise self.wrong(key) from exc
        if not math.isfinite(number):
            raise self.wrong(key)
        return number

    def flag(self, key: str) -> bool:
        """Returns whether it is so at ``key``."""
        value = self._fields.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key)
        return value

    def text(self, key: str) -> str:
        """Returns the text at ``key``."""
        value = self._fields.get(key)
        if not isinstance(value, str):
            raise self.wrong(key)
        return value

    def optional_text(self, key: str) -> str | None:
        """Returns the text at ``key``, or None where there is none."""
        return None if self._fields.get(key) is None else self.text(key)

    def optional_integer(self, key: str, *, at_least: int = 0) -> int | None:
        """Returns the whole number at ``key``, or None where there is none."""
        return None if self._fields.get(key) is None else self.integer(key, at_least=at_least)

    def items(self, key: str) -> list[object]:
        """Returns the list at ``key``."""
        value = self._fields.get(key)
        if not isinstance(value, list):
            raise self.wrong(key)
        return cast("list[object]", value)

    def objects(self, key: str) -> list[Fields]:
        """Returns the list of objects at ``key``."""
        return [self._child(key, item) for item in self.items(key)]

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns the list of texts at ``key``."""
        items = self.items(key)
        if not all(isinstance(item, str) for item in items):
            raise self.wrong(key)
        return tuple(cast("list[str]", items))

    def child(self, key: str) -> Fields:
        """Returns the object at ``key``."""
        return self._child(key, self._fields.get(key))

    def mapping(self, key: str, read: Callable[[Fields, str], T]) -> dict[str, T]:
        """Returns the object at ``key``, each of its fields read by ``read``."""
        child = self.child(key)
        return {name: read(child, name) for name in child.names()}

    def names(self) -> list[str]:
        """Returns the keys."""
        return list(self._fields)

    def has(self, key: str) -> bool:
        """Returns whether there is something at ``key``."""
        return self._fields.get(key) is not None

    def any(self, key: str) -> JSON:
        """Returns what is at ``key``, whatever it is."""
        return cast("JSON", self._fields.get(key))

    def _child(self, key: str, value: object) -> Fields:
        if not isinstance(value, dict):
            raise self.wrong(key)
        return Fields(self._what, cast("dict[str, object]", value))
