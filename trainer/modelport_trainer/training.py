"""Step 3, training: epochs, checkpoints, early stopping; resumable to the same result."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from modelport_trainer import _libraries
from modelport_trainer._checks import check_count, check_positive, check_share
from modelport_trainer.augmentation import Augmentation, augment
from modelport_trainer.errors import OptionError, RunError, TrainingError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelport_trainer.data import Split
    from modelport_trainer.run import RunFolder

OptimizerName = Literal["rmsprop", "adam", "sgd"]
LossName = Literal["crossentropy", "focal", "mse"]

_LEARNING_RATES: dict[OptimizerName, float] = {"rmsprop": 0.001, "adam": 0.001, "sgd": 0.01}
_KERAS_LOSSES: dict[LossName, str] = {
    "crossentropy": "sparse_categorical_crossentropy",
    "focal": "categorical_focal_crossentropy",
    "mse": "mean_squared_error",
}
_LOSSES_OF_CLASS_NUMBERS = ("crossentropy",)
_VALIDATION_BATCH = 512
_FIRST_SHARE = 0.1
"""What a cycle begins with, as a share of its highest step size."""
_ONE_CYCLE_TAKES: dict[str, Any] = {"loss": "crossentropy", "optimizer": "sgd", "decay": 1.0, "patience": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class OneCycle:
    """A step size that rises and falls once over all epochs, and what makes it do well."""

    rise: float = 0.2
    """Share of all steps in which it rises from a tenth of the learning rate to all of it; then it falls to 0."""
    momentum: float = 0.9
    """Share of a step that the next one repeats, by Nesterov's rule."""
    weight_decay: float = 2e-3
    """Share of a weight that a step takes away, times the step size."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        check_share("rise", self.rise)
        for name in ("momentum", "weight_decay", "label_smoothing"):
            check_share(name, getattr(self, name), zero_allowed=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How a model is trained."""

    loss: LossName = "crossentropy"
    """What training minimises, on probabilities: cross-entropy, focal cross-entropy or squared error."""
    optimizer: OptimizerName = "rmsprop"
    """The optimiser."""
    learning_rate: float | None = None
    """Step size; None is the optimiser's usual one: 0.001, for sgd 0.01."""
    decay: float = 0.5
    """Factor on the step size after each epoch without a better validation loss, above 0 to 1; 1 keeps it."""
    epochs: int = 10
    """The most passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    validation_split: float = 0.2
    """Share of the training images held back to judge epochs by, above 0 to below 1."""
    patience: int = 5
    """Epochs without a better validation loss after which training stops; 0 never stops early."""
    seed: int = 1
    """Decides initial weights, shuffling, dropout and the validation images; 0 to 2**32 - 1."""
    one_cycle: OneCycle | None = None
    """Goes through the step sizes once, with ``learning_rate`` as the highest, instead of by ``decay``; None for not.
    It takes sgd and cross-entropy, and a decay of 1 and a patience of 0, because the last steps count most."""
    augmentation: Augmentation | None = None
    """How the images are changed in every epoch; None for not at all."""

    def __post_init__(self) -> None:
        if self.loss not in _KERAS_LOSSES:
            raise OptionError(f"loss: {self.loss!r} is none of {', '.join(_KERAS_LOSSES)}")
        if self.optimizer not in _LEARNING_RATES:
            raise OptionError(f"optimizer: {self.optimizer!r} is none of {', '.join(_LEARNING_RATES)}")
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        if not 0 < self.decay <= 1:
            raise OptionError(f"decay: {self.decay} is not above 0 to 1")
        check_count("epochs", self.epochs, highest=100_000)
        check_count("batch_size", self.batch_size, highest=1_000_000)
        check_share("validation_split", self.validation_split)
        check_count("patience", self.patience, lowest=0, highest=100_000)
        check_count("seed", self.seed, lowest=0, highest=2**32 - 1)
        if self.one_cycle is not None:
            for name, only in _ONE_CYCLE_TAKES.items():
                if getattr(self, name) != only:
                    raise OptionError(
                        f"{name}: a step size that goes one cycle takes {only}, not {getattr(self, name)}"
                    )

    @property
    def step_size(self) -> float:
        """The learning rate of the first epoch."""
        return self.learning_rate if self.learning_rate is not None else _LEARNING_RATES[self.optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """What one epoch came to; losses are those of the option ``loss``."""

    epoch: int
    """1 for the first."""
    loss: float
    accuracy: float
    """Share of right answers on training images, measured with dropout on and as augmentation changed them."""
    val_loss: float
    val_accuracy: float
    learning_rate: float
    """The step size that the epoch was trained with, its last one if it changed meanwhile."""
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What training came to."""

    history: tuple[EpochResult, ...]
    best_epoch: int
    """The epoch of the lowest validation loss, whose weights the model has now."""
    stopped_early: bool
    resumed_after: int
    """The last epoch that an earlier, interrupted process had completed; 0 for none."""

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain JSON values."""
        return asdict(self)


class TrainingListener(Protocol):
    """Is told how training goes."""

    def epoch_started(self, epoch: int, epochs: int, steps: int) -> None:
        """Epoch ``epoch`` of ``epochs`` begins; it has ``steps`` steps."""
        ...

    def step_done(self, step: int) -> None:
        """Step ``step`` of the epoch, counted from 1, is done."""
        ...

    def epoch_done(self, result: EpochResult, *, best: bool) -> None:
        """An epoch is done and stored; ``best`` if no earlier one had as low a validation loss."""
        ...


def make_repeatable(seed: int) -> None:
    """Seeds all random numbers and has TensorFlow compute the same bits every time on this machine.

    Call it before the model is built: initial weights are random, too.
    """
    _libraries.keras().utils.set_random_seed(seed)
    _libraries.tensorflow().config.experimental.enable_op_determinism()


def split_validation(rows: int, options: TrainingOptions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the indices of the images to train with and of those to validate with, both ascending."""
    held_back = min(max(round(rows * options.validation_split), 1), rows - 1)
    order = np.random.default_rng([options.seed, 0]).permutation(rows)
    return np.sort(order[held_back:]), np.sort(order[:held_back])


