"""The rollout manager: what one model's failure may cost the others."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from modelport_server.options import ServerOptions
from modelport_server.rollout import manager as managers
from modelport_server.rollout.manager import RolloutManager
from modelport_server.rollout.model import ModelRollout
from modelport_server.rollout.status import StatusBoard
from modelport_server.routing import Router
from tests.support.server import wait_for


async def test_a_model_that_fails_to_end_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []

    class Zygote:
        def __init__(self, ahead: object) -> None:
            """Takes nothing over."""

        def end_ahead(self) -> None:
            """Has nothing to end."""

        def start(self) -> None:
            """Starts nothing."""

        async def stop(self) -> None:
            ended.append("the zygote")

    async def stop(self: ModelRollout) -> None:
        if not ended:
            ended.append("the first model")
            raise RuntimeError("stuck")
        await asyncio.sleep(0)  # ends after the first one has failed
        ended.append("the second model")

    monkeypatch.setattr(managers, "Spawner", Zygote)
    monkeypatch.setattr(ModelRollout, "stop", stop)
    manager = RolloutManager(ServerOptions(registry=tmp_path, models=("a", "b")), Router(), StatusBoard())
    running = asyncio.create_task(manager.run())
    await asyncio.to_thread(wait_for, lambda: caplog.text.count("no such model yet") == 2, "both models")
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await manager.stop()
    assert ended == ["the first model", "the second model", "the zygote"]
    assert "a: its engines could not be ended" in caplog.text
