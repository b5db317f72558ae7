"""Training's decisions, its options, and the folder that a run lives in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelport_trainer import presets
from modelport_trainer.augmentation import Augmentation
from modelport_trainer.data import DataSource
from modelport_trainer.errors import OptionError, RunError
from modelport_trainer.model import AccurateNetwork, HyperParameters
from modelport_trainer.pipeline import PipelineOptions, PublishOptions
from modelport_trainer.run import RunFolder, next_run_dir
from modelport_trainer.training import (
    EpochResult,
    OneCycle,
    TrainingOptions,
    best_of,
    is_over,
    split_validation,
    step_size_after,
)


def history(*val_losses: float) -> list[EpochResult]:
    return [
        EpochResult(epoch=number, loss=1, accuracy=0, val_loss=loss, val_accuracy=0, learning_rate=0.1, duration_s=1)
        for number, loss in enumerate(val_losses, start=1)
    ]


def test_the_defaults_are_the_classic_ones() -> None:
    network, options = HyperParameters(), TrainingOptions()
    assert (network.filters, network.kernel, network.pool) == ((32, 64), 3, 2)
    assert (network.pool_dropout, network.dense_units, network.dense_dropout) == (0.25, 128, 0.5)
    assert (options.loss, options.optimizer, options.step_size) == ("crossentropy", "rmsprop", 0.001)
    assert (options.batch_size, options.validation_split) == (64, 0.2)
    assert TrainingOptions(optimizer="sgd").step_size == 0.01


def test_the_classic_preset_is_the_defaults() -> None:
    assert presets.choose("classic") == (HyperParameters(), TrainingOptions())
    network, options = presets.choose("classic", network={"kernel": 5}, training={"patience": 2, "loss": "mse"})
    assert network == HyperParameters(kernel=5)
    assert options == TrainingOptions(patience=2, loss="mse")


def test_the_accurate_preset_takes_what_it_has_no_own_value_for() -> None:
    network, options = presets.choose("accurate", training={"epochs": 3, "batch_size": 32, "seed": 9})
    assert network == AccurateNetwork()
    expected = presets.PRESETS["accurate"].training
    assert options == dataclasses.replace(expected, epochs=3, batch_size=32, seed=9)
    assert options.one_cycle is not None
    assert options.augmentation is not None


@pytest.mark.parametrize(
    ("network", "training", "named"),
    [
        ({"filters": (8,)}, {}, "filters"),
        ({"kernel": 5, "dense_units": 8}, {}, "dense_units, kernel"),
        ({}, {"loss": "crossentropy"}, "loss"),
        ({}, {"optimizer": "adam", "decay": 0.5}, "decay, optimizer"),
        ({"pool": 2}, {"patience": 5}, "patience, pool"),
    ],
)
def test_what_contradicts_the_accurate_preset_is_named(
    network: dict[str, Any], training: dict[str, Any], named: str
) -> None:
    with pytest.raises(OptionError, match=f"^{named}: cannot be set with the preset accurate"):
        presets.choose("accurate", network=network, training=training)


def one_cycle(**options: Any) -> TrainingOptions:
    base: dict[str, Any] = {"optimizer": "sgd", "decay": 1.0, "patience": 0, "one_cycle": OneCycle()}
    return TrainingOptions(**(base | options))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: presets.choose("best"), "preset"),  # type: ignore[arg-type]
        (lambda: AccurateNetwork(stages=()), "stages"),
        (lambda: AccurateNetwork(stages=((8,), ())), "stages"),
        (lambda: AccurateNetwork(stages=((8, 0),)), "stages"),
        (lambda: AccurateNetwork(dropout=1.0), "dropout"),
        (lambda: Augmentation(rotation_degrees=181), "rotation_degrees"),
        (lambda: Augmentation(shift=1.0), "shift"),
        (lambda: OneCycle(rise=0.0), "rise"),
        (lambda: OneCycle(label_smoothing=1.0), "label_smoothing"),
        (lambda: one_cycle(optimizer="adam"), "optimizer"),
        (lambda: one_cycle(loss="mse"), "loss"),
        (lambda: one_cycle(decay=0.5), "decay"),
        (lambda: one_cycle(patience=5), "patience"),
        (lambda: HyperParameters(filters=()), "filters"),
        (lambda: HyperParameters(filters=(32, 0)), "filters"),
        (lambda: HyperParameters(kernel=0), "kernel"),
        (lambda: HyperParameters(pool=-1), "pool"),
        (lambda: HyperParameters(pool_dropout=1.0), "pool_dropout"),
        (lambda: HyperParameters(dense_dropout=float("nan")), "dense_dropout"),
        (lambda: HyperParameters(dense_units=0), "dense_units"),
        (lambda: TrainingOptions(loss="huber"), "loss"),  # type: ignore[arg-type]
        (lambda: TrainingOptions(optimizer="lion"), "optimizer"),  # type: ignore[arg-type]
        (lambda: TrainingOptions(learning_rate=0.0), "learning_rate"),
        (lambda: TrainingOptions(learning_rate=float("inf")), "learning_rate"),
        (lambda: TrainingOptions(decay=0.0), "decay"),
        (lambda: TrainingOptions(decay=1.5), "decay"),
        (lambda: TrainingOptions(epochs=0), "epochs"),
        (lambda: TrainingOptions(batch_size=0), "batch_size"),
        (lambda: TrainingOptions(validation_split=0.0), "validation_split"),
        (lambda: TrainingOptions(validation_split=1.0), "validation_split"),
        (lambda: TrainingOptions(patience=-1), "patience"),
        (lambda: TrainingOptions(seed=-1), "seed"),
        (lambda: TrainingOptions(seed=2**32), "seed"),
        (lambda: PipelineOptions(name="../up", source=DataSource("digits")), "model"),
        (lambda: PublishOptions(registry=Path(), aliases=("Not A Name",)), "alias"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(make: Callable[[], Any], name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name}"):
        make()


def test_small_images_are_refused_before_anything_is_built() -> None:
    HyperParameters().check_fits((6, 6))
    with pytest.raises(OptionError, match="do not fit on images of 5 x 28"):
        HyperParameters().check_fits((5, 28))
    AccurateNetwork().check_fits((8, 8))
    with pytest.raises(OptionError, match="do not fit on images of 28 x 7 pixels; need 8 x 8"):
        AccurateNetwork().check_fits((28, 7))


def test_when_training_is_over() -> None:
    options = TrainingOptions(epochs=5, patience=2)
    assert not is_over([], options)
    assert not is_over(history(1.0, 0.5, 0.6), options)
    assert is_over(history(1.0, 0.5, 0.6, 0.5), options)  # as good as before is not better
    assert not is_over(history(1.0, 0.5, 0.6, 0.4), options)
    assert is_over(history(5, 4, 3, 2, 1), options)
    patient = dataclasses.replace(options, patience=0)
    assert not is_over(history(1, 2, 3, 4), patient)


def test_the_step_size_shrinks_after_each_epoch_that_got_no_better() -> None:
    options = TrainingOptions(learning_rate=0.8, decay=0.5)
    assert step_size_after([], options) == 0.8
    assert step_size_after(history(1.0, 0.5), options) == 0.8
    assert step_size_after(history(1.0, 0.5, 0.5), options) == 0.4
    assert step_size_after(history(1.0, 0.5, 0.6, 0.4, 0.45), options) == pytest.approx(0.2)
    assert step_size_after(history(1.0, 2.0), dataclasses.replace(options, decay=1.0)) == 0.8


def test_the_best_epoch_is_the_first_of_equals() -> None:
    assert best_of(history(0.5, 0.2, 0.2, 0.3)).epoch == 2


@given(rows=st.integers(2, 500), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_the_validation_split_has_every_row_once(rows: int, share: float, seed: int) -> None:
    options = TrainingOptions(validation_split=share, seed=seed)
    kept, held_back = split_validation(rows, options)
    assert sorted([*kept.tolist(), *held_back.tolist()]) == list(range(rows))
    assert len(kept) >= 1
    assert abs(len(held_back) - rows * share) <= 1
    again, _ = split_validation(rows, options)
    np.testing.assert_array_equal(kept, again)


SETTINGS = {"model": "m", "data": {"source": "digits", "sha256": "a"}, "training": {"epochs": 3, "batch_size": 64}}


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(RunError, match="no run to resume"), run.open(SETTINGS, resume=True):
        pass
    assert not run.path.exists()
    with run.open(SETTINGS, resume=False):
        pass
    with pytest.raises(RunError, match="go on with --resume"), run.open(SETTINGS, resume=False):
        pass


def test_a_run_is_resumed_with_its_own_options(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.open(SETTINGS, resume=False):
        pass
    more_epochs = SETTINGS | {"training": {"epochs": 9, "batch_size": 64}}
    moved = SETTINGS | {"data": {"source": "npz:elsewhere.npz", "sha256": "a"}}
    for allowed in (more_epochs, moved):
        with run.open(allowed, resume=True):
            pass
    other = SETTINGS | {"training": {"epochs": 3, "batch_size": 32}}
    with pytest.raises(RunError, match="was begun with batch_size 64, not 32"), run.open(other, resume=True):
        pass
    changed = SETTINGS | {"data": {"source": "digits", "sha256": "b"}}
    with pytest.raises(RunError, match="was begun with other data"), run.open(changed, resume=True):
        pass


def test_a_preset_is_not_changed_midway(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.open(SETTINGS, resume=False):
        pass
    with run.open(SETTINGS | {"preset": "classic"}, resume=True):  # begun when there were no presets
        pass
    accurate = SETTINGS | {"preset": "accurate", "cycle": {"epochs": 3}}
    with pytest.raises(RunError, match="was begun with preset classic, not accurate"), run.open(accurate, resume=True):
        pass


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.open(SETTINGS, resume=False), pytest.raises(RunError, match="another process"):  # noqa: SIM117
        with run.open(SETTINGS, resume=True):
            pass


def test_checkpoints_come_back_bit_for_bit(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_checkpoint() is None
    arrays: list[NDArray[Any]] = [
        np.array([[1.5, np.nan]], np.float32),
        np.array(7, np.uint32),
        np.zeros((0, 2)),
    ]
    run.write_checkpoint(arrays, [{"epoch": 1, "loss": 0.1}])
    run.write_checkpoint(arrays, [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 1 / 3}])
    stored = run.read_checkpoint()
    assert stored is not None
    assert [(a.dtype, a.shape, a.tobytes()) for a in stored[0]] == [(a.dtype, a.shape, a.tobytes()) for a in arrays]
    assert stored[1] == [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 1 / 3}]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.npz"}


def test_a_damaged_run_is_one_clear_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_best([np.arange(1000.0)])
    best = tmp_path / "best.npz"
    best.write_bytes(best.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"best\.npz: damaged"):
        run.read_best()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: cannot be read"), run.open(SETTINGS, resume=True):
        pass
    with pytest.raises(RunError, match="start afresh"):
        RunFolder(tmp_path / "other").read_best()


def test_run_folders_are_numbered(tmp_path: Path) -> None:
    assert next_run_dir(tmp_path, "digits", resume=False) == tmp_path / "digits-1"
    for name in ("digits-1", "digits-10", "digits-2", "digits-x", "digits-big-40"):
        (tmp_path / name).mkdir()
    assert next_run_dir(tmp_path, "digits", resume=False) == tmp_path / "digits-11"
    assert next_run_dir(tmp_path, "digits", resume=True) == tmp_path / "digits-10"
    with pytest.raises(RunError, match="no run of mnist"):
        next_run_dir(tmp_path, "mnist", resume=True)


def test_settings_are_stored_as_they_are(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.open(SETTINGS, resume=False):
        pass
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS
