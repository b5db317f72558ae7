"""What engine processes import, and what they leave out."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from modelport_server.engines._imports import without

LARGE = "large_library_of_a_test"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with a part that it does without."""
    folder = tmp_path / LARGE
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "try:\n    from . import part\n    found = True\nexcept ImportError:\n    found = False\n"
    )
    (folder / "part.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in (LARGE, f"{LARGE}.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_part_is_missing_within_and_there_afterwards(library: None) -> None:
    with without(f"{LARGE}.part"):
        assert not importlib.import_module(LARGE).found
    assert importlib.import_module(f"{LARGE}.part").__name__ == f"{LARGE}.part"


def test_what_has_been_imported_stays(library: None) -> None:
    part = importlib.import_module(f"{LARGE}.part")
    with without(f"{LARGE}.part"):
        assert importlib.import_module(f"{LARGE}.part") is part
    assert sys.modules[f"{LARGE}.part"] is part


def test_it_is_there_again_after_an_error(library: None) -> None:
    with pytest.raises(RuntimeError), without(f"{LARGE}.part"):
        raise RuntimeError
    assert importlib.import_module(f"{LARGE}.part")


@pytest.mark.parametrize(
    ("code", "absent", "later"),
    [
        (
            "from modelport_server.engines.openvino_engine import import_openvino as load; load().Core",
            ("openvino.tools", "openvino_telemetry"),
            "import openvino.tools.ovc",
        ),
        (
            "from modelport_server.engines.tensorflow_engine import import_tensorflow as load; load().function",
            ("keras", "sklearn", "matplotlib"),
            "assert load().keras.layers.Dense; import keras",
        ),
    ],
    ids=["openvino", "tensorflow"],
)
def test_engines_are_imported_without_what_models_do_not_take(code: str, absent: tuple[str, ...], later: str) -> None:
    program = f"import sys\n{code}\nassert not [name for name in sys.modules if name.startswith({absent})]\n{later}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
