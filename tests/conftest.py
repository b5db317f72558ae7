"""Fixtures that whole test sessions share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from modelport_registry import Golden, Published, Registry
from tests.support.zoo import Zoo, run_zoo

settings.register_profile("modelport", deadline=None)  # how fast things are is for bench/ to say
settings.load_profile("modelport")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real SavedModels: ``zoo/<name>``, ``dense`` and ``versioned-<tag>``, see ``tests.support``."""
    folder = tmp_path_factory.mktemp("saved-models")
    _make_models("make_models", folder)
    return folder


@pytest.fixture(scope="session")
def bad_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the SavedModels of ``tests.support.bad_versions``."""
    folder = tmp_path_factory.mktemp("bad-versions")
    _make_models("bad_versions", folder)
    return folder


def _make_models(module: str, folder: Path) -> None:
    command = [sys.executable, "-m", f"tests.support.{module}", str(folder)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """MNIST's four IDX files, from MODELPORT_MNIST_DIR."""
    folder = os.environ.get("MODELPORT_MNIST_DIR")
    if not folder:
        pytest.skip("MODELPORT_MNIST_DIR is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def publish_tag(saved_models: Path) -> Callable[[Path, str, int], Published]:
    """Publishes the versioned model with a tag, golden examples included; the version is the next one."""

    def publish(root: Path, model: str, tag: int) -> Published:
        return Registry(root).publish(model, saved_models / f"versioned-{tag}", golden=[versioned_golden(tag)])

    return publish


def versioned_golden(tag: int) -> Golden:
    """Returns golden examples of the versioned model with a tag."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    outputs: dict[str, NDArray[Any]] = {"y": x * 2, "version": np.full(2, tag, np.int64)}
    return Golden(signature="serving_default", inputs={"x": x}, outputs=outputs)


@pytest.fixture(scope="session")
def zoo(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Zoo]:
    """A server of one model of every odd kind, shared by all tests that leave it as it is."""
    with run_zoo(tmp_path_factory.mktemp("zoo"), saved_models, versioned_golden(1)) as served:
        yield served
