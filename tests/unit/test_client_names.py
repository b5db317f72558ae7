"""What the client calls things is written once."""

from __future__ import annotations

import ast
from pathlib import Path

import modelport
from modelport.names import DEFAULT_SIGNATURE

_CLIENT = Path(modelport.__file__).parent


def test_the_default_signature_is_named_in_one_place() -> None:
    places = [
        path.name
        for path in _CLIENT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == DEFAULT_SIGNATURE
    ]
    assert places == ["names.py"]
