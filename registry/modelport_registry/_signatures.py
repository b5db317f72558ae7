"""What a ``saved_model.pb`` says of its signatures, and one with a single signature."""

from __future__ import annotations

from collections.abc import Mapping

from modelport_registry._manifest import SignatureSpec


def read_signatures(data: bytes) -> Mapping[str, SignatureSpec]:
    """Returns the signatures that the bytes of a ``saved_model.pb`` have, by name; at least one.

    Raises:
        InvalidModelError: if they are no SavedModel, have no graph tagged ``serve``, or no signature.
    """
    from modelport_registry import _saved_model  # protobuf takes its time to import

    return _saved_model.read_saved_model(data).signatures


def with_signature(data: bytes, name: str, rename: str) -> bytes:
    """Returns the bytes of a ``saved_model.pb`` with one signature alone, under another name.

    Args:
        data: the bytes that it is made from; all else in them stays as it is.
        name: the signature's name.
        rename: what it is called in the result.

    Raises:
        InvalidModelError: if they are no SavedModel, or have no such signature.
    """
    from modelport_registry import _saved_model

    return _saved_model.with_signature(data, name, rename)
