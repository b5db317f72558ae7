"""The model as a runtime of MLServer, which finds it by ``model-settings.json``."""

from __future__ import annotations

from typing import Any

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from model import Run, load


class Classic(MLModel):
    """Runs the classic network."""

    _run: Run

    async def load(self) -> bool:
        """Loads it."""
        parameters: Any = self.settings.parameters
        self._run = load(parameters.extra["engine"], parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Runs one batch."""
        probabilities = self._run(NumpyCodec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("probabilities", probabilities)
        return InferenceResponse(model_name=self.name, outputs=[output])
