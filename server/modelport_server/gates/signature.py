"""Gate 3: whether a version takes and gives everything that callers of the stable version rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from modelport.exceptions import ModelportError
from modelport.names import shown
from modelport_registry import JSON, SignatureSpec, TensorSpec
from modelport_server.signatures import shape_text

_SHOWN_CHANGES = 3


class SignatureChangedError(ModelportError):
    """Something that callers rely on is gone or changed; the text says what."""


def check_signatures(
    baseline: Mapping[str, SignatureSpec],
    candidate: Mapping[str, SignatureSpec],
    allow_changes: bool = False,
    *,
    model: str = "MODEL",
) -> dict[str, JSON]:
    """Compares what a version takes and gives with what the stable version does.

    Callers go on as before where every signature, input and output is still there with its type and rank, no
    input asks for more, and no output promises less: an input's fixed dimension may become free and an output's
    free one fixed. More signatures and more outputs are fine; more inputs are not, for nobody sends them.

    Args:
        baseline: the stable version's signatures by name.
        candidate: the new version's.
        allow_changes: whether the model's policy allows changes: they are counted then, and not an error.
        model: the model's name, for the text that says how to allow them.

    Returns:
        How many signatures were compared, what was added, and the changes that were allowed.

    Raises:
        SignatureChangedError: naming what changed, from what to what, and how to allow it.
    """
    changes = [change for name, before in baseline.items() for change in _changes(before, candidate.get(name))]
    if changes and not allow_changes:
        more = f"; and {len(changes) - _SHOWN_CHANGES} more changes" if len(changes) > _SHOWN_CHANGES else ""
        allow = f"if callers can take it: modelport policy {model} --allow-signature-changes"
        raise SignatureChangedError(f"{'; '.join(changes[:_SHOWN_CHANGES])}{more}; {allow}")
    figures: dict[str, JSON] = {"signatures": len(baseline), "added": list(_additions(baseline, candidate))}
    return figures | ({"changes": changes[:_SHOWN_CHANGES]} if changes else {})


def _changes(before: SignatureSpec, after: SignatureSpec | None) -> Iterator[str]:
    place = f"signature {shown(before.name)}"
    if after is None:
        yield f"{place} is gone"
        return
    yield from _tensor_changes(f"input of {place}", before.inputs, after.inputs, _input_breaks)
    known = {tensor.name for tensor in before.inputs}
    yield from (
        f"{place} has a new input {shown(t.name)} ({_text(t)}), which callers do not send"
        for t in after.inputs
        if t.name not in known
    )
    yield from _tensor_changes(f"output of {place}", before.outputs, after.outputs, _output_breaks)


def _tensor_changes(
    kind: str,
    before: tuple[TensorSpec, ...],
    after: tuple[TensorSpec, ...],
    breaks: Callable[[int | None, int | None], bool],
) -> Iterator[str]:
    found = {tensor.name: tensor for tensor in after}
    for old in before:
        new = found.get(old.name)
        if new is None:
            yield f"{kind}: {shown(old.name)} ({_text(old)}) is gone"
        elif old.dtype != new.dtype or _shape_breaks(old.shape, new.shape, breaks):
            yield f"{kind}: {shown(old.name)} was {_text(old)} and is {_text(new)}"


_Shape = tuple[int | None, ...] | None


def _shape_breaks(old: _Shape, new: _Shape, breaks: Callable[[int | None, int | None], bool]) -> bool:
    if old is None or new is None:
        return old is not new
    return len(old) != len(new) or any(map(breaks, old, new))


def _input_breaks(old: int | None, new: int | None) -> bool:
    return new is not None and old != new


def _output_breaks(old: int | None, new: int | None) -> bool:
    return old is not None and old != new


def _additions(baseline: Mapping[str, SignatureSpec], candidate: Mapping[str, SignatureSpec]) -> Iterator[str]:
    yield from sorted(candidate.keys() - baseline.keys())
    for name in sorted(baseline.keys() & candidate.keys()):
        known = {tensor.name for tensor in baseline[name].outputs}
        yield from (f"{name}: {tensor.name}" for tensor in candidate[name].outputs if tensor.name not in known)


def _text(tensor: TensorSpec) -> str:
    return f"{tensor.dtype} {'of any rank' if tensor.shape is None else shape_text(tensor.shape)}"
