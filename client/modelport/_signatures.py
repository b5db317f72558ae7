"""Remembers how models are called, so that the server is asked once."""

from __future__ import annotations

from dataclasses import replace

import grpc

from modelport._models import ModelInfo, SignatureInfo, VersionInfo
from modelport._options import Target
from modelport.exceptions import InvalidArgumentError, NotFoundError, UnavailableError
from modelport.names import DEFAULT_SIGNATURE, shown

_MAX_ENTRIES = 256
_Key = tuple[str, int | None, str | None, str]


class SignatureCache:
    """Signatures by what was asked for; forgotten when another version answers."""

    def __init__(self) -> None:
        self._entries: dict[_Key, tuple[int, SignatureInfo]] = {}

    def get(self, target: Target) -> SignatureInfo | None:
        """Returns the signature that ``target`` asks for, if it is known."""
        entry = self._entries.get(_key(target))
        return entry[1] if entry else None

    def put(self, target: Target, version: int, signature: SignatureInfo) -> None:
        """Remembers a signature and the version that has it."""
        if len(self._entries) >= _MAX_ENTRIES:
            self._entries.clear()
        for known in (target, at_version(target, version)):
            self._entries[_key(known)] = (version, signature)

    def answered(self, target: Target, version: int) -> None:
        """Takes note of the version that answered: of another one's signature nothing is known."""
        entry = self._entries.get(_key(target))
        if entry and entry[0] != version:
            self.forget(target)

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