def is_over(history: Sequence[EpochResult], options: TrainingOptions) -> bool:
    """Returns whether training ends after these epochs: all are done, or none got better for too long."""
    return len(history) >= options.epochs or _out_of_patience(history, options)


def step_size_after(history: Sequence[EpochResult], options: TrainingOptions) -> float:
    """Returns the next epoch's step size: ``decay`` smaller for each past epoch that was no new best.

    It follows from the history alone, so that a resumed run takes the steps of one that was not interrupted.
    """
    misses = sum(best_of(history[: number + 1]) is not result for number, result in enumerate(history))
    return options.step_size * options.decay**misses


def best_of(history: Sequence[EpochResult]) -> EpochResult:
    """Returns the epoch of the lowest validation loss; the earliest of equals."""
    return min(history, key=lambda result: (result.val_loss, result.epoch))


def train(
    model: Any, data: Split, options: TrainingOptions, run: RunFolder, listener: TrainingListener
) -> TrainingResult:
    """Trains a model, from where ``run`` left off, and leaves it with the weights of its best epoch.

    After each epoch the run folder holds all that the next one depends on: weights, optimiser state and the
    state of dropout's random numbers. Shuffling is drawn afresh from seed and epoch number. So a run that is
    killed and resumed comes to the same bits as one that is not.

    Raises:
        TrainingError: If the loss stops being a number.
        RunError: If the run folder's checkpoints do not fit the model.
    """
    kept, held_back = split_validation(len(data), options)
    training, validation = data.take(kept), data.take(held_back)
    _compile(model, options, steps=options.epochs * math.ceil(len(training) / options.batch_size))
    history = _restore(model, run)
    resumed_after = len(history)
    while not is_over(history, options):
        if options.one_cycle is None:
            model.optimizer.learning_rate = step_size_after(history, options)
        result = _run_epoch(model, training, validation, options, len(history) + 1, listener)
        if not math.isfinite(result.loss) or not math.isfinite(result.val_loss):
            raise TrainingError(
                f"the loss is {result.loss} after epoch {result.epoch}; lower the learning rate, "
                f"{options.step_size:g} now"
            )
        history.append(result)
        is_best = best_of(history) is result
        _store(model, run, history, is_best=is_best)
        listener.epoch_done(result, best=is_best)
    _assign(model.variables, run.read_best(), run)
    return TrainingResult(
        history=tuple(history),
        best_epoch=best_of(history).epoch,
        stopped_early=_out_of_patience(history, options) and len(history) < options.epochs,
        resumed_after=resumed_after,
    )


