"""MNIST through the command line: train, serve, stream the whole test set, compare with TensorFlow in process."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.server import run_server

IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"

IN_PROCESS = """
import sys
import numpy as np, tensorflow as tf
images = np.load(sys.argv[2])
run = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
parts = [run(images=tf.constant(images[first : first + 1000])) for first in range(0, len(images), 1000)]
np.savez(sys.argv[3], **{name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]})
"""


def modelport(*arguments: str | Path) -> str:
    """Runs the command line and returns what it printed."""
    command = [sys.executable, "-m", "modelport", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Reads every array of a file."""
    stored: Any = np.load(path)
    return dict(stored)


def read_idx(path: Path, header: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Reads a file of bytes, not with our own reader."""
    data: NDArray[np.uint8] = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
    return data.reshape(shape)


@pytest.mark.parametrize(
    ("epochs", "least_accuracy"),
    [pytest.param(1, 0.97, id="one-epoch"), pytest.param(10, 0.989, id="ten-epochs", marks=pytest.mark.slow)],
)
@pytest.mark.timeout(3000)
def test_served_answers_are_tensorflows(tmp_path: Path, mnist_dir: Path, epochs: int, least_accuracy: float) -> None:
    registry = tmp_path / "registry"
    network = ["--batch-size", "64", "--validation-split", "0.2", "--epochs", str(epochs)]
    run = ["--registry", str(registry), "--run-dir", str(tmp_path / "run")]
    modelport("train", "--model", "mnist", "--data-dir", mnist_dir, *network, *run)
    with run_server(registry, tmp_path) as server:
        server.wait_serving("mnist", 1)
        modelport("predict", "mnist", mnist_dir / IMAGES, "--server", server.address, "-o", tmp_path / "served.npz")
        said = json.loads(modelport("evaluate", "mnist", "--server", server.address, "--data-dir", mnist_dir, "--json"))
        assert server.stop() == 0
    served = read_npz(tmp_path / "served.npz")
    expected = tensorflow_answers(tmp_path, registry / "mnist" / "1", read_idx(mnist_dir / IMAGES, 16, (-1, 28, 28)))
    labels: NDArray[np.uint8] = read_idx(mnist_dir / LABELS, 8, (-1,))
    np.testing.assert_array_equal(served["classes"], expected["classes"])
    np.testing.assert_allclose(served["probabilities"], expected["probabilities"], rtol=0, atol=1e-5)
    accuracy = int(np.count_nonzero(served["classes"] == labels)) / len(labels)
    assert len(labels) == 10_000
    assert said["evaluation"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert accuracy >= least_accuracy


def tensorflow_answers(folder: Path, model: Path, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Returns what TensorFlow itself says, in a process that has nothing of ours."""
    np.save(folder / "images.npy", images)
    files = [str(model), str(folder / "images.npy"), str(folder / "expected.npz")]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", IN_PROCESS, *files], env=environment, check=True, capture_output=True)
    return read_npz(folder / "expected.npz")
