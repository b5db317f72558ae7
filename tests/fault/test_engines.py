"""Engine processes that die, hang or vanish, and registries that do: callers and other versions are unharmed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from modelport.v1 import model_pb2, model_pb2_grpc
from modelport_registry import Golden, Published, Registry
from tests.conftest import versioned_golden
from tests.support.bad_versions import bad_golden
from tests.support.rollouts import AT_ONCE
from tests.support.rpc import Outcome, Stream, call, canary, engines, has_ended, open_channel, request, start
from tests.support.server import ServerProcess, run_server, wait_for

OK = grpc.StatusCode.OK
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
Publish = Callable[[Path, str, int], Published]
X = np.ones((1, 4), np.float32)


@contextmanager
def _serving(tmp_path: Path, *arguments: str, models: tuple[str, ...] = ("toy",)) -> Generator[ServerProcess]:
    """Runs a server on ``tmp_path/registry`` once all its models answer."""
    with run_server(tmp_path / "registry", tmp_path, "--threads", "1", *arguments) as server:
        for model in models:
            server.wait_serving(model)
        yield server
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]


def _front(server: ServerProcess) -> psutil.Process:
    return psutil.Process(server.process.pid)


def _one_engine(server: ServerProcess, other_than: int = 0) -> psutil.Process:
    """Returns the engine process of a server that has one."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = [engine for engine in engines(_front(server)) if engine.pid != other_than]
        return len(found) == 1

    wait_for(there, "one engine process", server.alive)
    return found[0]


def _answers(server: ServerProcess, model: str, tag: int) -> None:
    """Waits until a model answers, with a version that has a tag."""
    with open_channel(server.address) as channel:

        def answered() -> bool:
            outcome = call(channel, request(model, {"x": X}))
            return outcome.code is OK and bool(outcome.outputs["version"][0] == tag)

        wait_for(answered, f"{model} to answer with {tag}", server.alive)


@pytest.mark.parametrize("instances", [1, 2])
def test_an_engine_that_is_killed_is_started_again(tmp_path: Path, publish_tag: Publish, instances: int) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    publish_tag(root, "toy", 2)
    with _serving(tmp_path, "--instances", f"{instances}") as server, open_channel(server.address) as channel:
        engine = _one_engine(server)
        engine.suspend()

        def queued() -> None:
            # answered after the others have been queued, because it is on their connection
            assert call(channel, request("toy", {})).code is grpc.StatusCode.INVALID_ARGUMENT

        waits: list[Callable[[], Outcome]] = []
        for _ in range(instances):
            waits.append(start(channel, request("toy", {"x": X})))
            queued()
        waits += [start(channel, request("toy", {"x": X})) for _ in range(4)]
        with Stream(channel) as stream:
            stream.send(request("toy", {"x": X}, sequence=1), follow=True)
            queued()
            engine.kill()
            outcomes = [wait() for wait in waits]
            # Those that came first were in the engine; the others waited for the next one.
            assert [outcome.code for outcome in outcomes] == [UNAVAILABLE] * instances + [OK] * 4
            assert all("died" in outcome.message for outcome in outcomes[:instances])
            assert stream.next().response.version == 2
        again = _one_engine(server, other_than=engine.pid)
        assert server.version("toy", 2).state == model_pb2.ModelVersion.STATE_AVAILABLE
        again.kill()
        _answers(server, "toy", 2)
        _one_engine(server, other_than=again.pid).kill()
        server.wait_state("toy", 2, "REJECTED")
        assert "3 times within a minute" in server.version("toy", 2).reason
        server.wait_serving("toy", 1)
        _answers(server, "toy", 1)
        assert server.stop() == 0


def _publish_bad(root: Path, bad_versions: Path, name: str) -> int:
    """Publishes a bad version that has the signatures of ``publish_tag``; returns its number."""
    return Registry(root).publish("toy", bad_versions / name, golden=[bad_golden(name, 2)]).version


