"""Step 6, deployment: export a SavedModel and publish it with everything a server checks it by."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelport.names import DEFAULT_SIGNATURE
from modelport_registry import JSON, Golden, Lineage, Published, Registry
from modelport_trainer import _libraries
from modelport_trainer.data import Dataset
from modelport_trainer.errors import ExportError
from modelport_trainer.evaluation import margins
from modelport_trainer.prediction import SavedModelPredictor

if TYPE_CHECKING:
    from numpy.typing import NDArray


"""The signature that exported models have."""

_GOLDEN_FEWEST = 32
_GOLDEN_HARDEST = 32
_GOLDEN_OTHERS = 32
_LEAST_MARGIN = 1e-3
"""Nearer ties are no examples: an engine within the tolerance may name the other class."""


def export_classifier(model: Any, folder: Path) -> None:
    """Writes a trained classifier as a SavedModel that needs neither Keras nor this package.

    Its signature ``serving_default`` takes ``images`` uint8 ``[batch, height, width]`` and returns
    ``probabilities`` float32 ``[batch, classes]`` and ``classes`` int64 ``[batch]``.

    Args:
        model: A Keras model from images to probabilities.
        folder: Where to write; what is there is replaced.

    Raises:
        ExportError: If the folder cannot be written.
    """
    tf = _libraries.tensorflow()

    def answer(images: Any) -> dict[str, Any]:
        probabilities = model(images, training=False)
        return {"probabilities": probabilities, "classes": tf.argmax(probabilities, axis=1)}

    spec = tf.TensorSpec(model.input.shape, tf.uint8)
    _save(folder, answer, {"images": spec}, model)


def export_keras(model: Any, folder: Path) -> None:
    """Writes any Keras model as a SavedModel with the signature ``serving_default``.

    Inputs are named after their ``Input``; outputs after their key where the model returns a dict, and
    after the layer that they come from elsewhere.

    Args:
        model: A functional Keras model, or a sequential one with an ``Input``.
        folder: Where to write; what is there is replaced.

    Raises:
        ExportError: If the model is a subclassed one, has two outputs of one name, or cannot be written.
    """
    tf = _libraries.tensorflow()
    taken, given_back = _structures(model)
    names = _output_names(model, given_back)

    def answer(**inputs: Any) -> dict[str, Any]:
        given = [inputs[tensor.name] for tensor in tf.nest.flatten(taken)]
        outputs = model(tf.nest.pack_sequence_as(taken, given), training=False)
        return dict(zip(names, tf.nest.flatten(outputs), strict=True))

    specs = {tensor.name: tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tf.nest.flatten(taken)}
    _save(folder, answer, specs, model)


def choose_golden(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Picks the rows to publish as examples: the hardest ones, and others from every class in turn.

    Rows that are nearly a tie are left out, unless the model is so undecided that few others remain.

    Returns:
        Row indices, ascending; 64 at the most.
    """
    margin = margins(probabilities)
    clearest_first = np.argsort(-margin, kind="stable")
    usable = clearest_first[: max(int((margin >= _LEAST_MARGIN).sum()), _GOLDEN_FEWEST)]
    others, hardest = usable[:-_GOLDEN_HARDEST], usable[-_GOLDEN_HARDEST:]
    # Ordering by each row's rank within its class takes one row of every class before a second one.
    by_class = others[np.argsort(labels[others], kind="stable")]
    rank = np.arange(len(by_class)) - np.searchsorted(labels[by_class], labels[by_class])
    chosen = by_class[np.lexsort((labels[by_class], rank))][:_GOLDEN_OTHERS]
    return np.sort(np.concatenate([hardest, chosen])).astype(np.int64)


def golden_examples(predictor: SavedModelPredictor, inputs: Mapping[str, Any]) -> Golden:
    """Returns examples with the outputs that the stored model itself gives, computed by TensorFlow."""
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    return Golden(signature=DEFAULT_SIGNATURE, inputs=arrays, outputs=predictor.run(arrays))


