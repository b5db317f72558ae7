"""Remembers how models are called, so that the server is asked once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc

from modelport._models import ModelInfo, SignatureInfo, VersionInfo
from modelport._options import Target
from modelport.exceptions import InvalidArgumentError, NotFoundError, UnavailableError
from modelport.names import DEFAULT_SIGNATURE, shown

_MAX_ENTRIES = 256
_AGAIN_S = 1.0
"""How often the server is asked again at most while several versions answer in turns, in seconds."""
_Key = tuple[str, int | None, str | None, str]


@dataclass(slots=True)
class _Entry:
    version: int
    signature: SignatureInfo
    asked_at_s: float
    is_stale: bool = False
    """Whether somebody is to ask again."""


class SignatureCache:
    """Signatures by what was asked for, which are asked for again when another version answers.

    While a rollout shares out the calls, two versions do so in turns: one that has answered before is reason to ask
    again only now and then. One caller asks, and all others go on with what is known. Any thread may use it.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[_Key, _Entry] = {}
        self._seen: dict[_Key, set[int]] = {}
        """Which versions have answered."""

    def get(self, target: Target) -> SignatureInfo | None:
        """Returns the signature that ``target`` asks for, if it is known, be it stale or not."""
        entry = self._entries.get(_key(target))
        return entry.signature if entry else None

    def fresh(self, target: Target) -> SignatureInfo | None:
        """Returns the signature, if it is known and nobody has to ask again."""
        entry = self._entries.get(_key(target))
        return entry.signature if entry and not entry.is_stale else None

    def take(self, target: Target) -> SignatureInfo | None:
        """Returns the signature to use; None if whoever calls this is to ask the server, and ``put`` what it says."""
        entry = self._entries.get(_key(target))
        if entry is None:
            return None
        if entry.is_stale:
            entry.is_stale, entry.asked_at_s = False, self._clock()
            return None
        return entry.signature

    def put(self, target: Target, version: int, signature: SignatureInfo) -> None:
        """Remembers a signature and the version that has it."""
        if len(self._entries) >= _MAX_ENTRIES or len(self._seen) >= _MAX_ENTRIES:
            self._entries.clear()
            self._seen.clear()
        for known in (target, at_version(target, version)):
            self._entries[_key(known)] = _Entry(version, signature, self._clock())
        self._seen.setdefault(_key(target), set()).add(version)

    def answered(self, target: Target, version: int) -> None:
        """Takes note of the version that answered: of another one's signature nothing is known."""
        key = _key(target)
        entry = self._entries.get(key)
        if entry is None or entry.version == version:
            return
        seen = self._seen.setdefault(key, set())
        if version not in seen or self._clock() - entry.asked_at_s >= _AGAIN_S:
            seen.add(version)
            entry.is_stale = True

    def forget(self, target: Target) -> None:
        """Forgets what ``target`` asks for."""
        self._entries.pop(_key(target), None)


def at_version(target: Target, version: int) -> Target:
    """Returns the target that asks for the same of one version."""
    return replace(target, version=version, alias=None)


def find(model: ModelInfo, target: Target) -> tuple[int, SignatureInfo]:
    """Returns the version that would answer ``target`` and its signature.

    Raises:
        NotFoundError: if the server has no such version or alias.
        InvalidArgumentError: if that version has no such signature.
        UnavailableError: if no version can answer yet.
    """
    version = _version(model, target)
    name = target.signature or DEFAULT_SIGNATURE
    signature = version.signatures.get(name)
    if signature is None:
        known = ", ".join(version.signatures) or "none yet"
        text = f"{model.name} version {version.version} has no signature {shown(name)}; it has {known}"
        raise InvalidArgumentError(text, code=grpc.StatusCode.INVALID_ARGUMENT, details=text)
    return version.version, signature


def _version(model: ModelInfo, target: Target) -> VersionInfo:
    if target.alias is not None:
        number = model.aliases.get(target.alias)
        wanted = f"alias {shown(target.alias)}"
    else:
        number = target.version or model.serving_version
        wanted = f"version {number}"
    if number is None and target.alias is None:
        text = f"no version of {model.name} can answer yet"
        raise UnavailableError(text, code=grpc.StatusCode.UNAVAILABLE, details=text)
    version = model.version(number) if number is not None else None
    if version is None:
        text = f"the server has no {wanted} of {model.name}"
        raise NotFoundError(text, code=grpc.StatusCode.NOT_FOUND, details=text)
    return version


def _key(target: Target) -> _Key:
    return target.model, target.version, target.alias, target.signature