def test_an_engine_killed_while_it_loads_is_rejected_and_the_old_version_serves_on(
    tmp_path: Path, publish_tag: Publish, bad_versions: Path
) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    with _serving(tmp_path) as server, canary(server.address, "toy", 1):
        old = _one_engine(server)
        assert _publish_bad(root, bad_versions, "hang-at-load") == 2
        server.wait_state("toy", 2, "LOADING")
        new = next(engine for engine in engines(_front(server)) if engine != old)
        new.kill()
        server.wait_state("toy", 2, "REJECTED")
        assert server.version("toy", 2).reason == "load: the engine process ended: SIGKILL"
        assert server.model("toy").serving_version == 1
        assert engines(_front(server)) == [old]


def test_a_load_that_takes_too_long_is_rejected(tmp_path: Path, bad_versions: Path) -> None:
    _publish_bad(tmp_path / "registry", bad_versions, "hang-at-load")
    with run_server(tmp_path / "registry", tmp_path, "--load-timeout", "0.5") as server:
        rejected = server.wait_state("toy", 1, "REJECTED")
        assert rejected.reason == "load: took more than 0.5 s"
        wait_for(lambda: not engines(_front(server)), "the engine to end", server.alive)
        with open_channel(server.address) as channel:
            assert call(channel, request("toy", {"x": X})).code is UNAVAILABLE
        assert server.stop() == 0