def classifier_golden(predictor: SavedModelPredictor, dataset: Dataset, probabilities: NDArray[np.float32]) -> Golden:
    """Returns examples, half of them the images that the model finds hardest.

    Args:
        predictor: The exported model, reloaded.
        dataset: Its test images are chosen from; training images are added where those are too few.
        probabilities: What the model says to the test images, float32 ``[rows, classes]``.
    """
    images, labels = dataset.test.images, dataset.test.labels
    if len(images) < _GOLDEN_FEWEST:
        more = dataset.train.take(np.arange(min(len(dataset.train), _GOLDEN_FEWEST)))
        images = np.concatenate([images, more.images])
        labels = np.concatenate([labels, more.labels])
        probabilities = predictor.predict({"images": images})["probabilities"]
    return golden_examples(predictor, {"images": images[choose_golden(probabilities, labels)]})


def publish_keras(
    registry: Registry,
    name: str,
    model: Any,
    golden_inputs: Mapping[str, Any],
    *,
    metrics: Mapping[str, float] | None = None,
    lineage: Lineage | None = None,
    tags: Sequence[str] = (),
    aliases: Sequence[str] = (),
    report: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Published:
    """Exports any Keras model and publishes it; several inputs and outputs are fine.

    Args:
        registry: Where to publish.
        name: The model's name there.
        model: A functional Keras model, or a sequential one with an ``Input``.
        golden_inputs: Inputs by name to compute the version's examples from; dimension 0 is the example.
        metrics: Figures to keep with the version.
        lineage: Where the model comes from.
        tags: Words of your own.
        aliases: Aliases to point at the new version.
        report: A folder to keep with the version.
        on_progress: Called with the bytes copied and the bytes in all.

    Returns:
        What was written.

    Raises:
        ExportError: If the model cannot be exported or does not take ``golden_inputs``.
        RegistryError: If it cannot be published.
    """
    with tempfile.TemporaryDirectory(prefix="modelport-export-") as scratch:
        folder = Path(scratch) / "saved_model"
        export_keras(model, folder)
        golden = golden_examples(SavedModelPredictor(folder), golden_inputs)
        return registry.publish(
            name,
            folder,
            golden=[golden],
            metrics=metrics,
            lineage=lineage,
            tags=tags,
            aliases=aliases,
            report=report,
            on_progress=on_progress,
        )


def lineage_of(source: str, data_sha256: str, parameters: Mapping[str, JSON]) -> Lineage:
    """Returns where a version comes from, with the revision of this package's code."""
    from modelport_trainer._revision import code_revision

    return Lineage(data_sha256=data_sha256, parameters=dict(parameters), code_revision=code_revision(), source=source)


def _save(folder: Path, answer: Callable[..., Any], specs: Mapping[str, Any], model: Any) -> None:
    """Saves one function with the variables it reads; the optimiser and Keras's own objects stay behind."""
    tf = _libraries.tensorflow()
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    function = tf.function(answer, autograph=False)
    try:
        signature = function.get_concrete_function(
            **{name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in specs.items()}
        )
        if folder.exists():
            shutil.rmtree(folder)
        tf.saved_model.save(module, str(folder), signatures={DEFAULT_SIGNATURE: signature})
    except (OSError, ValueError, TypeError, tf.errors.OpError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"{folder}: the model cannot be exported ({reason})") from error


def _structures(model: Any) -> tuple[Any, Any]:
    """Returns what a model takes and gives, as it was built: a symbolic tensor, or a list or dict of them."""
    if not getattr(model, "inputs", None):
        raise ExportError(
            f"{model.name}: only functional Keras models, and sequential ones with an Input, can be "
            "exported; write others with tf.saved_model.save and publish that folder"
        )
    if isinstance(model, _libraries.keras().Sequential):
        return model.inputs[0], model.outputs[0]
    return model.input, model.output


def _output_names(model: Any, outputs: Any) -> list[str]:
    """Names outputs in the order in which TensorFlow flattens them: dicts by key."""
    if isinstance(outputs, dict):
        return sorted(map(str, cast("dict[str, Any]", outputs)))
    if isinstance(model, _libraries.keras().Sequential):
        return [str(model.layers[-1].name)]
    names = [str(name) for name in model.output_names]
    if len(set(names)) != len(names):
        raise ExportError(f"{model.name}: outputs of one name ({', '.join(names)}); name its output layers")
    return names
