"""Goes through the trainer's steps from Python: data, model, training, testing.

python examples/train_by_steps.py runs/by-steps
"""

from __future__ import annotations

import sys
from pathlib import Path

from modelport.exceptions import ModelportError
from modelport_trainer import data, deployment, model, training
from modelport_trainer.evaluation import evaluate
from modelport_trainer.prediction import SavedModelPredictor
from modelport_trainer.run import RunFolder


class Progress:
    """Prints a line per epoch."""

    def epoch_started(self, epoch: int, epochs: int, steps: int) -> None:
        """Says nothing yet."""

    def step_done(self, step: int) -> None:
        """Says nothing yet."""

    def epoch_done(self, result: training.EpochResult, *, best: bool) -> None:
        """Prints what the epoch came to."""
        print(f"epoch {result.epoch}: validation accuracy {result.val_accuracy:.3f}{' *' if best else ''}")


def main(folder: Path) -> None:
    """Trains a small network on the digits and tests what was exported."""
    dataset, report = data.load(data.DataSource("digits"))
    print(f"{report.train_rows} training images, {report.test_rows} test images, {dataset.classes} classes")

    options = training.TrainingOptions(epochs=3)
    training.make_repeatable(options.seed)
    network = model.HyperParameters(filters=(16, 32), dense_units=64)
    built = model.build(network, image_shape=dataset.image_shape, classes=dataset.classes)

    run = RunFolder(folder)
    with run.open({"example": "by steps"}, resume=False):
        training.train(built, dataset.train, options, run, Progress())
        deployment.export_classifier(built, run.saved_model)

    answers = SavedModelPredictor(run.saved_model).predict({"images": dataset.test.images})
    found = evaluate(dataset.test.labels, answers["probabilities"], class_names=dataset.class_names)
    print(f"accuracy {found.accuracy:.3f}, macro F1 {found.macro.f1:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python train_by_steps.py FOLDER")
    try:
        main(Path(sys.argv[1]))
    except ModelportError as error:
        sys.exit(f"error: {error}")
