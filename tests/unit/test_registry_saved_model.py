from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelport_registry import (
    InvalidModelError,
    Registry,
    SignatureSpec,
    TensorSpec,
    read_signatures,
    with_signature,
)
from modelport_registry._saved_model import read_saved_model
from tests.support.saved_models import (
    SERVING_DEFAULT,
    saved_model_bytes,
    write_fake_saved_model,
)


def test_signatures_of_every_shape() -> None:
    info = read_saved_model(
        saved_model_bytes(
            {
                "f": (
                    {"free": ("float32", [None, 3]), "scalar": ("int64", [])},
                    {"unranked": ("string", None), "odd": ("complex64", [2])},
                ),
                "__saved_model_init_op": ({}, {"done": ("resource", [])}),
            }
        )
    )
    assert info.framework == {"tensorflow": "2.21.0"}
    assert info.signatures == {
        "f": SignatureSpec(
            "f",
            (TensorSpec("free", "float32", (None, 3)), TensorSpec("scalar", "int64", ())),
            (TensorSpec("odd", "complex64", (2,)), TensorSpec("unranked", "string", None)),
        )
    }


@pytest.mark.parametrize(
    ("inputs", "outputs", "batched"),
    [
        ({"x": [None]}, {"y": [None, 2]}, True),
        ({"x": [None], "n": []}, {"y": [None]}, False),
        ({"x": [None]}, {"y": []}, False),
        ({"x": [None]}, {"y": None}, False),
        ({"x": [3]}, {"y": [None]}, False),
        ({}, {"y": [None]}, False),
    ],
)
def test_batched_means_a_free_first_dimension_everywhere(
    inputs: dict[str, Any], outputs: dict[str, Any], *, batched: bool
) -> None:
    def typed(shapes: dict[str, Any]) -> dict[str, Any]:
        return {name: ("float32", shape) for name, shape in shapes.items()}

    info = read_saved_model(saved_model_bytes({"f": (typed(inputs), typed(outputs))}))
    assert info.signatures["f"].batched is batched


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xff not protobuf", "damaged or not a SavedModel"),
        (b"", "no graph at all"),
        (saved_model_bytes(tags=("train",)), "no graph tagged 'serve' .it has: 'train'."),
        (saved_model_bytes(tags=("serve", "tpu")), "'serve.tpu'"),
        (saved_model_bytes({}), "no signatures"),
        (saved_model_bytes({"__saved_model_init_op": ({}, {})}), "no signatures"),
    ],
)
def test_what_is_not_usable_gets_one_line(data: bytes, message: str) -> None:
    with pytest.raises(InvalidModelError, match=message) as caught:
        read_saved_model(data)
    assert "\n" not in str(caught.value)


def test_any_damage_is_a_clear_error_or_harmless() -> None:
    data = saved_model_bytes()
    refused = 0
    for index in range(len(data)):
        for broken in (data[:index], data[:index] + bytes([data[index] ^ 0x80]) + data[index + 1 :]):
            try:
                read_saved_model(broken)
            except InvalidModelError:
                refused += 1
    assert refused > len(data)


def test_types_that_cannot_be_served_are_told(tmp_path: Path) -> None:
    model = write_fake_saved_model(tmp_path / "m", {"f": ({"x": ("complex64", [None])}, {"y": ("bool", [None])})})
    published = Registry(tmp_path / "r").publish("odd", model)
    assert any("'f' cannot be served: 'x' is complex64" in line for line in published.warnings)


def test_models_that_tensorflow_wrote(saved_models: Path, tmp_path: Path) -> None:
    folders = {path.name: path for path in (saved_models / "zoo").iterdir()}
    folders["versioned"] = next(saved_models.glob("versioned-*"))
    registry = Registry(tmp_path / "registry")
    found = {name: registry.publish(name, folder).manifest for name, folder in folders.items()}
    for name in folders:
        assert registry.verify(name, 1) == found[name]

    def default(name: str) -> SignatureSpec:
        return found[name].signatures[SERVING_DEFAULT]

    assert found["strings"].framework["tensorflow"].startswith("2.")
    assert default("two_inputs").inputs == (
        TensorSpec("a", "float32", (None, 3)),
        TensorSpec("b", "int32", (None,)),
    )
    assert {t.dtype for t in default("strings").outputs} == {"string", "int32"}
    assert default("no_batch").outputs == (TensorSpec("determinant", "float32", ()),)
    assert set(found["signatures"].signatures) == {SERVING_DEFAULT, "double", "triple"}
    assert len(default("many").outputs) == 50
    assert default("bfloat16").inputs == (TensorSpec("x", "bfloat16", (None, 2)),)
    assert default("scalars").inputs == (TensorSpec("a", "float32", ()), TensorSpec("b", "int64", ()))
    assert default("versioned").outputs == (
        TensorSpec("version", "int64", (None,)),
        TensorSpec("y", "float32", (None, 4)),
    )
    assert {name for name in folders if not default(name).batched} == {"no_batch", "scalars"}


def test_one_signature_alone_under_another_name() -> None:
    data = saved_model_bytes({name: ({"x": ("float32", [None])}, {name: ("float32", [None])}) for name in ("f", "g")})
    alone = with_signature(data, "g", "serving_default")
    assert read_signatures(alone) == {
        "serving_default": SignatureSpec(
            "serving_default", (TensorSpec("x", "float32", (None,)),), (TensorSpec("g", "float32", (None,)),)
        )
    }
    assert read_saved_model(alone).framework == read_saved_model(data).framework
    with pytest.raises(InvalidModelError, match="'h'"):
        with_signature(data, "h", "serving_default")
    with pytest.raises(InvalidModelError, match="not a SavedModel"):
        with_signature(b"\xff", "g", "serving_default")
