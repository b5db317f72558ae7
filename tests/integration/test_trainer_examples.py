"""The trainer's examples run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from modelport_registry import Registry
from tests.support.packages import ROOT, must_run, run


def test_train_keras(tmp_path: Path) -> None:
    shown = must_run(sys.executable, ROOT / "examples" / "train_keras.py", tmp_path / "models")
    assert shown == "published ratings/1, 32 golden examples\n"
    signature = Registry(tmp_path / "models").verify("ratings", 1).signatures["serving_default"]
    assert [(spec.name, spec.dtype) for spec in signature.inputs] == [("item", "int64"), ("user", "float32")]
    assert [spec.name for spec in signature.outputs] == ["rating", "sureness"]


def test_train_by_steps(tmp_path: Path) -> None:
    example = ROOT / "examples" / "train_by_steps.py"
    shown = must_run(sys.executable, example, tmp_path / "run").splitlines()
    assert shown[0] == "1437 training images, 360 test images, 10 classes"
    assert re.fullmatch(r"accuracy 0\.\d{3}, macro F1 0\.\d{3}", shown[-1])
    refused = run(sys.executable, example, tmp_path / "run")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
