"""``modelport rollout`` and ``publish --wait`` as people run them: processes, on a registry and against a server."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from modelport.v1 import model_pb2
from modelport.v1 import rollout_pb2 as pb
from modelport_registry import Registry, RolloutPolicy, Strategy, transitions
from tests.integration.test_client_cli import MODELPORT, Ran, modelport
from tests.support.fake_server import FakeServer
from tests.support.saved_models import write_fake_saved_model

Run = Callable[..., Awaitable[Ran]]
AVAILABLE = model_pb2.ModelVersion.STATE_AVAILABLE


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions of ``m``; the first is in charge."""
    registry = Registry(tmp_path / "registry")
    model = write_fake_saved_model(tmp_path / "model")
    for _ in range(3):
        registry.publish("m", model)
    registry.change("m", lambda state: replace(state, aliases={"stable": 1}), action="test")
    return registry


@pytest.fixture
def rollout(registry: Registry) -> Run:
    async def run(command: str, *arguments: object) -> Ran:
        return await modelport("rollout", command, *arguments, "--registry", registry.root)

    return run


def advance(registry: Registry) -> None:
    registry.change("m", transitions.advance, action="test")


async def test_a_rollout_by_the_registry_alone(rollout: Run, registry: Registry) -> None:
    ran = await rollout("start", "m", 2, "--strategy", "shadow+canary", "--reason", "new data")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == "m: version 1 is in charge; version 2 is the candidate, gates\n"
    assert "paused" in (await rollout("pause", "m")).out
    advance(registry)
    assert (await rollout("resume", "m")).out.endswith("version 2 is the candidate, step 1\n")
    picture = await rollout("status", "m")
    assert "◉ shadow 100%" in picture.out
    assert "canary 1%" in picture.out
    document = json.loads((await rollout("promote", "m", "--json")).out)
    assert (document["stable"], document["phase"], document["model"]) == (2, "watch", "m")
    assert (await rollout("pause", "m")).out == "m: version 2 is in charge, and watched, paused\n"
    assert "is in charge, and watched  paused" in (await rollout("status", "m")).out
    assert (await rollout("resume", "m")).out == "m: version 2 is in charge, and watched\n"
    assert (await rollout("rollback", "m", "--reason", "complaints")).out == (
        "m: version 1 is in charge; no rollout is under way\n"
        "version 2 is not tried again, unless by modelport rollout approve m 2\n"
    )
    shown = await rollout("status", "m")
    assert "version 2, rollback: complaints" in shown.out
    assert "was rolled back" in shown.out
    assert "version 2 is the candidate" in (await rollout("approve", "m", 2)).out
    actions = [entry.action for entry in registry.journal("m")]
    assert {"rollout started", "paused", "resumed", "promoted", "rolled back", "approved"} <= set(actions)


async def test_status_of_the_registry_as_json(rollout: Run, registry: Registry) -> None:
    registry.start_rollout("m", 3, strategy=(Strategy.CANARY,), reason="why")
    document = json.loads((await rollout("status", "m", "--json")).out)
    assert (document["model"], document["stable"], document["pinned"]) == ("m", 1, None)
    assert document["rollout"]["version"] == 3
    assert document["rollout"]["steps"][0] == {"kind": "canary", "share": 0.01, "bake_s": 60.0}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["start", "m", "9"], "error: m has no version 9"),
        (["start", "m", "1"], "error: version 1 is in charge already"),
        (["start", "m", "2", "--strategy", "quick"], "error: 'quick' is no strategy"),
        (["pause", "m"], "error: no rollout is under way"),
        (["rollback", "m"], "error: "),
        (["approve", "m", "2"], "error: version 2 is not rejected"),
        (["status", "n"], "error: there is no model 'n' in "),
        (["promote", "n"], "error: there is no model 'n' in "),
    ],
)
async def test_a_mistake_is_one_line(rollout: Run, arguments: list[str], text: str) -> None:
    ran = await rollout(*arguments)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith(text)
    assert ran.err.count("\n") == 1


