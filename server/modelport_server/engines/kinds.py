"""The engines that there are, and which of them are installed here."""

from __future__ import annotations

import importlib.util

TENSORFLOW = "tensorflow"
OPENVINO = "openvino"
ENGINES = (OPENVINO, TENSORFLOW)
"""In the order in which they are tried: the one that is sooner loaded first."""
AUTO = "auto"
"""The fastest of those that are installed and reproduce the golden examples."""
FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
FLOAT16 = "float16"
INT8 = "int8"
"""With nncf."""
PRECISIONS = (FLOAT32, BFLOAT16, FLOAT16, INT8)
PRECISIONS_OF = {OPENVINO: PRECISIONS, TENSORFLOW: (FLOAT32, BFLOAT16)}
"""What each engine may compute in; the processor may be one on which it does not."""


def installed() -> tuple[str, ...]:
    """Returns the engines that this machine has, without importing them."""
    return tuple(name for name in ENGINES if importlib.util.find_spec(name) is not None)


def has_nncf() -> bool:
    """Returns whether this machine has what makes models int8, without importing it."""
    return importlib.util.find_spec("nncf") is not None
