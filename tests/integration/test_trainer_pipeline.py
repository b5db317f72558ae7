"""Training through the command line: killed and resumed, published, stored models asked again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from modelport_registry import Registry, transitions
from tests.support.server import run_server

TINY = ["--filters", "4,8", "--dense-units", "16"]
EPOCHS = 8

ASK_STORED = """
import sys
import numpy as np
from pathlib import Path
from modelport_registry import Registry
from modelport_trainer.prediction import SavedModelPredictor
store = Registry(sys.argv[1])
(golden,) = store.golden("digits", 1)
predictor = SavedModelPredictor(store.path("digits", 1))
answers = predictor.predict(golden.inputs, batch_rows=7)
assert answers["probabilities"].dtype == np.float32 and answers["classes"].dtype == np.int64
assert golden.inputs["images"].dtype == np.uint8
for name, expected in golden.outputs.items():
    np.testing.assert_allclose(answers[name], expected, rtol=golden.rtol, atol=golden.atol)
assert len(golden.inputs["images"]) >= 32
for module in ("model", "training", "data", "pipeline"):
    assert f"modelport_trainer.{module}" not in sys.modules, module
print("reproduced", len(golden.inputs["images"]))
"""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "modelport", *map(str, arguments)]


def modelport(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, check=False)


def train_command(folder: Path, *more: str) -> list[str]:
    return command("train", *TINY, "--epochs", str(EPOCHS), "--run-dir", folder / "run", "-r", folder / "reg", *more)


def arrays_of(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored if name != "history"}


def history_of(run: Path) -> list[dict[str, float]]:
    found = json.loads((run / "report" / "training.json").read_text())["history"]
    return [{name: value for name, value in epoch.items() if name != "duration_s"} for epoch in found]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run`` and the registry ``reg``, in which digits/1 was published."""
    folder = tmp_path_factory.mktemp("trained")
    made = subprocess.run(
        train_command(folder, "--alias", "stable", "--tag", "tiny", "--json"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    (folder / "stdout.json").write_text(made.stdout)
    (folder / "stderr.txt").write_text(made.stderr)
    return folder


def test_what_is_printed(trained: Path) -> None:
    told = json.loads((trained / "stdout.json").read_text())
    assert told["published"] == {"model": "digits", "version": 1, "path": str(trained / "reg" / "digits" / "1")}
    assert 0.5 < told["evaluation"]["accuracy"] <= 1
    assert told["data"]["train_rows"] == 1437
    # Nothing but our own lines: one per epoch, and how it ended.
    lines = (trained / "stderr.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["epoch", f"{n}/{EPOCHS}"] for n in range(1, EPOCHS + 1)]
    assert lines[-1].startswith(f"trained {EPOCHS} epochs")


def test_the_published_version_is_whole_and_says_where_it_comes_from(trained: Path) -> None:
    registry = Registry(trained / "reg")
    manifest = registry.verify("digits", 1)
    told = json.loads((trained / "stdout.json").read_text())
    assert registry.state("digits").aliases == {"stable": 1}
    assert manifest.tags == ("tiny",)
    assert manifest.golden >= 32
    assert manifest.metrics["accuracy"] == told["evaluation"]["accuracy"]
    assert manifest.lineage.data_sha256 == told["data"]["sha256"]
    assert manifest.lineage.source == "digits"
    assert manifest.lineage.code_revision
    parameters: Any = manifest.lineage.parameters
    assert parameters["network"]["filters"] == [4, 8]
    assert parameters["training"]["seed"] == 1
    assert parameters["training"]["learning_rate"] == 0.001
    assert parameters["best_epoch"] == told["training"]["best_epoch"]
    signature = manifest.signatures["serving_default"]
    assert [(spec.name, spec.dtype, spec.shape) for spec in signature.inputs] == [("images", "uint8", (None, 8, 8))]
    assert {(spec.name, spec.dtype, spec.shape) for spec in signature.outputs} == {
        ("probabilities", "float32", (None, 10)),
        ("classes", "int64", (None,)),
    }


def test_the_stored_model_answers_without_the_training_code(trained: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK_STORED, str(trained / "reg")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reproduced ")


def test_killed_and_resumed_comes_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    with subprocess.Popen(train_command(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as one:
        assert one.stderr is not None
        for line in one.stderr:
            if line.startswith(f"epoch 3/{EPOCHS}"):
                one.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail("it ended before it was killed")
        assert one.wait() == -signal.SIGKILL
    assert not (tmp_path / "reg").exists()

    refused = modelport(*train_command(tmp_path)[3:], cwd=tmp_path)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "go on with --resume" in refused.stderr

    resumed = modelport(*train_command(tmp_path, "--resume")[3:], cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 3/" not in resumed.stderr
    assert "resumed after epoch" in resumed.stderr
    assert history_of(tmp_path / "run") == history_of(trained / "run")
    for name in ("best.npz", "checkpoint.npz"):
        mine, other = arrays_of(tmp_path / "run" / name), arrays_of(trained / "run" / name)
        assert mine.keys() == other.keys()
        assert all(mine[key].tobytes() == other[key].tobytes() for key in mine), name
    (mine_golden,), (other_golden,) = (Registry(f / "reg").golden("digits", 1) for f in (tmp_path, trained))
    np.testing.assert_array_equal(mine_golden.outputs["probabilities"], other_golden.outputs["probabilities"])

    again = modelport(*train_command(tmp_path, "--resume")[3:], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "already published as digits/1" in again.stdout
    assert Registry(tmp_path / "reg").versions("digits") == [1]


def test_the_accurate_preset_is_published_and_resumed_as_it_was_begun(tmp_path: Path) -> None:
    places: list[str | Path] = ["--run-dir", tmp_path / "run", "-r", tmp_path / "reg"]
    options: list[str | Path] = ["train", "--preset", "accurate", "--batch-size", "32", *places]
    made = modelport(*options, "--epochs", "2", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert told["evaluation"]["accuracy"] > 0.8
    manifest = Registry(tmp_path / "reg").verify("digits", 1)
    parameters: Any = manifest.lineage.parameters
    assert (parameters["preset"], parameters["one_cycle"]["rise"], parameters["network"]["dropout"]) == (
        "accurate",
        0.2,
        0.3,
    )
    assert manifest.golden >= 32
    report = json.loads((tmp_path / "run" / "report" / "training.json").read_text())
    assert report["parameters"]["preset"] == {"name": "accurate"}
    for more, message in (
        (["--epochs", "3"], "was begun with epochs 2, not 3"),
        (["--epochs", "2", "--preset", "classic"], "was begun with preset accurate, not classic"),
    ):
        refused = modelport(*options, *more, "--resume", cwd=tmp_path)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert message in refused.stderr


class Images(HTMLParser):
    """Collects where a page's pictures, styles and scripts come from."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]


def test_the_report_is_published_and_needs_no_other_file(trained: Path) -> None:
    report = trained / "reg" / "digits" / "1" / "report"
    assert {path.name for path in report.iterdir()} == {
        *("index.html", "samples.png", "curves.png", "confusion.png", "mistakes.png"),
        *("data.json", "evaluation.json", "training.json"),
    }
    page = Images()
    text = (report / "index.html").read_text()
    page.feed(text)
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    for name in ("samples", "curves", "confusion", "mistakes"):
        with Image.open(report / f"{name}.png") as picture:
            picture.verify()
    evaluation = json.loads((report / "evaluation.json").read_text())
    assert f"<b>{evaluation['accuracy']:.4f}</b>" in text
    confusion = np.array(evaluation["confusion"])
    assert confusion.sum() == evaluation["rows"] == 360
    assert np.trace(confusion) / 360 == pytest.approx(evaluation["accuracy"])
    assert len(evaluation["mistakes"]) == 360 - np.trace(confusion)


def test_a_version_is_evaluated_alike_stored_and_served(trained: Path, tmp_path: Path) -> None:
    told = json.loads((trained / "stdout.json").read_text())["evaluation"]
    stored = modelport("evaluate", "digits", "-r", trained / "reg", "--json", "--report", "page", cwd=tmp_path)
    assert stored.returncode == 0, stored.stderr
    said = json.loads(stored.stdout)
    assert said["versions"] == [1]
    assert said["trained_on_this"] is True
    assert said["evaluation"] == told
    assert (tmp_path / "page" / "index.html").is_file()
    assert not (tmp_path / "page" / "curves.png").exists()

    with run_server(trained / "reg", tmp_path) as server:
        server.wait_serving("digits", 1)
        served = modelport("evaluate", "digits", "--server", server.address, "--data", "digits", "--json", cwd=tmp_path)
    assert served.returncode == 0, served.stderr
    answers = json.loads(served.stdout)
    assert answers["versions"] == [1]
    assert answers["evaluation"]["confusion"] == told["confusion"]
    assert answers["evaluation"]["loss"] == pytest.approx(told["loss"], rel=1e-4)


def test_waiting_until_the_version_is_in_charge(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    again = train_command(tmp_path, "--resume", "--wait", "--wait-timeout", "60")
    vain = subprocess.run(again, capture_output=True, text=True, check=False)
    assert vain.returncode == 1
    assert "digits version 2 will not come into service by itself: version 1 is pinned" in vain.stderr
    registry = Registry(tmp_path / "reg")
    registry.unpin("digits")
    registry.start_rollout("digits", 2)
    registry.change("digits", transitions.advance, action="test")
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "already published as digits/2" in done.stdout
    assert done.stderr.endswith("digits/2: it is in charge\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--server", "localhost:1"], "--server and --wait-timeout go with --publish --wait"),
        (["train", "--wait", "--wait-timeout", "0"], "the time to wait must be above 0 seconds"),
        (["train", "--wait", "--server", "localhost:1"], "no server answers at localhost:1"),
        (["train", "--registry", "/proc/none"], "can't write to the registry /proc/none: No such file or directory; "),
        (["train", "--registry", "/proc/version"], "can't write to the registry /proc/version: "),
        (["train", "--registry", "/proc/self"], "can't write to the registry /proc/self: "),
        (["train", "--registry", "x" * 300], ": File name too long; name another with --registry"),
        (["train", "--data", "nothing"], "--data nothing: give one of digits, mnist, fashion_mnist"),
        (["train", "--data-dir", "nowhere"], "nowhere: no such folder"),
        (["train", "--model", "Big Name"], "model 'Big Name': a name is"),
        (["train", "--filters", "a,b"], "--filters a,b: give whole numbers"),
        (["train", "--filters", "32,64,64,64", "--kernel", "5"], "do not fit on images of 8 x 8"),
        (["train", "--dense-dropout", "1"], "dense_dropout: 1.0 is not a share"),
        (["train", "--preset", "accurate", "--filters", "8"], "filters: cannot be set with the preset accurate"),
        (["train", "--preset", "accurate", "--patience", "3"], "patience: cannot be set with the preset accurate"),
        (["train", "--resume"], "no run of digits to resume"),
        (["evaluate", "digits"], "digits"),
        (["evaluate", "digits", "--server", "localhost:1"], "say which images to send"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    failed = modelport(*arguments, cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
