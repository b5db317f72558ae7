"""Generates the Python stubs of ``protos/`` into the packages, or checks that they are fresh.

Run it with ``make protos``. The generator lives in a virtual environment of its own, because its
version decides which protobuf runtimes can import the stubs: 1.74.0 emits code for protobuf 6.31.1,
the oldest runtime that TensorFlow 2.21 takes. With ``--check`` nothing is written, and the exit
status is 1 if what is committed differs from what would be generated.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = ("grpcio-tools==1.74.0", "protobuf==6.31.1", "mypy-protobuf==3.6.0", "setuptools==80.9.0")
TARGETS = {  # by top folder
    "modelport": ROOT / "client",
    "modelport_registry": ROOT / "registry",
    "modelport_server": ROOT / "server",
}
ENVIRONMENT = ROOT / ".venv-protos"


def generator_python() -> Path:
    """Returns the interpreter of the generator's environment, which is made if it is missing."""
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "installed.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(GENERATOR):
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *GENERATOR], check=True)
        stamp.write_text("\n".join(GENERATOR))
    return python


def generate(target: Path) -> list[Path]:
    """Writes the stubs of every proto below ``protos/`` under ``target`` and returns their paths."""
    python = generator_python()
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    plugins = [f"--plugin=protoc-gen-{name}={python.parent / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    command = [
        str(python),
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={ROOT / 'protos'}",
        *plugins,
        f"--python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--grpc_python_out={target}",
        f"--mypy_grpc_out=quiet:{target}",
        *[str(proto.relative_to(ROOT / "protos")) for proto in protos],
    ]
    subprocess.run(command, check=True, cwd=ROOT / "protos")
    for stub in target.rglob("*_pb2_grpc.py*"):
        proto = ROOT / "protos" / stub.relative_to(target).parent / f"{stub.name.split('_pb2_grpc')[0]}.proto"
        if "\nservice " not in proto.read_text():
            stub.unlink()
    return sorted(p for p in target.rglob("*_pb2*.py*") if p.suffix in {".py", ".pyi"})


def main() -> int:
    """Generates or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        stale: list[Path] = []
        for path in fresh:
            relative = path.relative_to(scratch)
            committed = TARGETS[relative.parts[0]] / relative
            if not committed.exists() or not filecmp.cmp(path, committed, shallow=False):
                stale.append(committed.relative_to(ROOT))
                if not check:
                    committed.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, committed)
    if check and stale:
        print(f"stale stubs, run 'make protos': {', '.join(map(str, stale))}", file=sys.stderr)
        return 1
    print(f"{len(fresh)} stubs, {len(stale)} {'stale' if check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