def test_an_engine_that_hangs_in_a_batch_is_killed_and_started_again(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with _serving(tmp_path, "--run-timeout", "2") as server, open_channel(server.address) as channel:
        engine = _one_engine(server)
        engine.send_signal(signal.SIGSTOP)
        outcome = call(channel, request("toy", {"x": X}))
        assert outcome.code is UNAVAILABLE
        assert str(engine.pid) not in outcome.message
        _answers(server, "toy", 1)
        assert not psutil.pid_exists(engine.pid)


def test_what_is_loaded_serves_on_whatever_happens_to_its_folder(
    tmp_path: Path, publish_tag: Publish, saved_models: Path
) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    publish_tag(root, "other", 3)
    with _serving(tmp_path, models=("toy", "other")) as server, canary(server.address, "toy", 1, 2):
        # the serving version is deleted
        shutil.rmtree(root / "other" / "1")
        publish_tag(root, "toy", 2)
        server.wait_serving("toy", 2)  # so the registry has been looked at since
        _answers(server, "other", 3)
        # the whole registry is away for a while
        away = root.rename(tmp_path / "away")
        wait_for(lambda: "can't be read" in server.log.read_text(), "the registry to be missed", server.alive)
        _answers(server, "other", 3)
        _answers(server, "toy", 2)
        away.rename(root)
        Registry(root).publish("other", saved_models / "versioned-4", golden=[versioned_golden(4)], version=2)
        server.wait_serving("other", 2)
        _answers(server, "other", 4)


def test_one_models_damaged_state_does_not_hold_up_the_others(tmp_path: Path, publish_tag: Publish) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    publish_tag(root, "other", 3)
    with _serving(tmp_path, models=("toy", "other")) as server:
        (root / "other" / "state.json").write_text("{ broken")
        publish_tag(root, "toy", 2)
        server.wait_serving("toy", 2)
        _answers(server, "other", 3)


def test_a_version_that_does_not_reproduce_its_golden_examples_is_rejected(
    tmp_path: Path, publish_tag: Publish, saved_models: Path
) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    with _serving(tmp_path) as server, canary(server.address, "toy", 1):
        golden = versioned_golden(2)
        off, not_a_number = np.array(golden.outputs["y"]), np.array(golden.inputs["x"])
        off[1, 2] *= 1.001
        not_a_number[1, 2] = np.nan  # so the model answers NaN where a number was published
        wrong = {
            2: Golden("serving_default", golden.inputs, {**golden.outputs, "y": off}),
            3: Golden("serving_default", {"x": not_a_number}, golden.outputs),
        }
        for version, examples in wrong.items():
            Registry(root).publish("toy", saved_models / "versioned-2", golden=[examples], version=version)
            rejected = server.wait_state("toy", version, "REJECTED")
            assert rejected.reason.startswith("golden: ")
            assert "'y'" in rejected.reason
        assert server.model("toy").serving_version == 1
        with open_channel(server.address) as channel:
            outcome = call(channel, request("toy", {"x": X}, version=2))
            assert outcome.code is grpc.StatusCode.FAILED_PRECONDITION
            assert "golden" in outcome.message


class Watcher(threading.Thread):
    """Follows a model's versions and notes how many are resident beside the one in charge."""

    def __init__(self, address: str, model: str) -> None:
        super().__init__(daemon=True)
        self._channel = open_channel(address)
        stub = model_pb2_grpc.ModelServiceStub(self._channel)
        self._answers: Any = stub.WatchModels(model_pb2.WatchModelsRequest(model=model), timeout=280)
        self.most_beside = 0
        self.loaded: set[int] = set()
        self.served: list[int] = []

    def run(self) -> None:
        kinds = model_pb2.ModelVersion
        resident = {
            kinds.STATE_VERIFYING, kinds.STATE_LOADING, kinds.STATE_WARMING, kinds.STATE_AVAILABLE, kinds.STATE_DRAINING
        }  # fmt: skip
        try:
            for answer in self._answers:
                serving = answer.model.serving_version
                there = {v.version for v in answer.model.versions if v.state in resident}
                self.most_beside = max(self.most_beside, len(there - {serving}))
                self.loaded |= there
                if serving and serving not in self.served[-1:]:
                    self.served.append(serving)
        except grpc.RpcError:
            return

    def stop(self) -> None:
        self._answers.cancel()
        self.join(30)
        self._channel.close()


def test_versions_in_quick_succession_are_coalesced(tmp_path: Path, publish_tag: Publish, saved_models: Path) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    Registry(root).set_policy("toy", AT_ONCE)
    with _serving(tmp_path) as server, canary(server.address, "toy", *range(1, 17)):
        watcher = Watcher(server.address, "toy")
        watcher.start()
        pause = threading.Event()
        with open_channel(server.address) as channel, Stream(channel) as pinned:
            pinned.ask(request("toy", {"x": X}))
            for tag in range(2, 17):
                Registry(root).publish("toy", saved_models / f"versioned-{tag}", golden=[versioned_golden(tag)])
                pause.wait(0.1)  # the rate is what is tested
            server.wait_serving("toy", 16)
            _answers(server, "toy", 16)
        front = _front(server)
        wait_for(lambda: len(engines(front)) == 1, "the old versions to be retired", server.alive)
        watcher.stop()
        assert watcher.most_beside <= 2
        assert watcher.served == sorted(watcher.served)
        assert watcher.served[-1] == 16
        assert len(watcher.loaded) < 16


def test_engines_end_with_a_server_that_is_killed(tmp_path: Path, publish_tag: Publish) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with _serving(tmp_path) as server:
        engine = _one_engine(server)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(30)
        wait_for(lambda: has_ended(engine), "the engine to end")


def test_no_file_descriptor_is_lost_with_an_engine(tmp_path: Path, publish_tag: Publish) -> None:
    root = tmp_path / "registry"
    publish_tag(root, "toy", 1)
    Registry(root).set_policy("toy", AT_ONCE)
    with _serving(tmp_path) as server:
        front = _front(server)
        _answers(server, "toy", 1)
        counts: list[int] = []
        for tag in (2, 3, 4):
            publish_tag(root, "toy", tag)
            server.wait_serving("toy", tag)
            _answers(server, "toy", tag)
            wait_for(lambda: len(engines(front)) == 1, "the old engine to end", server.alive)
            counts.append(front.num_fds())
        wait_for(lambda: front.num_fds() <= counts[0] + 2, "file descriptors to be given back", server.alive, 10)