def canary(**fields: Any) -> pb.RolloutStatus:
    steps = [pb.RolloutStep(kind=pb.STEP_KIND_CANARY, share=share, bake_s=60) for share in (0.1, 0.5)]
    rollout = pb.Rollout(
        id="a", version=2, previous_version=1, steps=steps, phase=pb.PHASE_STEP, phase_age_s=3, bake_s=60
    )
    gate = pb.GateResult(gate="golden", outcome=pb.GATE_OUTCOME_PASSED, duration_s=0.5)
    gate.figures.update({"examples": 64, "batch_sizes": [1, 64]})
    traffic = pb.Traffic(calls=12345, errors=7, calls_per_s=2.5, p50_ms=1.234, p99_ms=23.45)
    versions = [
        pb.RolloutVersion(version=1, place=pb.ROLLOUT_PLACE_STABLE, state=AVAILABLE, share=0.9, traffic=traffic),
        pb.RolloutVersion(version=2, place=pb.ROLLOUT_PLACE_CANDIDATE, state=AVAILABLE, share=0.1, gates=[gate]),
    ]
    status = pb.RolloutStatus(model="m", generation=7, stable_version=1, rollout=rollout, versions=versions)
    status.MergeFrom(pb.RolloutStatus(verdict="too few calls to tell", **fields))
    return status


def ended(outcome: pb.RolloutOutcome.ValueType, stable: int, reason: str = "") -> pb.RolloutStatus:
    last = pb.EndedRollout(version=2, outcome=outcome, reason=reason)
    return pb.RolloutStatus(model="m", generation=9, stable_version=stable, last=last)


async def test_every_command_reaches_the_server() -> None:
    async with FakeServer() as server:
        at = ("-s", server.address)
        ran = await modelport("rollout", "start", "m", 2, "--strategy", "canary", "--reason", "why", *at)
        assert ran.out == "m: version 1 is in charge; version 2 is the candidate, gates\n"
        for command in ("pause", "resume", "promote", "rollback"):
            assert (await modelport("rollout", command, "m", *at)).status == 0
        assert (await modelport("rollout", "approve", "m", 2, *at, "--json")).status == 0
        wrong = await modelport("rollout", "start", "m", 2, "--strategy", "quick", *at)
    assert [name for name, _ in server.changes] == [
        "StartRollout", "PauseRollout", "ResumeRollout", "PromoteRollout", "RollbackRollout", "ApproveVersion",
    ]  # fmt: skip
    start = server.changes[0][1]
    assert (start.version, list(start.strategy), start.reason) == (2, [pb.STRATEGY_CANARY], "why")
    assert wrong.status == 1
    assert "there is no strategy 'quick'" in wrong.err


async def test_the_picture_of_a_server() -> None:
    async with FakeServer(rollout=canary()) as server:
        ran = await modelport("rollout", "status", "m", "-s", server.address)
        document = await modelport("rollout", "status", "m", "-s", server.address, "--json")
    assert ran.status == 0
    for text in ("step 1 of 2", "◉ canary 10%", "57 s left", "12,345", "1.23", "23.4", "✓  golden", "0.50 s"):
        assert text in ran.out, ran.out
    assert "batch sizes 1, 64 · examples 64" in ran.out
    assert "too few calls to tell" in ran.out
    versions = json.loads(document.out)["versions"]
    assert versions[0]["traffic"]["errors"] == 7
    assert versions[1]["gates"][0]["figures"] == {"examples": 64, "batch_sizes": [1, 64]}


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        (ended(pb.ROLLOUT_OUTCOME_PROMOTED, 2), 0, "m: version 2 is in charge; version 2 was promoted"),
        (ended(pb.ROLLOUT_OUTCOME_ROLLED_BACK, 1, "bake: slow"), 1, "version 2 was rolled back: bake: slow"),
        (ended(pb.ROLLOUT_OUTCOME_REJECTED, 1, "golden: off"), 1, "version 2 was rejected: golden: off"),
    ],
)
async def test_a_watch_prints_what_changes_and_ends_with_the_rollout(
    end: pb.RolloutStatus, status: int, text: str
) -> None:
    async with FakeServer(rollout=canary()) as server:
        process = await started(server)
        lines = [await line(process) for _ in range(3)]
        assert lines == [
            "m version 2: step 1 of 2: canary 10% of the calls",
            "m version 2: gate golden passed in 0.50 s",
            "m version 2: too few calls to tell",
        ]
        server.rollout = canary()
        server.rollout.rollout.step = 1
        await server.model_changed()
        assert await line(process) == "m version 2: step 2 of 2: canary 50% of the calls"
        server.rollout = end
        await server.model_changed()
        assert text in await line(process)
        assert await process.wait() == status


