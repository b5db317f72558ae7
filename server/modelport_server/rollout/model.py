"""One model's rollout: asks the policy what to do, and does it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any

from modelport.exceptions import ModelportError
from modelport_registry import (
    JSON,
    IntegrityError,
    InvalidModelError,
    Manifest,
    Phase,
    Registry,
    StepKind,
    transitions,
)
from modelport_registry import State as Desired
from modelport_server.engines.choice import Candidate, candidates
from modelport_server.engines.cores import CoreSharing
from modelport_server.engines.parallel import Parallelism
from modelport_server.engines.process import LoadOrder, RejectedError
from modelport_server.engines.spawner import Spawner
from modelport_server.gates.result import INTEGRITY, LOAD, SIGNATURE, SPEED, Outcome
from modelport_server.gates.signature import SignatureChangedError, check_signatures
from modelport_server.gates.speed import compare_speed, probe_sizes, shared_examples
from modelport_server.options import BatchLimits, ServerOptions
from modelport_server.rollout import policy, reporting
from modelport_server.rollout.bake import Bake
from modelport_server.rollout.comparison import VerdictKind
from modelport_server.rollout.decisions import Decision, Decisions
from modelport_server.rollout.lifecycle import COMING, State
from modelport_server.rollout.policy import Action, ModelSnapshot, Verb
from modelport_server.rollout.status import RolloutStatus, StatusBoard
from modelport_server.rollout.tracking import Tracked
from modelport_server.routing import Canary, Router
from modelport_server.servable import Servable

_log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.5
_LONGEST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class ModelView:
    """What the registry holds of one model."""

    versions: Mapping[int, Manifest | None]
    """Every version with its manifest; None for one that can't be read."""
    desired: Desired
    looked_at_s: float
    """When reading it began, on the monotonic clock."""


