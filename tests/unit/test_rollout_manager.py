"""The rollout manager: what one model's failure may cost the others."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from modelport_registry import Registry
from modelport_server.engines import ahead, spawner
from modelport_server.engines.choice import Candidate
from modelport_server.options import EngineRules, ServerOptions
from modelport_server.rollout import manager as managers
from modelport_server.rollout import model as models
from modelport_server.rollout.manager import RolloutManager
from modelport_server.rollout.model import ModelRollout
from modelport_server.rollout.status import StatusBoard
from modelport_server.routing import Router
from modelport_server.servable import Servable
from tests.support.launch import compare_speed_at_once, run_stub
from tests.support.server import wait_for
from tests.support.stub_engine import HOLD, stub_golden, write_stub


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


async def test_a_candidate_s_batches_and_usual_engine_are_those_of_the_version_that_it_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOLD, "")
    for module in (ahead, spawner):
        monkeypatch.setattr(module, "run_module", run_stub)
    monkeypatch.setattr(models, "compare_speed", compare_speed_at_once)
    usual: list[Candidate | None] = []

    class Recorded(Servable):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            usual.append(options["usual"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(models, "Servable", Recorded)
    registry = Registry(tmp_path / "registry")

    def publish(tag: int) -> None:
        registry.publish("m", write_stub(tmp_path / f"stub-{tag}", tag), golden=[stub_golden(tag)])

    options = ServerOptions(registry=registry.root, engines={"": EngineRules(engine="tensorflow")})
    board, router = StatusBoard(), Router()
    manager = RolloutManager(options, router, board)
    running = asyncio.create_task(manager.run())

    def in_charge() -> int | None:
        status = board.model("m")
        return status.serving if status is not None else None

    try:
        publish(1)
        await asyncio.to_thread(wait_for, lambda: in_charge() == 1, "the first version")
        first = router.resolve("m")
        first.batch_size, first.efficient_batch_size = 77, 33
        publish(2)
        await asyncio.to_thread(wait_for, lambda: in_charge() == 2, "the second version")
        second = router.resolve("m")
        assert (second.version, second.batch_size, second.efficient_batch_size) == (2, 77, 33)
        assert usual == [None, Candidate("tensorflow")]
        assert {servable.version for servable in manager.servables} <= {1, 2}
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await manager.stop()
