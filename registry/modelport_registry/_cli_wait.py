"""``modelport publish --wait``: publishing that ends when the version is in charge, or never will be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

import typer

from modelport import progress
from modelport.exceptions import ModelportError, RolloutError, VersionRejectedError
from modelport_registry._errors import RegistryError
from modelport_registry._json import JSON

_REDRAW_EVERY_S = 1.0


class WaitFor:
    """Waits for one version, if that is asked for.

    Args:
        wait: whether to wait at all.
        server: the server to ask; None for the registry alone.
        timeout_s: how long to wait, in seconds; None for as long as it takes.
    """

    def __init__(self, *, wait: bool, server: str | None, timeout_s: float | None) -> None:
        self._wait = wait
        self._server = server
        self._timeout_s = timeout_s
        self._failure: ModelportError | None = None

    @classmethod
    def parse(cls, wait: bool, server: str | None, timeout_s: float | None) -> WaitFor:
        """Returns what the options ask for.

        Raises:
            RegistryError: if they contradict each other.
        """
        if not wait and (server is not None or timeout_s is not None):
            raise RegistryError("--server and --wait-timeout go with --wait")
        if timeout_s is not None and not timeout_s > 0:
            raise RegistryError(f"--wait-timeout must be above 0 seconds, not {timeout_s:g}")
        return cls(wait=wait, server=server, timeout_s=timeout_s)

    def check(self, registry: Path, model: str) -> None:
        """Makes sure that the server to ask, if any, answers and serves the model; before anything is published.

        Raises:
            RegistryError: if not.
        """
        if self._server is None:
            return
        from modelport_registry import Registry, check_server

        try:
            check_server(Registry(registry), model, self._server)
        except ModelportError as error:
            raise RegistryError(f"nothing was published: {error}") from error

    def outcome(self, registry: Path, model: str, version: int) -> dict[str, JSON]:
        """Waits, and returns what came of it; nothing if waiting was not asked for.

        Errors are left to ``finish``, because the version is published and its number has to be told first.
        ``stable`` is None where the registry or the server no longer says how it stands.
        """
        if not self._wait:
            return {}
        try:
            self._until_stable(registry, model, version)
        except VersionRejectedError as error:
            self._failure = error
            return {"stable": False, "gate": error.gate, "reason": error.reason}
        except RolloutError as error:
            self._failure = error
            return {"stable": False, "reason": str(error)}
        except ModelportError as error:
            self._failure = error
            return {"stable": None, "reason": str(error)}
        return {"stable": True}

    def finish(self) -> None:
        """Raises what kept the version from coming into service, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _until_stable(self, registry: Path, model: str, version: int) -> None:
        with _shown(f"{model} version {version}") as (tell, every_s):
            if self._server is None:
                from modelport_registry import Registry, wait_until_stable

                wait_until_stable(
                    Registry(registry), model, version,
                    timeout_s=self._timeout_s, on_progress=tell, progress_every_s=every_s,
                )  # fmt: skip
                return
            from modelport import Client

            with Client(self._server) as client:
                client.rollouts.wait_for_version(
                    model, version, timeout_s=self._timeout_s, on_progress=tell, progress_every_s=every_s
                )


@contextlib.contextmanager
def _shown(what: str) -> Generator[tuple[Callable[[str], None], float]]:
    """Shows how far it is, in one line on a terminal and in a line each elsewhere; and how often, in seconds."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: typer.echo(f"{what}: {text}", err=True), progress.TELL_EVERY_S
        return
    with console.status(Text(what)) as status:
        yield lambda text: status.update(Text(f"{what}: {text}")), _REDRAW_EVERY_S
