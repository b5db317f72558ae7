"""Makes the real SavedModels of a test session, in a process of its own: TensorFlow is slow to import.

Run as ``python -m tests.support.make_models FOLDER``. Each model's folder lies in FOLDER under its name;
``golden.npz`` style expectations are computed by TensorFlow in the same process by ``expect``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.saved_models import write_dense_model, write_versioned_model, write_zoo

VERSIONS = 25
"""How many versioned models there are: ``versioned-1`` to ``versioned-25``."""


def main() -> None:
    """Writes the zoo, the dense model and the versioned ones."""
    folder = Path(sys.argv[1])
    write_zoo(folder / "zoo")
    write_dense_model(folder / "dense")
    for tag in range(1, VERSIONS + 1):
        write_versioned_model(folder / f"versioned-{tag}", tag)


if __name__ == "__main__":
    main()
