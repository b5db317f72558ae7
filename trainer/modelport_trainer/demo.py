"""The main job from end to end: train, publish, serve, call, and replace under load."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from modelport_trainer import _published
from modelport_trainer._console import print_evaluation
from modelport_trainer._sources import DataSource
from modelport_trainer.data import Dataset, load
from modelport_trainer.errors import TrainerError

if TYPE_CHECKING:
    from modelport import Client

_UNARY_CALLERS = 4
_ROWS_PER_CALL = 8
_ROWS_PER_MESSAGE = 32
_START_S = 60.0
_SWITCH_S = 60.0
_ANSWERS_AFTER = 2000
"""How many answers the new version gives before the callers stop."""
_STOP_S = 30.0
_ERRORS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the demo trains on, and for how long."""

    source: DataSource
    """The data; its test images are what callers send."""
    first_epochs: int = 1
    """Epochs of the version that is served first. Default 1."""
    second_epochs: int = 12
    """Epochs of the version that replaces it. Default 12."""
    work_dir: Path | None = None
    """The folder to work in, which must not exist or be empty; None for a new temporary one."""


@dataclass(slots=True)
class Traffic:
    """What the callers saw, over all of them."""

    rows: int = 0
    calls: int = 0
    versions: Counter[int] = field(default_factory=Counter[int])
    errors: list[str] = field(default_factory=list[str])
    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, version: int, rows: int) -> None:
        """Counts an answer."""
        with self.lock:
            self.calls += 1
            self.rows += rows
            self.versions[version] += 1

    def failed(self, error: Exception) -> None:
        """Counts a failure."""
        with self.lock:
            self.errors.append(f"{type(error).__name__}: {error}")

    @property
    def rows_per_s(self) -> float:
        """The mean rate of rows answered."""
        return self.rows / (self.ended - self.started)


