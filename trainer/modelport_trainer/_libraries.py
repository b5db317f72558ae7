"""The seam to the heavy, untyped libraries: each is imported on first use, and quietly.

Everything that they return is ``Any`` from here on; no other module imports them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Generator
from typing import Any


@functools.cache
def tensorflow() -> Any:
    """Returns the ``tensorflow`` module, its log turned down to errors."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with _quiet_import():
        import tensorflow as tf
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    return tf


@functools.cache
def keras() -> Any:
    """Returns the ``keras`` module, with TensorFlow below it."""
    tensorflow()
    with _quiet_import():
        import keras  # pyright: ignore[reportMissingTypeStubs]
    if keras.config.backend() != "tensorflow":
        msg = f"Keras runs on {keras.config.backend()}, modelport needs TensorFlow: unset KERAS_BACKEND"
        raise ImportError(msg)
    return keras


@functools.cache
def sklearn() -> Any:
    """Returns the ``sklearn`` module with the submodules that the trainer uses."""
    with _quiet_import():
        sklearn = importlib.import_module("sklearn")
        for name in ("datasets", "metrics", "model_selection"):
            importlib.import_module(f"sklearn.{name}")
    return sklearn


@functools.cache
def figure_class() -> Any:
    """Returns matplotlib's ``Figure``, which draws to files without any window system."""
    with _quiet_import():
        from matplotlib.figure import Figure
    return Figure


@contextlib.contextmanager
def _quiet_import() -> Generator[None]:
    """Keeps what a library says while it is imported from standard error, unless the import fails.

    TensorFlow's C++ part logs before it has read its log level, so this works on the file descriptor.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