async def test_a_watch_goes_on_with_the_version_that_replaces_another() -> None:
    async with FakeServer(rollout=canary()) as server:
        process = await started(server, "--json")
        assert json.loads(await line(process))["rollout"]["version"] == 2
        server.rollout = ended(pb.ROLLOUT_OUTCOME_REPLACED, 1)
        server.rollout.rollout.CopyFrom(pb.Rollout(id="b", version=3, phase=pb.PHASE_GATES))
        await server.model_changed()
        assert json.loads(await line(process))["rollout"]["version"] == 3
        server.rollout = ended(pb.ROLLOUT_OUTCOME_PROMOTED, 3)
        server.rollout.last.version = 3
        await server.model_changed()
        assert json.loads(await line(process))["stable"] == 3
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("pinned", "strategy", "begins"),
    [
        (0, "CANARY", "it begins when a newer version is published, or with: modelport rollout start m VERSION"),
        (0, "MANUAL", "the model's policy is manual, so begin it with: modelport rollout start m VERSION"),
        (1, "CANARY", "version 1 is pinned, so take the pin off first: modelport pin m --remove"),
    ],
)
async def test_a_watch_waits_for_a_rollout_until_it_is_interrupted(pinned: int, strategy: str, begins: str) -> None:
    rollout = pb.RolloutStatus(model="m", stable_version=1, pinned_version=pinned)
    policy = pb.RolloutPolicy(strategy=[pb.Strategy.Value(f"STRATEGY_{strategy}")])
    async with FakeServer(rollout=rollout, policy=policy) as server:
        process = await started(server)
        assert (await line(process)).startswith("m: version 1 is in charge")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert await process.stderr.read() == f"waiting for a rollout of m; {begins}\n".encode()
        assert await process.wait() == 130


async def test_the_live_picture_on_a_terminal() -> None:
    terminal, other_end = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}
    try:
        async with FakeServer(rollout=canary()) as server:
            process = await asyncio.create_subprocess_exec(
                *MODELPORT, "rollout", "status", "m", "--watch", "-s", server.address,
                stdin=other_end, stdout=other_end, stderr=other_end, env=environment,
            )  # fmt: skip
            os.close(other_end)
            shown = await asyncio.to_thread(read_until, terminal, "57 s left")
            shown += await asyncio.to_thread(read_until, terminal, "56 s left")  # time goes on by itself
            server.rollout = ended(pb.ROLLOUT_OUTCOME_PROMOTED, 2)
            await server.model_changed()
            shown += await asyncio.to_thread(read_until, terminal, "promoted")
            rest = asyncio.create_task(asyncio.to_thread(read_until, terminal, None))  # it must not fill up meanwhile
            assert await process.wait() == 0
            await rest
    finally:
        os.close(terminal)
    assert "\x1b[" in shown
    assert "12,345" in shown


def read_until(terminal: int, text: str | None) -> str:
    """Returns what a terminal shows up to ``text``, or until nobody writes any more."""
    shown = ""
    while text is None or text not in shown:
        more = read_some(terminal)
        assert more or text is None, f"the other end was closed, and never said {text!r}: {shown}"
        if not more:
            break
        shown += more
    return shown


