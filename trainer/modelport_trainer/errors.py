"""Errors of the trainer.

``ModelportError``
    ``TrainerError``
        ``DataError``      data that cannot be read, or that no model should be trained on
        ``OptionError``    an option whose value makes no sense
        ``TrainingError``  training that came to no result
        ``RunError``       a run folder that cannot be used
        ``ExportError``    a model that cannot be exported or called
"""

from __future__ import annotations

from modelport.exceptions import ModelportError


class TrainerError(ModelportError):
    """Anything that went wrong in the trainer; its text is one line for people."""


class DataError(TrainerError):
    """Data that cannot be read, or that no model should be trained on."""


class OptionError(TrainerError, ValueError):
    """An option whose value makes no sense."""


class TrainingError(TrainerError):
    """Training that came to no result."""


class RunError(TrainerError):
    """A run folder that cannot be used: taken, of another run, or damaged."""


class ExportError(TrainerError):
    """A model that cannot be exported, or an exported one that cannot be called."""
