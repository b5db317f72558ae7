"""The command line's entry point: ``modelport``."""

from __future__ import annotations

import os
import sys

from modelport.exceptions import ModelportError

_FAILED = 1
_INTERRUPTED = 130


def main() -> None:
    """Runs the command line; a mistake of the user's is one line on stderr and exit status 1."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say comes as an error of the call
    try:
        from modelport._cli_root import make_app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit(_say("the command line needs: pip install 'modelport[cli]'"))
    try:
        make_app(*sys.argv[1:2])(prog_name="modelport")
    except ModelportError as error:
        sys.exit(_say(f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _say(text: str) -> int:
    print(" ".join(text.split()), file=sys.stderr)
    return _FAILED