def read_some(terminal: int) -> str:
    """Returns what a terminal has to show next; nothing once its other end is closed."""
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace")
    except OSError:  # how a terminal says so
        return ""


async def started(server: FakeServer, *arguments: str) -> asyncio.subprocess.Process:
    command = [*MODELPORT, "rollout", "status", "m", "--watch", "-s", server.address, *arguments]
    return await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().rstrip("\n")


class TestPublishAndWait:
    async def publish(self, registry: Registry, *arguments: object) -> asyncio.subprocess.Process:
        model = registry.root.parent / "model"
        return await asyncio.create_subprocess_exec(
            *MODELPORT, "publish", "m", str(model), "--registry", str(registry.root), *map(str, arguments),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def waits(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while b"waits for a server" not in (said := await process.stderr.readline()):
            assert said, "it ended"

    async def test_until_it_is_in_charge(self, registry: Registry) -> None:
        process = await self.publish(registry, "--wait")
        await self.waits(process)
        registry.start_rollout("m", 4)
        advance(registry)
        out, err = await process.communicate()
        assert process.returncode == 0, err
        assert out.decode().endswith("m version 4 is in charge\n")

    async def test_until_it_is_rejected(self, registry: Registry) -> None:
        process = await self.publish(registry, "--wait", "--json")
        await self.waits(process)
        registry.change(
            "m", lambda s: transitions.reject(s, 4, "golden", "row 7", datetime.now(UTC), "a"), action="rejected"
        )
        out, err = await process.communicate()
        assert process.returncode == 1
        document = json.loads(out)
        assert (document["version"], document["stable"], document["gate"]) == (4, False, "golden")
        assert "error: m version 4 was rejected at the gate golden: row 7" in err.decode()

    async def test_what_was_published_is_told_even_if_nobody_says_what_became_of_it(self, registry: Registry) -> None:
        process = await self.publish(registry, "--wait", "--json")
        await self.waits(process)
        (registry.root / "m" / "4").rename(registry.root / "elsewhere")
        out, err = await process.communicate()
        assert process.returncode == 1
        document = json.loads(out)
        assert (document["version"], document["stable"]) == (4, None)
        assert document["reason"].startswith("m has no version 4")
        assert f"error: {document['reason']}" in err.decode()

    async def test_what_was_published_is_told_even_if_the_server_goes(self, registry: Registry) -> None:
        async with FakeServer(versions={1, 2, 3, 4}, rollout=self.first_step()) as server:
            process = await self.publish(registry, "--wait", "--json", "--server", server.address)
            assert process.stderr is not None
            while b"step 1" not in (said := await process.stderr.readline()):
                assert said, "it ended"
        out, err = await process.communicate()
        assert process.returncode == 1
        document = json.loads(out)
        assert (document["version"], document["stable"]) == (4, None)
        assert f"error: {document['reason']}" in err.decode()

    async def test_not_at_all_where_nothing_will_happen(self, registry: Registry) -> None:
        registry.set_policy("m", RolloutPolicy(strategy=(Strategy.MANUAL,)))
        process = await self.publish(registry, "--wait")
        _, err = await process.communicate()
        assert process.returncode == 1
        assert "policy is manual; start it: modelport rollout start m 4" in err.decode()

    async def test_by_what_a_server_says(self, registry: Registry) -> None:
        async with FakeServer(versions={1, 2, 3, 4}, serving=4) as server:
            process = await self.publish(registry, "--wait", "--server", server.address)
            out, _ = await process.communicate()
        assert process.returncode == 0
        assert "m version 4 is in charge" in out.decode()

    @staticmethod
    def first_step() -> pb.RolloutStatus:
        """The rollout of version 4, which has had 34 calls in 3 seconds."""
        status = canary()
        status.rollout.version = status.versions[1].version = 4
        status.versions[1].traffic.calls = 34
        return status

    async def test_how_far_a_step_is(self, registry: Registry) -> None:
        rules = pb.RolloutPolicy(min_calls=100)
        async with FakeServer(versions={1, 2, 3, 4}, rollout=self.first_step(), policy=rules) as server:
            process = await self.publish(registry, "--wait", "--server", server.address)
            assert process.stderr is not None
            text = b"m version 4: step 1 of 2 (canary 10%): 34 of 100 calls, 3 s of 60 s\n"
            while (said := await process.stderr.readline()) != text:
                assert said, "it ended"
            server.rollout, server.serving = None, 4
            await server.model_changed()
            assert await process.stderr.readline() == b"m version 4: it is in charge\n"
            assert await process.wait() == 0

    async def test_how_far_a_step_is_on_a_terminal(self, registry: Registry) -> None:
        terminal, other_end = pty.openpty()
        environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm-256color"}
        rules = pb.RolloutPolicy(min_calls=100)
        try:
            async with FakeServer(versions={1, 2, 3, 4}, rollout=self.first_step(), policy=rules) as server:
                process = await asyncio.create_subprocess_exec(
                    *MODELPORT, "publish", "m", str(registry.root.parent / "model"), "-r", str(registry.root),
                    "--wait", "--server", server.address,
                    stdin=other_end, stdout=other_end, stderr=other_end, env=environment,
                )  # fmt: skip
                os.close(other_end)
                await asyncio.to_thread(read_until, terminal, "34 of 100 calls, 3 s of 60 s")
                server.rollout, server.serving = None, 4
                await server.model_changed()
                await asyncio.to_thread(read_until, terminal, "m version 4 is in charge")
                rest = asyncio.create_task(asyncio.to_thread(read_until, terminal, None))
                assert await process.wait() == 0
                await rest
        finally:
            os.close(terminal)

    async def test_nothing_is_published_where_nobody_could_say_what_becomes_of_it(self, registry: Registry) -> None:
        async with FakeServer() as server:
            stale = await self.publish(registry, "--wait", "--server", server.address)
            _, stale_said = await stale.communicate()
            server.name = "other"
            other = await self.publish(registry, "--wait", "--server", server.address)
            _, other_said = await other.communicate()
        gone = await self.publish(registry, "--wait", "--server", server.address)
        _, gone_said = await gone.communicate()
        assert (stale.returncode, other.returncode, gone.returncode) == (1, 1, 1)
        assert registry.versions("m") == [1, 2, 3]
        for said, text in ((stale_said, "has no version 3 of m"), (other_said, "does not serve m, but")):
            assert said.decode().startswith(f"error: nothing was published: the server at {server.address} {text}")
        no_server = f"error: nothing was published: no server answers at {server.address} (connection refused)"
        assert gone_said.decode().startswith(no_server)
        assert all(said.count(b"\n") == 1 for said in (stale_said, other_said, gone_said))

    async def test_the_first_version_of_a_model_needs_no_server_that_knows_it(self, registry: Registry) -> None:
        async with FakeServer(name="other") as server:
            process = await asyncio.create_subprocess_exec(
                *MODELPORT, "publish", "new", str(registry.root.parent / "model"), "-r", str(registry.root),
                "--wait", "--wait-timeout", "0.1", "--server", server.address, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            _, said = await process.communicate()
        assert registry.versions("new") == [1], said.decode()

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--wait-timeout", "5"], "--server and --wait-timeout go with --wait"),
            (["--wait", "--wait-timeout", "0"], "--wait-timeout must be above 0"),
        ],
    )
    async def test_mistakes(self, registry: Registry, arguments: list[str], text: str) -> None:
        process = await self.publish(registry, *arguments)
        _, err = await process.communicate()
        assert process.returncode == 1
        assert text in err.decode()
        assert registry.versions("m") == [1, 2, 3]
