"""What happens to a registry's folder under a running server: damage, copies by hand, collection, absence."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modelport_registry import Published, Registry, State
from tests.conftest import versioned_golden
from tests.support.bad_versions import bad_golden, doubler_golden
from tests.support.rollouts import Watched
from tests.support.rpc import canary, open_channel
from tests.support.server import run_server, wait_for

Publish = Callable[[Path, str, int], Published]
SERVING = int(health_pb2.HealthCheckResponse.SERVING)


def _variables(version: Path) -> Path:
    return next((version / "variables").glob("variables.data-*"))


def _replace_by_fifo(version: Path) -> None:
    path = _variables(version)
    path.unlink()
    os.mkfifo(path)  # to open it would wait for ever


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "hard link": (lambda v: (v.parent.parent / "elsewhere").hardlink_to(_variables(v)), "is hard-linked"),
    "fifo": (_replace_by_fifo, "is a FIFO"),
    "truncated": (lambda v: os.truncate(_variables(v), 1), "has 1 bytes"),
    "added": (lambda v: (v / "variables" / "extra").write_text(""), "was not published"),
    "empty folder": (lambda v: (v / "assets.extra").mkdir(), "was not published"),
}


def test_damage_of_any_kind_is_rejected_and_the_old_version_serves_on(
    tmp_path: Path, publish_tag: Publish, saved_models: Path
) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    with run_server(root, tmp_path) as server:
        server.wait_serving("toy", 1)
        watched = Watched(Registry(root), "toy", server.alive)
        with canary(server.address, "toy", 1):
            for number, (damage, message) in enumerate(DAMAGE.values(), start=2):
                aside, golden = Registry(tmp_path / "aside"), [versioned_golden(1)]
                damaged = aside.publish("toy", saved_models / "versioned-1", golden=golden, version=number).path
                damage(damaged)
                damaged.rename(root / "toy" / str(number))
                rejection = watched.wait_rejected(number)
                assert rejection.gate == "integrity"
                assert message in rejection.reason
        assert watched.state.aliases == {"stable": 1}


def test_a_folder_that_is_copied_in_by_hand_is_served_when_it_is_whole(tmp_path: Path, publish_tag: Publish) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    aside = tmp_path / "aside"
    publish_tag(aside, "toy", 1)
    copied = publish_tag(aside, "toy", 2).path
    with run_server(root, tmp_path) as server:
        server.wait_serving("toy", 1)
        target = root / "toy" / "2"
        files = sorted(path.relative_to(copied) for path in copied.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path == Path("manifest.json")):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            if path == Path("manifest.json"):
                publish_tag(root, "other", 3)
                server.wait_serving("other", 1)  # so the registry has been looked at since
                assert [version.version for version in server.model("toy").versions] == [1]
                # Written whole or not at all, as a copy from another folder of the same disk would be.
                (target / "manifest.tmp").write_bytes((copied / path).read_bytes())
                (target / "manifest.tmp").rename(target / path)
            else:
                (target / path).write_bytes((copied / path).read_bytes())
        server.wait_serving("toy", 2)


def test_a_version_that_is_being_loaded_is_not_collected(tmp_path: Path, bad_versions: Path) -> None:
    registry = Registry(tmp_path / "registry")

    def publish(name: str) -> int:
        golden = doubler_golden(1) if name == "good" else bad_golden(name, 2)
        return registry.publish("doubler", bad_versions / name, golden=[golden]).version

    publish("good")
    with run_server(registry.root, tmp_path, "--load-timeout", "10") as server:
        server.wait_serving("doubler", 1)
        hanging = publish("hang-at-load")
        server.wait_state("doubler", hanging, "LOADING")
        publish("good")
        # As if nobody but the server's lease protected it.
        registry.change("doubler", _forget_rollout, action="forgotten")
        report = registry.collect_garbage("doubler", keep=1)
        assert report.removed == {}
        assert hanging in registry.versions("doubler")
        wait_for(
            lambda: registry.collect_garbage("doubler", keep=1).removed == {"doubler": (hanging,)},
            "the version to be let go",
            server.alive,
        )
        server.wait_serving("doubler", 3)


def _forget_rollout(state: State) -> State:
    return replace(state, rollout=None)


def test_a_registry_that_is_away_leaves_everything_as_it_is(tmp_path: Path, publish_tag: Publish) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    with run_server(root, tmp_path) as server, open_channel(server.address) as channel:
        server.wait_serving("toy", 1)
        health: Any = health_pb2_grpc.HealthStub(channel)
        answers = health.Watch(health_pb2.HealthCheckRequest())
        assert next(answers).status == SERVING
        with canary(server.address, "toy", 1):
            away = root.rename(tmp_path / "away")
            wait_for(lambda: "can't be read" in server.log.read_text(), "the registry to be missed", server.alive)
            assert health.Check(health_pb2.HealthCheckRequest()).status == SERVING
            away.rename(root)
        publish_tag(root, "toy", 2)
        server.wait_serving("toy", 2)
        answers.cancel()
        with pytest.raises(Exception, match="CANCELLED"):  # so nothing else was ever said
            next(answers)
