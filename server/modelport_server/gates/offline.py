"""All gates without a server: for ``modelport verify``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from modelport_registry import Golden, IntegrityError, InvalidModelError, Manifest, Registry
from modelport_server.engines.ahead import ALL_CORES
from modelport_server.engines.choice import Attempt, Candidate, EngineChoice
from modelport_server.engines.parallel import Parallelism, wide
from modelport_server.engines.probing import probe
from modelport_server.engines.process import EngineProcess, Loaded, LoadOrder, RejectedError, UnreadableError
from modelport_server.gates.result import INTEGRITY, SPEED, GateResult, Outcome
from modelport_server.gates.speed import Inputs, Probe, compare_speed, probe_sizes, shared_examples
from modelport_server.options import EngineLimits
from modelport_server.signatures import is_batchable

OnGate = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineCheck:
    """Puts one version through all gates, as a server would, by the rules of its model."""

    registry: Registry
    model: str
    version: int
    against: int | None
    """The version that it is compared with, as the one in charge; None without one."""
    largest: int
    """The largest batch, in rows."""
    limits: EngineLimits
    candidates: Sequence[Sequence[Candidate]]
    """The engines that are tried, each group only if nothing of the one before will do."""
    on_gate: OnGate
    """Told each gate as it begins."""
    parallelism: Parallelism | None = None
    """How many batches run at once; None for what suits the model."""
    on_unfit: Callable[[Attempt], object] = lambda attempt: None
    """Told of each engine and precision that can't run the version, once one is found that can."""

    async def run(self) -> tuple[GateResult, ...]:
        """Returns what each gate found, in order, up to the first that failed.

        Raises:
            modelport.exceptions.ModelportError: if there is no such version, or it can't be read now.
        """
        policy = self.registry.state(self.model).policy
        baseline = None if self.against is None else self.registry.manifest(self.model, self.against).signatures
        order = LoadOrder(
            self.registry.root,
            self.model,
            self.version,
            self.largest,
            policy.allow_ops,
            baseline,
            policy.allow_signature_changes,
            parallelism=self.parallelism,
        )
        try:
            async with self._loaded(order, self.on_gate) as candidate:
                for attempt in candidate.attempts:
                    if attempt.reason and not attempt.row_ms:  # else it is merely slower
                        self.on_unfit(attempt)
                self.on_gate(SPEED)
                return (*candidate.loaded.gates, await self._speed(order, candidate, policy.max_speed_ratio))
        except RejectedError as error:
            return error.gates

    @contextlib.asynccontextmanager
    async def _loaded(self, order: LoadOrder, on_gate: OnGate) -> AsyncGenerator[_LoadedVersion]:
        manifest = self.registry.manifest(order.model, order.version)
        choice = EngineChoice(
            order=order,
            groups=self.candidates,
            new_process=lambda first: EngineProcess(
                self.limits, lambda state: None, on_gate=on_gate if first else lambda gate: None
            ),
            signatures=manifest.signatures,
            golden=self._golden(order.version),
            wide=wide(len(ALL_CORES)),
        )
        chosen = await choice.run()
        try:
            yield _LoadedVersion(chosen.process, chosen.loaded, manifest, chosen.attempts)
        finally:
            await chosen.process.stop()

    def _golden(self, version: int) -> Sequence[Golden]:
        """Returns the examples, where engines are chosen by them.

        Raises:
            RejectedError: if they are damaged.
        """
        try:
            return self.registry.golden(self.model, version)
        except (IntegrityError, InvalidModelError) as error:
            result = GateResult(INTEGRITY, Outcome.FAILED, 0.0, {}, str(error))
            raise RejectedError(INTEGRITY, str(error), (result,)) from error

    async def _speed(self, order: LoadOrder, candidate: _LoadedVersion, max_ratio: float) -> GateResult:
        if self.against is None:
            return await compare_speed(None, candidate, {}, batched=(), sizes=(), max_ratio=max_ratio)
        started = monotonic()
        parallelism = candidate.loaded.parallelism  # else ways to run a version would be compared, not versions
        stable_order = replace(order, version=self.against, baseline=None, parallelism=parallelism)
        try:
            async with self._loaded(stable_order, lambda gate: None) as stable:
                return await self._compare(stable, candidate, max_ratio)
        except (RejectedError, UnreadableError) as error:
            why = f"version {self.against} can't be loaded to compare with: {error}"
            return GateResult(SPEED, Outcome.SKIPPED, monotonic() - started, {}, why)

    async def _compare(self, stable: _LoadedVersion, candidate: _LoadedVersion, max_ratio: float) -> GateResult:
        golden = self.registry.golden(self.model, self.version)
        return await compare_speed(
            stable,
            candidate,
            shared_examples(golden, stable.manifest.signatures, candidate.manifest.signatures),
            batched=stable.batched & candidate.batched,
            sizes=probe_sizes(self.largest),
            max_ratio=max_ratio,
            limit_s=self.limits.speed_timeout_s,
            model=self.model,
        )


@dataclass(frozen=True, slots=True)
class _LoadedVersion:
    """A version in an engine process that nobody else uses."""

    engine: EngineProcess
    loaded: Loaded
    manifest: Manifest
    attempts: Sequence[Attempt]

    @property
    def batched(self) -> frozenset[str]:
        """The signatures whose rows run together."""
        specs = self.manifest.signatures
        return frozenset(name for name, spec in specs.items() if is_batchable(spec)) - {*self.loaded.dependent}

    async def probe(self, signature: str, inputs: Inputs) -> Probe:
        """Runs one batch by itself.

        Raises:
            ServeError: if it can't be run.
        """
        return await probe(self.engine, self.manifest.signatures[signature], inputs)