def _out_of_patience(history: Sequence[EpochResult], options: TrainingOptions) -> bool:
    return bool(options.patience and history) and len(history) - best_of(history).epoch >= options.patience


def _compile(model: Any, options: TrainingOptions, *, steps: int) -> None:
    keras = _libraries.keras()
    loss = _KERAS_LOSSES[options.loss]
    if options.one_cycle is not None:
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=options.one_cycle.label_smoothing)
    model.compile(optimizer=_optimizer(options, steps), loss=loss, metrics=["accuracy"], jit_compile=False)
    model.optimizer.build(model.trainable_variables)


def _optimizer(options: TrainingOptions, steps: int) -> Any:
    optimizers = _libraries.keras().optimizers
    if options.one_cycle is None:
        classes = {"rmsprop": optimizers.RMSprop, "adam": optimizers.Adam, "sgd": optimizers.SGD}
        return classes[options.optimizer](learning_rate=options.step_size)
    # It follows from the number of steps done, which is a variable of the optimiser and thus in the checkpoint.
    rising = round(steps * options.one_cycle.rise)
    cycle = optimizers.schedules.CosineDecay(
        options.step_size * _FIRST_SHARE,
        decay_steps=max(steps - rising, 1),
        warmup_target=options.step_size,
        warmup_steps=rising,
    )
    return optimizers.SGD(
        cycle, momentum=options.one_cycle.momentum, nesterov=True, weight_decay=options.one_cycle.weight_decay
    )


def _run_epoch(
    model: Any,
    training: Split,
    validation: Split,
    options: TrainingOptions,
    epoch: int,
    listener: TrainingListener,
) -> EpochResult:
    generator = np.random.default_rng([options.seed, epoch])
    shuffled = training.take(generator.permutation(len(training)))
    classes = int(model.output.shape[-1])
    listener.epoch_started(epoch, options.epochs, math.ceil(len(shuffled) / options.batch_size))
    began = time.monotonic()
    images = shuffled.images
    if options.augmentation is not None:
        images = augment(images, options.augmentation, generator)

    def step_done(batch: int, logs: object) -> None:
        listener.step_done(batch + 1)

    fitted = model.fit(
        images,
        _targets(shuffled.labels, classes, options),
        batch_size=options.batch_size,
        shuffle=False,
        verbose=0,
        callbacks=[_libraries.keras().callbacks.LambdaCallback(on_train_batch_end=step_done)],
    ).history
    judged = model.evaluate(
        validation.images,
        _targets(validation.labels, classes, options),
        batch_size=_VALIDATION_BATCH,
        verbose=0,
        return_dict=True,
    )
    return EpochResult(
        epoch=epoch,
        loss=float(fitted["loss"][-1]),
        accuracy=float(fitted["accuracy"][-1]),
        val_loss=float(judged["loss"]),
        val_accuracy=float(judged["accuracy"]),
        learning_rate=float(model.optimizer.learning_rate),
        duration_s=round(time.monotonic() - began, 3),
    )


def _targets(labels: NDArray[np.int64], classes: int, options: TrainingOptions) -> NDArray[Any]:
    """Returns labels as the loss wants them: class numbers, or rows with a single 1."""
    if options.loss in _LOSSES_OF_CLASS_NUMBERS and options.one_cycle is None:
        return labels
    return np.equal(labels[:, None], np.arange(classes)).astype(np.float32)


def _store(model: Any, run: RunFolder, history: Sequence[EpochResult], *, is_best: bool) -> None:
    """Writes the best weights first: the checkpoint is what says that the epoch is done."""
    weights = [variable.numpy() for variable in model.variables]
    if is_best:
        run.write_best(weights)
    state = [variable.numpy() for variable in model.optimizer.variables]
    run.write_checkpoint([*weights, *state], [asdict(result) for result in history])


def _restore(model: Any, run: RunFolder) -> list[EpochResult]:
    stored = run.read_checkpoint()
    if stored is None:
        return []
    arrays, history = stored
    _assign([*model.variables, *model.optimizer.variables], arrays, run)
    return [EpochResult(**result) for result in history]


def _assign(variables: Sequence[Any], arrays: Sequence[NDArray[Any]], run: RunFolder) -> None:
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [array.shape for array in arrays]:
        raise RunError(f"{run.path}: its checkpoint is of another model; start afresh in another --run-dir")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