class Demo:
    """One run of the demo.

    Args:
        options: what to do.
        console: where it is shown.
    """

    def __init__(self, options: DemoOptions, console: Console) -> None:
        self._options = options
        self._console = console
        self._name = options.source.suggested_name
        self._folder = _work_dir(options.work_dir)

    def run(self) -> int:
        """Does it all and returns the exit status: 0 if no call failed.

        Raises:
            TrainerError: if a step fails.
        """
        self._title("Train a first version and publish it")
        self._train(self._options.first_epochs)
        self._title("Serve it")
        with self._server() as address:
            dataset, _ = load(self._options.source)
            traffic = self._roll_out(address, dataset)
            self._title("Test the new version by its served answers")
            return self._conclude(address, traffic)

    def _title(self, text: str) -> None:
        self._console.rule(f"[bold]{text}", align="left")

    def _train(self, epochs: int) -> None:
        source = self._options.source
        data = ["--data", str(source.path or source.kind)] if source.kind != "idx" else ["--data-dir", str(source.path)]
        arguments = ["train", *data, "--model", self._name, "--epochs", str(epochs), "--patience", "0"]
        arguments += ["--registry", str(self._registry), "--run-dir", str(self._folder / f"run-{epochs}-epochs")]
        self._console.print(f"[dim]$ modelport {' '.join(arguments)}[/dim]", soft_wrap=True)
        self._console.file.flush()
        if subprocess.call([sys.executable, "-m", "modelport", *arguments]):
            raise TrainerError("the training failed, see above")

    @property
    def _registry(self) -> Path:
        return self._folder / "registry"

    @contextlib.contextmanager
    def _server(self) -> Generator[str]:
        port_file, log = self._folder / "port", self._folder / "server.log"
        arguments = ["serve", "--registry", str(self._registry), "--address", "127.0.0.1:0"]
        self._console.print(f"[dim]$ modelport {' '.join(arguments)}[/dim]", soft_wrap=True)
        command = [sys.executable, "-m", "modelport", *arguments, "--port-file", str(port_file)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            try:
                yield f"127.0.0.1:{_wait_for_port(process, port_file, log)}"
            finally:
                process.send_signal(signal.SIGTERM)
                status = process.wait(_STOP_S)
                self._console.print(f"[dim]the server stopped on SIGTERM with status {status}; its log: {log}[/dim]")

    def _roll_out(self, address: str, dataset: Dataset) -> Traffic:
        from modelport import Client

        with Client(address) as client:
            started = time.monotonic()
            self._console.print("an engine process loads the version and reproduces its golden examples ...")
            client.wait_ready(model=self._name, timeout_s=_START_S)
            first = client.model(self._name)
            serving = first.serving_version
            self._console.print(f"version {serving} took calls {time.monotonic() - started:.1f} s after the start")
            answer = client.predict(self._name, dataset.test.images[:5])
            said, labels = answer["classes"].tolist(), dataset.test.labels[:5].tolist()
            self._console.print(f"a batch of five: version {answer.version} said {said}, the labels are {labels}")
            self._title("Train a better version and publish it while callers call")
            return self._under_load(client, dataset, serving)

    def _under_load(self, client: Client, dataset: Dataset, serving: int | None) -> Traffic:
        traffic, stop = Traffic(), threading.Event()
        callers = [
            threading.Thread(target=self._call, args=(client, dataset, traffic, stop), name=f"caller-{number}")
            for number in range(_UNARY_CALLERS)
        ]
        for follow in (False, True):
            arguments = (client, dataset, traffic, stop, follow)
            callers.append(threading.Thread(target=self._stream, args=arguments, name=f"stream-{follow}"))
        for caller in callers:
            caller.start()
        try:
            self._console.print(
                f"{_UNARY_CALLERS} callers send {_ROWS_PER_CALL} images a call; two streams send {_ROWS_PER_MESSAGE} "
                "a message, one pinned to its version and one that follows"
            )
            self._train(self._options.second_epochs)
            self._console.print("the server checks the new version, warms it up beside the old one, and switches ...")
            self._wait_for_switch(client, serving, traffic)
        finally:
            stop.set()
            for caller in callers:
                caller.join()
            traffic.ended = time.monotonic()
        return traffic

    def _wait_for_switch(self, client: Client, before: int | None, traffic: Traffic) -> None:
        deadline = time.monotonic() + _SWITCH_S
        while True:
            now = client.model(self._name).serving_version
            if now not in (before, None) and traffic.versions[now] >= _ANSWERS_AFTER:
                return
            if time.monotonic() > deadline:
                raise TrainerError(f"the server did not take the new version within {_SWITCH_S:g} s")
            time.sleep(0.1)

    def _call(self, client: Client, dataset: Dataset, traffic: Traffic, stop: threading.Event) -> None:
        for images in _batches(dataset, _ROWS_PER_CALL):
            if stop.is_set():
                return
            try:
                answer = client.predict(self._name, {"images": images})
                traffic.answered(answer.version, len(answer["classes"]))
            except Exception as error:  # a caller goes on and the table shows it
                traffic.failed(error)

    def _stream(self, client: Client, dataset: Dataset, traffic: Traffic, stop: threading.Event, follow: bool) -> None:
        batches = ({"images": images} for images in _batches(dataset, _ROWS_PER_MESSAGE))
        until_stopped = itertools.takewhile(lambda _: not stop.is_set(), batches)
        seen: set[int] = set()
        try:
            for result in client.predict_stream(self._name, until_stopped, follow=follow):
                traffic.answered(result.prediction.version, len(result.prediction["classes"]))
                seen.add(result.prediction.version)
        except Exception as error:  # a caller goes on and the table shows it
            traffic.failed(error)
        if not follow and len(seen) > 1:
            traffic.failed(TrainerError(f"the pinned stream was answered by the versions {sorted(seen)}"))

    def _conclude(self, address: str, traffic: Traffic) -> int:
        answers = _published.ask_server(address, self._name, None, self._options.source)
        evaluation = _published.judge(answers)
        print_evaluation(self._console, evaluation)
        before = self._metrics(1)
        table = Table("", title="The demo, in figures", title_justify="left")
        table.add_column("version 1", justify="right")
        table.add_column("version 2", justify="right")
        table.add_row("accuracy", f"{before['accuracy']:.4f}", f"[bold]{evaluation.accuracy:.4f}")
        table.add_row("precision (macro)", f"{before['precision_macro']:.4f}", f"{evaluation.macro.precision:.4f}")
        table.add_row("recall (macro)", f"{before['recall_macro']:.4f}", f"{evaluation.macro.recall:.4f}")
        versions = sorted(traffic.versions)
        table.add_row("answers during the rollout", *(f"{traffic.versions[version]:,}" for version in (1, 2)))
        table.add_section()
        table.add_row("rows answered", "", f"{traffic.rows:,}")
        table.add_row("rows per second, while training", "", f"{traffic.rows_per_s:,.0f}")
        table.add_row("rows per second, test stream", "", f"{evaluation.rows / answers.duration_s:,.0f}")
        table.add_row("versions seen", "", ", ".join(map(str, versions)))
        colour = "red" if traffic.errors else "green"
        table.add_row("calls failed", "", f"[bold {colour}]{len(traffic.errors)}")
        self._console.print(table)
        for error in traffic.errors[:_ERRORS_SHOWN]:
            self._console.print(f"[red]{error}[/red]")
        report = self._registry / self._name / "2" / "report" / "index.html"
        self._console.print(f"version 2's report: {report}", soft_wrap=True)
        self._console.print(f"all of it stays in {self._folder} until you remove it", soft_wrap=True)
        return 1 if traffic.errors else 0

    def _metrics(self, version: int) -> dict[str, float]:
        from modelport_registry import Registry

        return dict(Registry(self._registry).manifest(self._name, version).metrics)


def _work_dir(wanted: Path | None) -> Path:
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="modelport-demo-"))
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise TrainerError(f"{wanted} exists and is not an empty folder; give another --work-dir")
    wanted.mkdir(parents=True, exist_ok=True)
    return wanted


def _wait_for_port(process: subprocess.Popen[bytes], port_file: Path, log: Path) -> int:
    deadline = time.monotonic() + _START_S
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TrainerError(f"the server did not start: {log.read_text()[-500:]}")
        time.sleep(0.05)
    return int(port_file.read_text())


def _batches(dataset: Dataset, rows: int) -> Iterator[Any]:
    """Yields the test images over and over, some rows at a time."""
    images = dataset.test.images
    for first in itertools.cycle(range(0, len(images) - rows + 1, rows)):
        yield images[first : first + rows]