class ModelRollout:
    """One model's versions.

    Args:
        name: the model.
        options: the server's options.
        router: told which version answers.
        board: told what there is to know.
        loads: bounds how many versions load at once, over all models.
        changed: called when the policy should be asked again.
        spawner: forks engine processes, if it can.
        cores: told what engine processes do, if anything is.
        has_callers: returns whether any version of any model has calls under way, or had some a moment ago.
    """

    def __init__(
        self,
        name: str,
        options: ServerOptions,
        router: Router,
        board: StatusBoard,
        loads: asyncio.Semaphore,
        changed: Callable[[], None],
        spawner: Spawner | None = None,
        cores: CoreSharing | None = None,
        has_callers: Callable[[], bool] = lambda: False,
    ) -> None:
        self._name = name
        self._has_callers = has_callers
        self._spawner = spawner
        self._cores = cores
        self._options = options
        self._registry = Registry(options.registry)
        self._router = router
        self._route = router.route(name)
        self._board = board
        self._loads = loads
        self._changed = changed
        self._decisions = Decisions(self._registry, name, changed)
        self._bake = Bake()
        self._versions: dict[int, Tracked] = {}
        self._promoted_at_s: dict[datetime, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading: set[asyncio.Task[None]] = set()
        """Those of its tasks that nobody waits for when the server stops."""
        self._warned: set[str] = set()
        self._logged = self._told = ""
        self._listed_generation = 0
        board.rollouts[name] = self.status

    @property
    def empty(self) -> bool:
        """Whether nothing is left of it, in the registry or in memory."""
        return not self._versions and not self._tasks and not self._decisions.busy

    @property
    def serving(self) -> int | None:
        """The version in charge on this server."""
        return self._route.serving.version if self._route.serving is not None else None

    @property
    def calls(self) -> int:
        """How many calls its versions have under way."""
        return sum(one.servable.leases for one in self._versions.values() if one.servable is not None)

    @property
    def has_callers(self) -> bool:
        """Whether any of its versions has calls under way, or had some a moment ago."""
        return any(one.servable is not None and one.servable.has_callers for one in self._versions.values())

    @property
    def servables(self) -> list[Servable]:
        """Those that are loaded."""
        found = [one.servable for one in list(self._versions.values())]
        return [servable for servable in found if servable is not None]

    @property
    def copied_to(self) -> int:
        """The engine process that gets copies of calls and nothing else; 0 for none."""
        servable = self._bake.copied_to
        return servable.pid if servable is not None and not servable.has_callers else 0

    @property
    def loading(self) -> bool:
        """Whether any of its versions is on its way through the gates, or may be once what is decided is written."""
        return self._decisions.busy or any(tracked.state in COMING for tracked in self._versions.values())

    @property
    def baking(self) -> bool:
        """Whether a candidate is being compared, or its time is running."""
        rollout = self.desired.rollout
        return rollout is not None and rollout.phase is not Phase.GATES

    @property
    def desired(self) -> Desired:
        """What the registry asks for, as far as is known."""
        return self._decisions.desired

    def observe(self, view: ModelView) -> None:
        """Takes in what the registry holds now."""
        first = not self._versions
        self._decisions.observe(view.desired, view.looked_at_s)
        self._listed_generation = view.desired.generation
        for number, manifest in view.versions.items():
            self._versions.setdefault(number, Tracked(number, manifest=manifest))
        for number, tracked in list(self._versions.items()):
            tracked.in_registry = number in view.versions
            if not tracked.in_registry and tracked.state in (State.DISCOVERED, State.RETIRED, State.REJECTED):
                del self._versions[number]
        seen_s = float("-inf") if first else monotonic()  # one from before this server began is long over
        known = self._promoted_at_s
        self._promoted_at_s = {ended.at: known.get(ended.at, seen_s) for ended in self.desired.promotions}

    def advance(self) -> None:
        """Does whatever there is to do."""
        previous: Action | None = None
        while True:
            self._take_in()
            action = policy.next_action(self._snapshot())
            if action is None:
                break
            if action == previous:  # it would go on for ever, and take all memory with it
                raise RuntimeError(f"{self._name}: {action} changed nothing")
            self._carry_out(action)
            previous = action
        self._warn_of_missing_stable()
        self.publish_status()

    def _take_in(self) -> None:
        """Brings what follows at once from the desired state up to date."""
        self._route.aliases = self.desired.aliases
        for number, tracked in self._versions.items():
            rejection = self.desired.rejected.get(number)
            if rejection is not None:
                tracked.accused = False
                if tracked.state in (State.DISCOVERED, State.RETIRED):
                    tracked.become(State.REJECTED, f"{rejection.gate}: {rejection.reason}")
            elif tracked.state is State.REJECTED and not tracked.accused:
                tracked.become(State.DISCOVERED, "approved again")
        self._log_progress()
        available = self._available()
        self._bake.follow(self.desired, available)
        self._share(available)

    def _log_progress(self) -> None:
        """Says in the log what has become of the rollout, whoever decided it."""
        text = reporting.progress_text(self.desired)
        if text != self._logged:
            self._logged = text
            if text and text != self._told:
                _log.info("%s%s", self._name, text)

    def _available(self) -> dict[int, Servable]:
        return {n: t.loaded for n, t in self._versions.items() if t.state is State.AVAILABLE}

    def _share(self, available: Mapping[int, Servable]) -> None:
        """Gives the candidate its share of the calls."""
        found = policy.share(self._snapshot())
        verdict = self._bake.verdict(self.desired)
        # It gets no call more, however long it takes to write that down.
        worse = verdict is not None and verdict.kind is VerdictKind.WORSE
        if found is None or found[1] is not StepKind.CANARY or worse:
            self._route.canary = None
            return
        number, _, share = found
        canary = self._route.canary
        if canary is None or (canary.servable, canary.share) != (available[number], share):
            self._route.canary = Canary(available[number], share)

    def _snapshot(self) -> ModelSnapshot:
        now = monotonic()
        promoted = transitions.promotion(self.desired)
        return ModelSnapshot(
            versions={n: tracked.snapshot(now) for n, tracked in self._versions.items()},
            desired=self.desired,
            serving=self.serving,
            max_beside_stable=self._options.rollout.max_beside_stable,
            pinned_stream_limit_s=self._options.rollout.pinned_stream_limit_s,
            phase_age_s=self._bake.age_s,
            promoted_age_s=now - self._promoted_at_s.get(promoted.at, now) if promoted is not None else float("inf"),
            verdict=self._bake.verdict(self.desired),
            deciding=self._decisions.deciding,
            listing_is_current=self.desired.generation <= self._listed_generation,
        )

    def _carry_out(self, action: Action) -> None:
        _log.debug("%s@%d: %s", self._name, action.version, action.verb.value)
        if action.verb in policy.DECISIONS:
            self._decide(action)
            return
        tracked = self._versions[action.version]
        if action.verb is Verb.LOAD:
            self._begin_to_load(tracked)
        elif action.verb is Verb.COMPARE:
            tracked.comparing = True
            self._loading.add(self._spawn(self._compare(tracked)))
        elif action.verb is Verb.ABANDON:
            self._abandon(tracked)
        elif action.verb is Verb.SERVE:
            self._serve(tracked)
        elif action.verb is Verb.DRAIN:
            self._drain(tracked)
        elif action.verb is Verb.REVIVE:
            self._make_available(tracked)
        elif action.verb is Verb.END_STREAMS:
            tracked.loaded.retire_streams.set()
        elif action.verb is Verb.RETIRE:
            self._retire(tracked)

    def _drain(self, tracked: Tracked) -> None:
        """Gives a version no more calls; what waits for one that was rejected goes to the version in charge."""
        tracked.become(State.DRAINING, "another version has taken over")
        self._route.available.pop(tracked.version, None)
        heir = self._route.serving
        if tracked.version in self.desired.rejected and heir is not None and heir is not tracked.servable:
            tracked.loaded.hand_over(heir)

    def _decide(self, action: Action) -> None:
        self._decisions.decide(self._decision(action))

    def _decision(self, action: Action) -> Decision:
        now, actor = datetime.now(UTC), self._options.actor
        number, rollout = action.version, self.desired.rollout
        if action.verb is Verb.START:
            begin = partial(transitions.start, version=number, rollout_id=uuid.uuid4().hex, now=now, actor=actor)
            return Decision(begin, "rollout started", number, "it was published")
        details: dict[str, JSON] = {"phase_age_s": round(self._bake.age_s, 3)}
        if rollout is not None:
            details |= {"rollout": rollout.id, "phase": rollout.phase.value, "step": rollout.step}
        verdict = self._bake.verdict(self.desired)
        reason = verdict.reason if verdict is not None else ""
        worse = verdict is not None and verdict.kind is VerdictKind.WORSE
        details |= dict(verdict.figures) if verdict is not None else {}
        if action.verb is Verb.ROLL_BACK:
            reason = reason if worse else "its folder is gone"
            back = partial(transitions.reject, version=number, gate="bake", reason=reason, now=now, actor=actor)
            return Decision(back, "rolled back", number, reason, details)
        if action.verb is Verb.COMPLETE:
            return Decision(partial(transitions.complete, now=now), "rollout completed", number, reason, details)
        assert rollout is not None
        if rollout.phase is Phase.GATES:
            details["gates"] = [gate.to_json() for gate in self._versions[number].gates]
        last = rollout.phase is Phase.STEP and rollout.step == len(rollout.steps) - 1
        promotes = last or not rollout.steps
        advance = partial(transitions.advance, baseline=self._bake.totals(rollout.previous))
        return Decision(advance, "promoted" if promotes else "step", number, reason, details)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._loading.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: a step of the rollout failed", self._name, exc_info=error)
        self._changed()

    def _begin_to_load(self, tracked: Tracked) -> None:
        tracked.become(State.VERIFYING)
        tracked.gates = ()
        tracked.loading = self._spawn(self._load(tracked))
        self._loading.add(tracked.loading)

    def _abandon(self, tracked: Tracked) -> None:
        assert tracked.loading is not None
        tracked.loading.cancel()
        tracked.become(State.DISCOVERED, "it was not wanted any more while it was loading")

    async def _load(self, tracked: Tracked) -> None:
        number, hold = tracked.version, contextlib.ExitStack()
        try:
            async with self._loads:
                _log.info("%s@%d: loading", self._name, number)
                started = monotonic()
                servable = await self._loaded(tracked, hold)
        except RejectedError as error:
            tracked.gates = error.gates
            self._reject(tracked, error.gate, str(error))
        except (IntegrityError, InvalidModelError) as error:
            self._reject(tracked, INTEGRITY, str(error))
        except (ModelportError, OSError) as error:
            self._put_off(tracked, error)
        except Exception:  # else the version would be on its way for ever
            _log.exception("%s@%d: loading failed", self._name, number)
            self._reject(tracked, LOAD, "the server failed to load it; its log says more")
        else:
            tracked.servable, tracked.hold = servable, hold.pop_all()
            self._make_available(tracked)
            self._note_loaded(tracked, servable, monotonic() - started)
        finally:
            hold.close()

    async def _loaded(self, tracked: Tracked, hold: contextlib.ExitStack) -> Servable:
        """Returns a version's servable once it has passed every gate; ``hold`` then keeps its folder."""
        rollout = self.desired.rollout
        servable = await self._new_servable(tracked, hold)
        await servable.start()
        try:
            tracked.gates = servable.gates
            await self._compare_speed(tracked, servable)
        except BaseException:
            await servable.stop()
            raise
        if rollout is not None and rollout.version == tracked.version:
            tracked.compared = rollout.id
        return servable

    async def _compare(self, tracked: Tracked) -> None:
        """Puts a candidate that was loaded before it was one through the gates that take the stable version."""
        rollout, stable = self.desired.rollout, self._stable_beside(tracked.version)
        if rollout is None or rollout.version != tracked.version:
            tracked.comparing = False
            return
        try:
            if stable is not None and stable.manifest is not None and tracked.manifest is not None:
                allowed = self.desired.policy.allow_signature_changes
                check_signatures(stable.manifest.signatures, tracked.manifest.signatures, allowed, model=self._name)
            await self._compare_speed(tracked, tracked.loaded)
        except SignatureChangedError as error:
            await self._lose(tracked, SIGNATURE, str(error))
        except RejectedError as error:
            await self._lose(tracked, error.gate, str(error))
        except (IntegrityError, InvalidModelError) as error:
            await self._lose(tracked, INTEGRITY, str(error))
        except (ModelportError, OSError) as error:
            _log.warning("%s@%d: can't be compared now: %s", self._name, tracked.version, error)
            await asyncio.sleep(_FIRST_RETRY_S)
        except Exception:  # else it would be tried again at once, for ever
            _log.exception("%s@%d: comparing failed", self._name, tracked.version)
            await self._lose(tracked, SPEED, "the server failed to compare it; its log says more")
        else:
            tracked.compared = rollout.id
        finally:
            tracked.comparing = False

    async def _compare_speed(self, tracked: Tracked, servable: Servable) -> None:
        """Measures a candidate beside the stable version: the gate that takes both of them.

        Raises:
            RejectedError: if it is too slow.
            NotMeasurableError: if it can't be told now.
        """
        beside = self._servable_beside(tracked.version)
        golden = await asyncio.to_thread(self._registry.golden, self._name, tracked.version)

        def aside() -> Set[int]:
            # Where nobody calls anything there is nobody to be spared, and both may have all cores.
            versions = (beside, servable) if self._has_callers() else (servable,)
            return {one.pid for one in versions if one is not None and not one.has_callers} - {0}

        with self._cores.measuring(aside) if self._cores is not None else contextlib.nullcontext():
            result = await compare_speed(
                beside,
                servable,
                shared_examples(golden, beside.manifest.signatures, servable.manifest.signatures) if beside else {},
                batched=[name for name in servable.signatures if beside and _both_batch(name, beside, servable)],
                sizes=probe_sizes(self._batch_limits(tracked.version).max_batch_size),
                max_ratio=self.desired.policy.max_speed_ratio,
                limit_s=self._options.engine.speed_timeout_s,
                has_callers=lambda: beside is not None and beside.has_callers,
                model=self._name,
            )
        tracked.gates = (*(gate for gate in tracked.gates if gate.gate != SPEED), result)
        if result.outcome is Outcome.FAILED:
            raise RejectedError(SPEED, result.reason, tracked.gates)

    def _note_loaded(self, tracked: Tracked, servable: Servable, took_s: float) -> None:
        notes: list[str] = []
        if not servable.golden_examples:
            notes.append("published without golden examples: its answers were not checked")
        wanted = self._options.engine_rules(self._name).precision
        if servable.precision != wanted:
            refused = "; ".join(one.text for one in servable.attempts if one.reason and wanted in one.engine)
            notes.append(f"runs in {servable.precision}, not in {wanted}: {refused}")
        for note in notes:
            _log.warning("%s@%d: %s", self._name, tracked.version, note)
        tracked.reason = "; ".join(notes) or tracked.reason
        _log.info(
            "%s@%d: available after %.1f s, %d golden examples reproduced on %s",
            self._name, tracked.version, took_s, servable.golden_examples, servable.engine_name,
        )  # fmt: skip
        details: dict[str, JSON] = {
            "gates": [gate.to_json() for gate in tracked.gates],
            "seconds": round(took_s, 3),
        }
        if len(servable.attempts) > 1:
            details["engines"] = [attempt.to_json() for attempt in servable.attempts]
            for attempt in servable.attempts:
                _log.info("%s@%d: %s", self._name, tracked.version, attempt.text)
        self._decisions.record("verified", tracked.version, details=details)

    async def _new_servable(self, tracked: Tracked, hold: contextlib.ExitStack) -> Servable:
        number = tracked.version
        lease = self._registry.lease(self._name, number)
        held = asyncio.ensure_future(asyncio.to_thread(hold.enter_context, lease))
        try:
            await asyncio.shield(held)
        except asyncio.CancelledError:  # the thread goes on: what it gets must be let go, too
            held.add_done_callback(lambda done: hold.close() if done.cancelled() or done.exception() is None else None)
            raise
        manifest = tracked.manifest
        if manifest is None:
            manifest = tracked.manifest = await asyncio.to_thread(self._registry.manifest, self._name, number)
        rules = self._options.engine_rules(self._name)
        groups = candidates(rules.engines, rules.precision)
        golden = await asyncio.to_thread(self._registry.golden, self._name, number)
        return Servable(
            self._order(number),
            manifest,
            self._batch_limits(number),
            self._options.engine,
            on_state=lambda state: self._on_engine_state(tracked, state),
            on_rejected=lambda gate, reason: self._spawn(self._lose(tracked, gate, reason)),
            spawner=self._spawner,
            cores=self._cores,
            candidates=groups,
            golden=golden,
            usual=self._usual_engine(number),
        )

    def _order(self, number: int) -> LoadOrder:
        rules = self.desired.policy
        stable = self._stable_beside(number)
        return LoadOrder(
            self._options.registry,
            self._name,
            number,
            self._batch_limits(number).max_batch_size,
            allow_ops=rules.allow_ops,
            baseline=stable.manifest.signatures if stable is not None and stable.manifest is not None else None,
            allow_signature_changes=rules.allow_signature_changes,
            in_haste=not self._router.answers,
            parallelism=self._parallelism(stable),
        )

    def _batch_limits(self, number: int) -> BatchLimits:
        """Returns the bounds of a version's batches: a candidate's are as large as those that it is compared with."""
        batch, served = self._options.batch, self._servable_beside(number)
        if served is None:
            return batch
        return replace(batch, max_batch_size=served.batch_size, efficient_batch_size=served.efficient_batch_size)

    def _parallelism(self, stable: Tracked | None) -> Parallelism | None:
        """Returns how many batches of a candidate run at once: as many as of the version that it is compared with."""
        alike = stable.servable.parallelism if stable is not None and stable.servable is not None else None
        return self._options.engine_rules(self._name).parallelism or alike

    def _usual_engine(self, number: int) -> Candidate | None:
        """Returns what runs the version that a candidate is compared with."""
        stable = self._servable_beside(number)
        return stable.candidate if stable is not None else None

    def _servable_beside(self, number: int) -> Servable | None:
        stable = self._stable_beside(number)
        return stable.servable if stable is not None else None

    def _stable_beside(self, number: int) -> Tracked | None:
        """Returns the version that a candidate has to measure up to; None for one that is no candidate."""
        rollout = self.desired.rollout
        if rollout is None or rollout.version != number or rollout.phase is Phase.WATCH or rollout.previous is None:
            return None
        return self._versions.get(rollout.previous)

    def _on_engine_state(self, tracked: Tracked, state: str) -> None:
        if tracked.state in COMING:
            tracked.become(State(state))
            self.publish_status()

    def _make_available(self, tracked: Tracked) -> None:
        tracked.become(State.AVAILABLE)
        self._route.available[tracked.version] = tracked.loaded

    def _serve(self, tracked: Tracked) -> None:
        before = self.serving
        self._route.serving = tracked.loaded
        _log.info("%s@%d: serving%s", self._name, tracked.version, f", was @{before}" if before else "")
        details: dict[str, JSON] = {"before": before, "engine": tracked.loaded.engine_name}
        self._decisions.record("serving", tracked.version, details=details)

    def _put_off(self, tracked: Tracked, error: Exception) -> None:
        """Lets a version wait that could not be read: the fault is not the version's, and may pass."""
        wait_s = min(_FIRST_RETRY_S * 2**tracked.failures, _LONGEST_RETRY_S)
        tracked.failures += 1
        tracked.retry_at_s = monotonic() + wait_s
        tracked.hold.close()
        tracked.become(State.DISCOVERED, "it could not be read; the server tries again")
        _log.warning("%s@%d: can't be loaded now, next try in %g s: %s", self._name, tracked.version, wait_s, error)

    def _reject(self, tracked: Tracked, gate: str, reason: str) -> None:
        number = tracked.version
        tracked.become(State.REJECTED, f"{gate}: {reason}")
        tracked.accused = True
        tracked.hold.close()
        _log.error("%s@%d: rejected: %s", self._name, number, tracked.reason)
        self._told = f"@{number}: {transitions.REJECTED}: {tracked.reason}"
        now, actor = datetime.now(UTC), self._options.actor
        reject = partial(transitions.reject, version=number, gate=gate, reason=reason, now=now, actor=actor)
        gates: list[JSON] = [result.to_json() for result in tracked.gates]
        self._decisions.insist(Decision(reject, "rejected", number, tracked.reason, {"gates": gates}))

    async def _lose(self, tracked: Tracked, gate: str, reason: str) -> None:
        """Takes a version that was available out of traffic, because its engine keeps failing."""
        servable = tracked.servable
        if servable is None:
            return  # retired meanwhile
        self._take_out(tracked)
        self._reject(tracked, gate, reason)
        tracked.servable = None
        await servable.stop()

    def _take_out(self, tracked: Tracked) -> None:
        self._route.available.pop(tracked.version, None)
        if self._route.serving is tracked.servable:
            self._route.serving = self._heir(tracked.version)
        if self._route.canary is not None and self._route.canary.servable is tracked.servable:
            self._route.canary = None
        tracked.accused = True
        tracked.become(State.REJECTED, "its engine keeps failing")

    def _heir(self, version: int) -> Servable | None:
        """Returns who can answer at once in place of a version that is lost: the one before it."""
        previous = transitions.predecessor(self.desired, version)
        return self._available().get(previous) if previous is not None else None

    def _retire(self, tracked: Tracked) -> None:
        """Lets a version go at once; its engine ends in its own time, and its folder is held until then."""
        servable, hold = tracked.loaded, tracked.hold
        tracked.servable, tracked.hold = None, contextlib.ExitStack()
        tracked.become(State.RETIRED)

        async def stop() -> None:
            with hold:
                await servable.stop()
            _log.info("%s@%d: retired", self._name, servable.version)

        self._spawn(stop())

    def _warn_of_missing_stable(self) -> None:
        wanted = policy.charge(self._snapshot())
        tracked = self._versions.get(wanted) if wanted is not None else None
        if wanted is None or (tracked is not None and tracked.state is not State.REJECTED):
            return
        what = "pin" if self.desired.pin == wanted else "alias 'stable'"
        text = f"{self._name}: the {what} names version {wanted}, which " + (
            "does not exist" if tracked is None else "was rejected"
        )
        if text not in self._warned:
            self._warned.add(text)
            _log.error("%s; %s", text, f"version {self.serving} serves on" if self.serving else "nothing is served")

    def publish_status(self) -> None:
        """Posts what there is to know to the status board."""
        reporting.explain_idle(self._name, self._versions, self.desired)
        self._route.known = {n: reporting.state_text(tracked) for n, tracked in self._versions.items()}
        self._route.coming = frozenset(
            n for n, tracked in self._versions.items() if tracked.state is State.DISCOVERED or tracked.state in COMING
        )
        status = reporting.model_status(self._name, self._versions, self.desired, self.serving)
        self._board.post(self._name, status)

    def status(self) -> RolloutStatus:
        """Returns the rollout as it is now on this server."""
        share = self._route.canary.share if self._route.canary is not None else 0.0
        return reporting.rollout_status(self._name, self._versions, self.desired, self._bake, share)

    async def stop(self) -> None:
        """Ends all its engines and tasks."""
        for task in self._loading:
            task.cancel()
        while self._tasks:  # what retires a version comes to its end
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._decisions.settle()
        self._route.serving = self._route.canary = None
        self._route.available.clear()
        loaded = [tracked for tracked in self._versions.values() if tracked.servable is not None]
        await asyncio.gather(*(tracked.loaded.stop() for tracked in loaded), return_exceptions=True)
        for tracked in self._versions.values():
            tracked.hold.close()


def _both_batch(signature: str, one: Servable, other: Servable) -> bool:
    return all(signature in s.signatures and s.signatures[signature].batched for s in (one, other))
