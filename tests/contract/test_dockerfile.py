"""The container image, as far as it goes without a Docker engine: what it names, and what its steps do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import typer

from modelport._cli_root import make_app
from modelport_registry import Published
from tests.support.packages import must_run, public_python
from tests.support.server import wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
USER = "nobody"


def instructions() -> list[tuple[str, str]]:
    """Returns the Dockerfile's instructions, each a name and its text."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name, text.strip()) for name, _, text in pairs]


def last(name: str) -> str:
    return [text for found, text in instructions() if found == name][-1]


def arguments(name: str) -> list[str]:
    """Returns the last instruction of a name that has to be in exec form, or ends with one."""
    words: list[str] = json.loads(last(name)[last(name).index("[") :])
    return words


def copied() -> list[str]:
    return [source for name, text in instructions() if name == "COPY" for source in text.split()[:-1]]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out: the last pattern that fits it or a folder of it decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        if any(fits(prefix, pattern) for prefix in prefixes):
            out = not line.startswith("!")
    return out


def fits(path: str, pattern: str) -> bool:
    """Whether a pattern fits a whole path: ``*`` is one name or a part of one, a leading ``**/`` any folder."""
    if pattern.startswith("**/"):
        return fits(path.rpartition("/")[2], pattern.removeprefix("**/"))
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def context() -> Iterator[str]:
    """Yields the files that COPY takes."""
    for source in copied():
        paths = [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).rglob("*"))
        names = (path.relative_to(ROOT).as_posix() for path in paths if path.is_file())
        yield from (name for name in names if not ignored(name))


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    files = set(context())
    for source in copied():
        assert any(name == source or name.startswith(f"{source}/") for name in files), source


def test_what_the_build_needs_is_copied() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    packages: list[str] = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {"pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]}
    files = set(context())
    assert needed <= files
    for package in packages:
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py*") if path.is_file()}
        assert {name for name in sources if "__pycache__" not in name} <= files


def test_nothing_else_gets_into_the_image() -> None:
    assert not [name for name in context() if name.endswith(".pyc")]
    outside = ("tests/conftest.py", ".git/config", ".venv/pyvenv.cfg", "registry/mnist/1/saved_model.pb", "docs/x.md")
    assert all(ignored(path) for path in outside)


def test_it_runs_as_somebody_who_is_not_root() -> None:
    names = [name for name, _ in instructions()]
    steps = [text for name, text in instructions() if name == "RUN"]
    assert last("USER") not in {"root", "0"}
    assert any("useradd" in step and last("USER") in step.split() for step in steps)
    assert "RUN" not in names[names.index("USER") :]


def test_the_ports_are_the_same() -> None:
    port = last("EXPOSE")
    assert arguments("CMD")[arguments("CMD").index("--address") + 1].endswith(f":{port}")
    assert arguments("HEALTHCHECK")[-1].endswith(f":{port}")


def test_the_command_has_options_that_exist() -> None:
    group: Any = typer.main.get_command(make_app())
    name, *words = arguments("CMD")
    options = {option for parameter in group.commands[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= options
    assert arguments("ENTRYPOINT") == ["modelport"]
    assert last("VOLUME") == words[words.index("--registry") + 1]


def test_it_is_the_python_that_the_constraints_are_for() -> None:
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", last("FROM"))
    assert version is not None
    assert f"CPython {version[1]}," in (ROOT / "constraints.txt").read_text()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


def install_as_the_image_does(place: Path, python: str) -> Path:
    """Runs the Dockerfile's pip step on a copy of its context; returns the folder of programs."""
    source = place / "src"
    for name in context():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    venv = place / "venv"
    must_run(python, "-m", "venv", "--without-pip", venv)
    must_run(sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "pip")
    (step,) = (text for name, text in instructions() if name == "RUN" and "pip install" in text)
    must_run("sh", "-ec", step, cwd=source, env={"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"})
    shutil.rmtree(source)
    return venv / "bin"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_steps_install_a_server_that_runs_as_nobody_and_tells_its_health(
    place: Path, publish_tag: Callable[[Path, str, int], Published]
) -> None:
    root = os.geteuid() == 0
    python = public_python()
    if python is None:
        pytest.skip("no Python of this version that another user may run")
    programs = install_as_the_image_does(place, python)
    registry, home = place / "registry", place / "home"
    registry.mkdir()
    home.mkdir()
    if root:
        shutil.chown(home, USER)
    becoming: dict[str, Any] = {"user": USER, "group": "nogroup", "extra_groups": []} if root else {}
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(home)}
    port_file = home / "port"

    served = [{"/registry": str(registry), "0.0.0.0:8500": "0.0.0.0:0"}.get(word, word) for word in arguments("CMD")]
    command = [str(programs / arguments("ENTRYPOINT")[0]), *served, "--port-file", str(port_file)]
    with (place / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, **becoming)
    try:
        wait_for(lambda: port_file.exists() or server.poll() is not None, "the server to listen")
        assert server.poll() is None, (place / "log").read_text()

        def health() -> subprocess.CompletedProcess[str]:
            words = [word.replace(":8500", f":{port_file.read_text().strip()}") for word in arguments("HEALTHCHECK")]
            words[0] = str(programs / words[0])
            return subprocess.run(
                words, cwd=home, env=environment, capture_output=True, text=True, check=False, **becoming
            )

        before = health()
        assert (before.returncode, before.stdout) == (1, "NOT_SERVING\n"), before.stderr
        publish_tag(registry, "toy", 1)
        wait_for(lambda: health().returncode == 0, "the server to be healthy")
        if root:
            assert Path(f"/proc/{server.pid}").stat().st_uid != 0
        server.terminate()
        assert server.wait(60) == 0, (place / "log").read_text()
        after = health()
        assert after.returncode == 1
        assert len(after.stderr.splitlines()) == 1
    finally:
        server.kill()
        server.wait()
