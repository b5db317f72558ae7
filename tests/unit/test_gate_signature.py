from __future__ import annotations

import pytest

from modelport_registry import SignatureSpec, TensorSpec
from modelport_server.gates.signature import SignatureChangedError, check_signatures

Shape = tuple[int | None, ...] | None


def _spec(
    *,
    inputs: dict[str, tuple[str, Shape]] | None = None,
    outputs: dict[str, tuple[str, Shape]] | None = None,
    name: str = "f",
) -> dict[str, SignatureSpec]:
    def tensors(given: dict[str, tuple[str, Shape]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, dtype, shape) for n, (dtype, shape) in sorted(given.items()))

    before: tuple[dict[str, tuple[str, Shape]], ...] = (
        {"x": ("float32", (None, 4))},
        {"y": ("float32", (None, 3)), "z": ("int64", (None, None))},
    )
    first = before[0] if inputs is None else inputs
    second = before[1] if outputs is None else outputs
    return {name: SignatureSpec(name, tensors(first), tensors(second))}


OUTPUTS: dict[str, tuple[str, Shape]] = {"y": ("float32", (None, 3)), "z": ("int64", (None, None))}


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({}, "signature 'f' is gone"),
        (_spec(inputs={"a": ("float32", (None, 4))}), "input of signature 'f': 'x' .float32 .*4.. is gone"),
        (_spec(inputs={"x": ("float64", (None, 4))}), r"'x' was float32 \[\?, 4\] and is float64 \[\?, 4\]"),
        (_spec(inputs={"x": ("float32", (None, 5))}), r"'x' was float32 \[\?, 4\] and is float32 \[\?, 5\]"),
        (_spec(inputs={"x": ("float32", (1, 4))}), r"'x' was float32 \[\?, 4\] and is float32 \[1, 4\]"),
        (_spec(inputs={"x": ("float32", (None, 4, 1))}), "'x' was"),
        (_spec(inputs={"x": ("float32", None)}), "is float32 of any rank"),
        (
            _spec(inputs={"x": ("float32", (None, 4)), "w": ("int32", (None,))}),
            "new input 'w' .int32 .*, which callers do not send",
        ),
        (_spec(outputs={**OUTPUTS, "y": ("float16", (None, 3))}), "output of signature 'f': 'y' was float32"),
        (_spec(outputs={**OUTPUTS, "y": ("float32", (None, None))}), r"is float32 \[\?, \?\]"),
        (_spec(outputs={**OUTPUTS, "y": ("float32", (None, 2))}), r"is float32 \[\?, 2\]"),
        (_spec(outputs={"renamed": ("float32", (None, 3)), "z": OUTPUTS["z"]}), "'y' .float32 .*3.. is gone"),
    ],
)
def test_what_callers_rely_on(candidate: dict[str, SignatureSpec], message: str) -> None:
    with pytest.raises(SignatureChangedError, match=message) as caught:
        check_signatures(_spec(), candidate)
    assert "\n" not in str(caught.value)
    assert "modelport policy MODEL --allow-signature-changes" in str(caught.value)
    figures = check_signatures(_spec(), candidate, allow_changes=True)
    assert figures["changes"]


@pytest.mark.parametrize(
    ("candidate", "added"),
    [
        (_spec(), []),
        (_spec(inputs={"x": ("float32", (None, None))}), []),
        (_spec(outputs={**OUTPUTS, "z": ("int64", (None, 7))}), []),
        (_spec(outputs={**OUTPUTS, "more": ("string", (None,))}), ["f: more"]),
        ({**_spec(), **_spec(name="g")}, ["g"]),
    ],
)
def test_what_callers_do_not_notice(candidate: dict[str, SignatureSpec], added: list[str]) -> None:
    assert check_signatures(_spec(), candidate) == {"signatures": 1, "added": added}


def test_many_changes_are_counted() -> None:
    baseline = {name: spec for n in range(9) for name, spec in _spec(name=f"f{n}").items()}
    with pytest.raises(SignatureChangedError, match="'f2' is gone; and 6 more changes"):
        check_signatures(baseline, {})
