"""The six steps in a row: data, model, training, testing, prediction, deployment."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

from modelport.exceptions import RolloutError, RpcError
from modelport.names import is_valid_name, shown
from modelport.progress import TELL_EVERY_S
from modelport_registry import JSON, Published, Registry, RegistryError, check_server, wait_until_stable
from modelport_trainer import data, deployment, model, training
from modelport_trainer.data import DataReport, Dataset, DataSource
from modelport_trainer.errors import OptionError, TrainerError
from modelport_trainer.evaluation import Evaluation, evaluate
from modelport_trainer.model import HyperParameters, Layer, Network
from modelport_trainer.prediction import SavedModelPredictor
from modelport_trainer.presets import PresetName
from modelport_trainer.report import ReportContent, write_report
from modelport_trainer.run import RunFolder
from modelport_trainer.training import TrainingListener, TrainingOptions, TrainingResult


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitOptions:
    """How to wait until a published version is in charge."""

    server: str | None = None
    """Ask the server at this address; None, the default, goes by what the registry says alone."""
    timeout_s: float | None = None
    """How long to wait, in seconds; None, the default, means for as long as it takes."""
    progress_every_s: float = TELL_EVERY_S
    """How often the listener is told how far a step is, in seconds. Default 5."""

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise OptionError(f"the time to wait must be above 0 seconds, not {self.timeout_s:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOptions:
    """Where a trained model goes."""

    registry: Path
    """The registry's folder."""
    aliases: tuple[str, ...] = ()
    """Aliases to point at the new version."""
    tags: tuple[str, ...] = ()
    """Words of the publisher's own."""
    wait: WaitOptions | None = None
    """Whether and how to wait until the new version is in charge. Default: not at all."""

    def __post_init__(self) -> None:
        for alias in self.aliases:
            _check_name("alias", alias)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """What to train, and on what."""

    name: str
    """The model's name in the registry and in the report."""
    source: DataSource
    """Where the data comes from."""
    preset: PresetName = "classic"
    """What network and training were made from, for the record. Default classic."""
    network: Network = field(default_factory=HyperParameters)
    """The shape of the network."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """How it is trained."""

    def __post_init__(self) -> None:
        _check_name("model", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a pipeline came to."""

    run_dir: Path
    data: DataReport
    training: TrainingResult
    evaluation: Evaluation
    report: Path
    """The report's HTML file."""
    published: Published | None
    """None if nothing was published now."""

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome as plain JSON values."""
        made = self.published
        return {
            "run_dir": str(self.run_dir),
            "published": made and {"model": made.model, "version": made.version, "path": str(made.path)},
            "report": str(self.report),
            "data": self.data.to_json(),
            "training": self.training.to_json(),
            "evaluation": self.evaluation.to_json(),
        }


class Listener(TrainingListener, Protocol):
    """Is told what each step came to."""

    def data_loaded(self, report: DataReport) -> None:
        """Step 1 is done."""
        ...

    def model_built(self, layers: Sequence[Layer]) -> None:
        """Step 2 is done."""
        ...

    def trained(self, result: TrainingResult) -> None:
        """Step 3 is done."""
        ...

    def tested(self, evaluation: Evaluation, report: Path) -> None:
        """Step 4 is done, on the exported model."""
        ...

    def published(self, published: Published) -> None:
        """Step 6 is done."""
        ...

    def already_published(self, name: str, version: int) -> None:
        """The run was published before, and nothing has changed since."""
        ...

    def waiting(self, name: str, version: int, phase: str) -> None:
        """The published version has got as far as ``phase`` says, on its way into service."""
        ...


def run_pipeline(
    options: PipelineOptions,
    run: RunFolder,
    listener: Listener,
    *,
    publish: PublishOptions | None,
    resume: bool = False,
) -> Outcome:
    """Trains, tests and publishes a model.

    Testing asks the exported model, reloaded by TensorFlow: the figures are those of what is published.

    Args:
        options: What to train.
        run: The folder to work in.
        listener: Is told how it goes.
        publish: Where the model goes; None to publish nowhere.
        resume: Whether to go on with the run that the folder holds.

    Raises:
        TrainerError: If a step fails.
        RegistryError: If it cannot be published.
        RpcError: If the server to ask does not answer, which is found before anything is done.
        RolloutError: If that server does not serve the model; or if the version was waited for, and is rejected
            or does not come into service.
    """
    if publish is not None:
        _check_registry(publish.registry)
        _check_server(options.name, publish)
    dataset, found = data.load(options.source)
    options.network.check_fits(dataset.image_shape)
    listener.data_loaded(found)
    settings: dict[str, Any] = {
        "model": options.name,
        "preset": options.preset,
        "data": {"source": str(options.source), "sha256": dataset.sha256},
        **_sections(options),
    }
    if options.training.one_cycle is not None:
        # Not to be changed when it is resumed, as the epochs of training are: the cycle is as long as they are many.
        settings["cycle"] = {"epochs": options.training.epochs}
    with run.open(settings, resume=resume):
        trained, layers = _train(options, dataset, run, listener)
        predictor = SavedModelPredictor(run.saved_model)
        answers = predictor.predict({"images": dataset.test.images})
        evaluation = evaluate(
            dataset.test.labels,
            answers["probabilities"],
            predicted=answers["classes"],
            class_names=dataset.class_names,
        )
        content = ReportContent(
            title=options.name,
            dataset=dataset,
            data=found,
            evaluation=evaluation,
            probabilities=answers["probabilities"],
            layers=layers,
            training=trained,
            parameters={"preset": {"name": options.preset}, **_sections(options)},
        )
        report = write_report(run.report, content)
        listener.tested(evaluation, report)
        published = None
        if publish is not None:
            published = _publish(options, content, run, predictor, publish, listener)
    if publish is not None and publish.wait is not None:
        _wait(options.name, _published_version(run), publish, publish.wait, listener)
    return Outcome(
        run_dir=run.path,
        data=found,
        training=trained,
        evaluation=evaluation,
        report=report,
        published=published,
    )


def _sections(options: PipelineOptions) -> dict[str, dict[str, Any]]:
    """Returns the options by section; sections that a preset has no use for are left out."""
    own = asdict(options.training)
    parts = {name: own.pop(name) for name in ("one_cycle", "augmentation")}
    used = {name: part for name, part in parts.items() if part is not None}
    return {"network": asdict(options.network), "training": own, **used}


def _check_name(what: str, name: str) -> None:
    if not is_valid_name(name):
        raise OptionError(
            f"{what} {shown(name)}: a name is 1 to 64 of a-z, 0-9, _ and -, and begins with a letter or digit"
        )


def _train(
    options: PipelineOptions, dataset: Dataset, run: RunFolder, listener: Listener
) -> tuple[TrainingResult, tuple[Layer, ...]]:
    training.make_repeatable(options.training.seed)
    built = model.build(options.network, image_shape=dataset.image_shape, classes=dataset.classes)
    layers = model.summarize(built)
    listener.model_built(layers)
    trained = training.train(built, dataset.train, options.training, run, listener)
    listener.trained(trained)
    deployment.export_classifier(built, run.saved_model)
    return trained, layers


def _publish(
    options: PipelineOptions,
    content: ReportContent,
    run: RunFolder,
    predictor: SavedModelPredictor,
    publish: PublishOptions,
    listener: Listener,
) -> Published | None:
    trained = content.training
    if trained is None:
        raise ValueError("only what was trained is published here")
    registry = Registry(publish.registry)
    key = {"registry": str(publish.registry.resolve()), "epochs": len(trained.history)}
    version = _version_before(registry, options.name, run, key)
    if version is not None:
        listener.already_published(options.name, version)
        return None
    try:
        _check_server(options.name, publish)  # it was there when training began
        made = registry.publish(
            options.name,
            run.saved_model,
            golden=[deployment.classifier_golden(predictor, content.dataset, content.probabilities)],
            metrics=content.evaluation.metrics,
            lineage=deployment.lineage_of(
                str(options.source), content.dataset.sha256, _parameters(options, content.data, trained)
            ),
            tags=publish.tags,
            aliases=publish.aliases,
            report=run.report,
        )
    except (RegistryError, RolloutError, RpcError) as error:
        raise TrainerError(f"{error} (the trained model is kept: go on with --resume)") from error
    run.write_json("published.json", key | {"model": options.name, "version": made.version})
    listener.published(made)
    return made


def _check_registry(registry: Path) -> None:
    """Makes sure, before anything is done, that it can be written to; a folder that is made for that does not stay."""
    try:
        made = [folder for folder in (registry, *registry.parents) if not folder.exists()]
        registry.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=registry):
            pass
        with contextlib.suppress(OSError):  # somebody else may have put something there meanwhile
            for folder in made:
                folder.rmdir()
    except OSError as error:
        why = f"can't write to the registry {registry}: {error.strerror}"
        raise TrainerError(f"{why}; name another with --registry") from error


def _check_server(name: str, publish: PublishOptions) -> None:
    """Makes sure, before anything is done, that the server that is to be asked will be able to answer."""
    if publish.wait is not None and publish.wait.server is not None:
        check_server(Registry(publish.registry), name, publish.wait.server)


def _published_version(run: RunFolder) -> int:
    published = run.read_published()
    if published is None:
        raise ValueError("only what was published is waited for")
    return int(published["version"])


class _How(TypedDict):
    timeout_s: float | None
    on_progress: Callable[[str], None]
    progress_every_s: float


def _wait(name: str, version: int, publish: PublishOptions, wait: WaitOptions, listener: Listener) -> None:
    def tell(phase: str) -> None:
        listener.waiting(name, version, phase)

    how: _How = {"timeout_s": wait.timeout_s, "on_progress": tell, "progress_every_s": wait.progress_every_s}
    if wait.server is None:
        wait_until_stable(Registry(publish.registry), name, version, **how)
        return
    from modelport import Client

    with Client(wait.server) as client:
        client.rollouts.wait_for_version(name, version, **how)


def _version_before(registry: Registry, name: str, run: RunFolder, key: Mapping[str, Any]) -> int | None:
    before = run.read_published()
    if before is None or any(before.get(field) != value for field, value in key.items()):
        return None
    version = int(before["version"])
    return version if registry.exists(name) and version in registry.versions(name) else None


def _parameters(options: PipelineOptions, found: DataReport, trained: TrainingResult) -> dict[str, JSON]:
    sections = _sections(options)
    sections["training"]["learning_rate"] = options.training.step_size
    parameters: dict[str, JSON] = json.loads(
        json.dumps(
            {
                "preset": options.preset,
                **sections,
                "epochs_run": len(trained.history),
                "best_epoch": trained.best_epoch,
                "train_rows": found.train_rows,
                "test_rows": found.test_rows,
            }
        )
    )
    return parameters
