"""What handlers of more than one service do with a request."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from modelport.names import is_valid_name, shown
from modelport_server.errors import InvalidCallError

_Message = TypeVar("_Message", bound=Message)


def parse(kind: type[_Message], raw: bytes) -> _Message:
    """Returns the message that ``raw`` holds.

    Raises:
        InvalidCallError: if it is none of this kind.
    """
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise InvalidCallError(f"the message is not a {kind.DESCRIPTOR.full_name}") from None


def check_name(name: str) -> None:
    """Raises InvalidCallError if a model can't have this name."""
    if not is_valid_name(name):
        raise InvalidCallError(f"{shown(name)} is not a legal model name: use [a-z0-9][a-z0-9_-]{{0,63}}")


async def first_of(*events: Coroutine[Any, Any, object], timeout_s: float | None = None) -> None:
    """Returns when one of ``events`` has ended, or after ``timeout_s`` seconds; the others are cancelled."""
    tasks = [asyncio.ensure_future(event) for event in events]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
