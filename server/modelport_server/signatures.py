"""Checks a call's inputs against a signature, before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence

from modelport.names import shown
from modelport.tensors import DTYPES
from modelport_registry import SignatureSpec, TensorSpec
from modelport_server.batching.calls import Key
from modelport_server.errors import InvalidCallError
from modelport_server.tensors import RawTensor

MAX_EMPTY_ROWS = 1 << 16
"""The most rows of a call that has no data at all: such rows cost a caller nothing, but must be run."""


def is_batchable(spec: SignatureSpec) -> bool:
    """Returns whether rows of several calls may run together.

    Every input and output must have a free first dimension. An output with a further free dimension is
    taken for one whose size follows from the inputs' free dimensions; without any, it depends on the
    data, and a row could come out differently beside other rows.
    """
    if not spec.batched:
        return False
    free_inputs = any(None in (tensor.shape or ())[1:] for tensor in spec.inputs)
    free_outputs = any(None in (tensor.shape or ())[1:] for tensor in spec.outputs)
    return free_inputs or not free_outputs


def arrange(spec: SignatureSpec, inputs: Sequence[RawTensor]) -> tuple[RawTensor, ...]:
    """Returns ``inputs`` in the signature's order, after checking names, dtypes, ranks and dimensions.

    Raises:
        InvalidCallError: naming the input, what came, and what is wanted.
    """
    given: dict[str, RawTensor] = {}
    for tensor in inputs:
        if tensor.name in given:
            raise InvalidCallError(f"input {shown(tensor.name)} is given twice")
        given[tensor.name] = tensor
    found = [given.pop(wanted.name, None) for wanted in spec.inputs]
    if given:
        names = ", ".join(repr(tensor.name) for tensor in spec.inputs[:16]) or "none"
        extra = shown(next(iter(given)))
        raise InvalidCallError(f"signature {shown(spec.name)} has no input {extra}; its inputs are {names}")
    return tuple(_checked(tensor, wanted, spec) for tensor, wanted in zip(found, spec.inputs, strict=True))


def _checked(tensor: RawTensor | None, wanted: TensorSpec, spec: SignatureSpec) -> RawTensor:
    if wanted.dtype not in DTYPES:
        raise InvalidCallError(f"input {wanted.name!r} is of type {wanted.dtype}, which can't be sent")
    if tensor is None:
        raise InvalidCallError(f"input {wanted.name!r} of signature {shown(spec.name)} is missing")
    if tensor.dtype.name != wanted.dtype:
        raise InvalidCallError(f"input {wanted.name!r} must be {wanted.dtype}, not {tensor.dtype.name}")
    if wanted.shape is not None and not _fits(tensor.shape, wanted.shape):
        raise InvalidCallError(
            f"input {wanted.name!r} must have shape {shape_text(wanted.shape)}, not {shape_text(tensor.shape)}"
        )
    return tensor


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or size == want for size, want in zip(shape, wanted, strict=True)
    )


def shape_text(shape: Sequence[int | None]) -> str:
    """Returns a shape for people, ``?`` where it is free."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def common_rows(spec: SignatureSpec, inputs: Sequence[RawTensor]) -> int:
    """Returns how many rows the inputs of a batched signature have.

    Raises:
        InvalidCallError: if they disagree, or are many and hold nothing.
    """
    rows = inputs[0].shape[0]
    for tensor in inputs:
        if tensor.shape[0] != rows:
            raise InvalidCallError(
                f"inputs {inputs[0].name!r} and {tensor.name!r} disagree on the number of rows: "
                f"{rows} and {tensor.shape[0]}"
            )
    if rows > MAX_EMPTY_ROWS and not any(tensor.elements for tensor in inputs):
        raise InvalidCallError(f"{rows} rows without any element were sent; at most {MAX_EMPTY_ROWS} may be empty")
    return rows


def batch_key(spec: SignatureSpec, inputs: Sequence[RawTensor]) -> Key:
    """Returns what calls must have in common to run together."""
    return (spec.name, *(tensor.inner for tensor in inputs))


def empty_outputs(spec: SignatureSpec) -> tuple[RawTensor, ...] | None:
    """Returns a batched signature's outputs for no rows; None if their shapes are not known."""
    outputs: list[RawTensor] = []
    for tensor in spec.outputs:
        inner = (tensor.shape or ())[1:]
        if None in inner or tensor.dtype not in DTYPES:
            return None
        dtype = DTYPES[tensor.dtype]
        shape = (0, *(size or 0 for size in inner))
        outputs.append(RawTensor(tensor.name, dtype, shape, bytes(4) if dtype.is_string else b""))
    return tuple(outputs)


def wanted_outputs(spec: SignatureSpec, names: Sequence[str]) -> frozenset[str] | None:
    """Returns the outputs that a call asks for; None for all of them.

    Raises:
        InvalidCallError: if the signature does not have one of them.
    """
    if not names:
        return None
    known = {tensor.name for tensor in spec.outputs}
    for name in names:
        if name not in known:
            have = ", ".join(repr(tensor.name) for tensor in spec.outputs[:16])
            raise InvalidCallError(f"signature {shown(spec.name)} has no output {shown(name)}; it has {have}")
    return frozenset(names)
