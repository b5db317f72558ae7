"""How engine processes are started: forked from the zygote or begun ahead where there is one, else one by one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from modelport_server.engines import _messages as messages
from modelport_server.engines._system import adopt_descendants
from modelport_server.engines.ahead import PRIMED, Ahead, Begun, begin_zygote, run_module

_log = logging.getLogger(__name__)

_IMPORT_S = 60.0
_FORK_S = 30.0
_SHORT_LIFE_S = 60.0
_MOST_DOUBLINGS = 6
"""Of the pause between two zygotes that died young, which begins at a second."""
_LONGEST_POLL_S = 0.05


class Child(Protocol):
    """A process that this one started; ``subprocess.Popen`` is one."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    def poll(self) -> int | None:
        """Returns its exit status, as ``subprocess`` gives it; None while it runs."""
        ...

    def kill(self) -> None:
        """Ends it at once; nothing happens if it has ended."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Returns its exit status once it has ended.

        Raises:
            subprocess.TimeoutExpired: if it has not after ``timeout`` seconds.
        """
        ...


class ForkedChild:
    """A child that was forked, by this process or by one whose children this process has adopted."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._pid

    def poll(self) -> int | None:
        """Returns its exit status; None while it runs, 0 if somebody else has waited for it, as ``subprocess``."""
        if self._status is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = self._pid, 0
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def kill(self) -> None:
        """Ends it at once."""
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Returns its exit status once it has ended.

        Raises:
            subprocess.TimeoutExpired: if it has not after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        pause_s = 0.0005
        while (status := self.poll()) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired("engine", timeout or 0.0)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S, left_s)
            time.sleep(pause_s)
        return status


def end_group(leader: int) -> None:
    """Ends what is left in the group of a process that has ended, and waits for it.

    Only for processes that this one adopts are waited for; where it adopts none, nothing is done.
    """
    with suppress(ChildProcessError):
        while True:
            # Raises where there is none left, and the number may be somebody else's.
            os.waitid(os.P_PGID, leader, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.killpg(leader, signal.SIGKILL)
            os.waitpid(-leader, 0)


def execute(fds: Sequence[int]) -> Child:
    """Starts an engine process of its own, which takes seconds to import TensorFlow.

    Raises:
        OSError: if it can't be started.
    """
    return run_module("worker", [os.getpid(), *fds], fds, {})


class _Zygote:
    """The front's end of one zygote, from its start to its end.

    The zygote leads a process group. An engine process is born into it, and leaves it when the front hears of
    it: those that it never hears of are what is left of the group when the zygote has ended.

    Args:
        begun: the process.
    """

    def __init__(self, begun: Begun) -> None:
        loop = asyncio.get_running_loop()
        self._process, self._control = begun.process, begun.control
        self._forks: dict[int, asyncio.Future[int | None]] = {}
        self._next = 0
        self._room = asyncio.Event()
        self.ready: asyncio.Future[bool] = loop.create_future()
        """Whether it forks; False once it has ended."""
        self.ended = asyncio.Event()
        self.unusable = ""
        """Why forking is of no use here, if the zygote has found that."""
        loop.add_reader(self._control.fileno(), self._on_readable)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def fork(self, fds: Sequence[int]) -> int | None:
        """Returns the pid of a new engine process; None if it can't be forked."""
        self._next += 1
        number = self._next
        try:
            async with asyncio.timeout(_FORK_S):
                await self._send({"op": "fork", "id": number}, fds)
                reply = self._forks[number] = asyncio.get_running_loop().create_future()
                return await _taken(reply)
        except TimeoutError:
            self.kill()
        except OSError as error:
            if not self.ended.is_set():
                _log.warning("an engine process could not be forked: %s", error.strerror)
        return None

    async def _send(self, message: messages.Message, fds: Sequence[int]) -> None:
        """Sends a message once there is room for it.

        Raises:
            OSError: if it can't be sent.
        """
        packet = messages.pack(message)
        while True:
            try:
                socket.send_fds(self._control, [packet], list(fds))
            except BlockingIOError:
                self._room.clear()
                asyncio.get_running_loop().add_writer(self._control.fileno(), self._on_writable)
                await self._room.wait()
            else:
                return

    def _on_writable(self) -> None:
        asyncio.get_running_loop().remove_writer(self._control.fileno())
        self._room.set()

    def _on_readable(self) -> None:
        try:
            message = messages.receive(self._control)
        except BlockingIOError:
            return
        except OSError:
            message = None
        if message is None:
            self._end()
        else:
            self._on_message(message)

    def _on_message(self, message: messages.Message) -> None:
        op = message["op"]
        if op == "ready":
            _log.debug("engine processes are forked from now on: TensorFlow took %.1f s", message["seconds"])
            self._settle(True)
        elif op == "unusable":
            self.unusable = message["reason"]
        elif op == "forked":
            os.setpgid(message["pid"], message["pid"])
            self._reply(message["id"], message["pid"])
        elif op == "failed":
            _log.warning("an engine process could not be forked: %s", message["reason"])
            self._reply(message["id"], None)

    def _reply(self, number: int, pid: int | None) -> None:
        reply = self._forks.pop(number, None)
        if reply is not None and not reply.done():
            reply.set_result(pid)

    def _settle(self, usable: bool) -> None:
        if not self.ready.done():
            self.ready.set_result(usable)

    def _end(self) -> None:
        if self.ended.is_set():
            return
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._on_writable()
        self._control.close()
        self._settle(False)
        for number in list(self._forks):
            self._reply(number, None)
        self.ended.set()

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._end()

    async def reap(self) -> int:
        """Returns its exit status after it has ended, and what it forked in vain too."""
        return await asyncio.to_thread(self._reap)

    def _reap(self) -> int:
        status = self._process.wait()
        end_group(self.pid)
        return status


async def _taken(reply: asyncio.Future[int | None]) -> int | None:
    """Returns what is replied; ends the process if nobody waits for it any more."""
    try:
        return await asyncio.shield(reply)
    except asyncio.CancelledError:
        reply.add_done_callback(_discard)
        raise


def _discard(reply: asyncio.Future[int | None]) -> None:
    """Ends an engine process that nobody waits for any more."""
    if not reply.cancelled() and (pid := reply.result()) is not None:
        child = ForkedChild(pid)
        child.kill()
        child.wait()  # it has been killed: it takes no time
        end_group(pid)


class Spawner:
    """Starts engine processes, and keeps a zygote ready for that.

    Before ``start``, after ``stop``, and while no zygote can be had, ``fork`` returns None.

    Args:
        ahead: processes that have been begun already; what it has, it takes.
    """

    def __init__(self, ahead: Ahead | None = None) -> None:
        self._ahead = ahead if ahead is not None else Ahead()
        self._zygote: _Zygote | None = None
        self._failures = 0
        self._keeper: asyncio.Task[None] | None = None
        self._reaping: asyncio.Task[int] | None = None

    @property
    def pid(self) -> int:
        """The zygote's process id; 0 while there is none."""
        return self._zygote.pid if self._zygote is not None else 0

    def start(self) -> None:
        """Starts a zygote in the background, and another one whenever it dies."""
        if not adopt_descendants():
            _log.warning("engine processes can't be forked here: each imports TensorFlow by itself")
            self._ahead.end_zygote()
            return
        self._next()
        self._begin_to_keep()

    def _begin_to_keep(self) -> None:
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        self._keeper.add_done_callback(self._on_kept)

    def _on_kept(self, keeper: asyncio.Task[None]) -> None:
        """Goes on after a mistake: without a keeper there would never be another zygote."""
        if keeper.cancelled() or (error := keeper.exception()) is None:
            return
        _log.error("keeping the process that engines are forked from failed, it is begun again", exc_info=error)
        if keeper is self._keeper:
            self._begin_to_keep()

    def _next(self) -> None:
        try:
            self._zygote = _Zygote(self._ahead.take_zygote() or begin_zygote())
        except OSError as error:
            _log.warning("the process that engines are forked from can't be started: %s", error)

    def end_ahead(self) -> None:
        """Ends what was begun ahead and has not been taken: nothing that is loading will."""
        self._ahead.end()

    async def stop(self) -> None:
        """Ends the zygote, and what was begun ahead in vain; the engine processes that came from it live on."""
        self._ahead.end()
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if self._reaping is not None:
            await self._reaping

    async def fork(self, fds: Sequence[int]) -> Child | None:
        """Starts an engine process that has imported TensorFlow already.

        Waits for the zygote where that is the sooner way: while the first one is coming up.

        Args:
            fds: what the engine process gets: see ``run_engine``.

        Returns:
            None if it can't be done now. The file descriptors may have been used all the same, so that
            another way needs others.
        """
        zygote = self._zygote
        if zygote is None or (self._failures and not zygote.ready.done()):
            return None
        if not await asyncio.shield(zygote.ready):
            return None
        pid = await zygote.fork(fds)
        return ForkedChild(pid) if pid is not None else None

    async def wake(self, fds: Sequence[int]) -> Child | None:
        """Makes the process that imports OpenVINO ahead an engine process, once it has done so.

        Args:
            fds: what it gets: see ``run_engine``.

        Returns:
            None if there is none. The file descriptors may have been used all the same, as for ``fork``.
        """
        primed = self._ahead.take_primed()
        if primed is None:
            return None
        try:
            async with asyncio.timeout(_IMPORT_S):
                # Whether it dies of its import must not be taken for the version's fault.
                if not await asyncio.get_running_loop().sock_recv(primed.control, 1):
                    raise ConnectionResetError
            socket.send_fds(primed.control, [PRIMED], list(fds))
        except OSError:  # TimeoutError is one
            _log.warning("an engine process that was begun ahead is of no use: it has ended, or takes too long")
            primed.end()
            return None
        except asyncio.CancelledError:
            primed.end()
            raise
        primed.control.close()
        return primed.process

    async def _keep(self) -> None:
        while True:
            started = time.monotonic()
            zygote = self._zygote
            if zygote is not None and not await self._outlive(zygote):
                return
            self._failures = self._failures + 1 if time.monotonic() - started < _SHORT_LIFE_S else 0
            await asyncio.sleep(2.0 ** min(self._failures - 1, _MOST_DOUBLINGS) if self._failures else 0.0)
            self._next()

    async def _outlive(self, zygote: _Zygote) -> bool:
        """Returns once a zygote has ended; says whether there should be another one."""
        try:
            with suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it swallows a cancellation that comes as the zygote is ready.
                async with asyncio.timeout(_IMPORT_S):
                    await asyncio.shield(zygote.ready)
            if zygote.ready.done():
                await zygote.ended.wait()
        finally:
            self._zygote = None
            zygote.kill()
            self._reaping = asyncio.create_task(zygote.reap())
            status = await asyncio.shield(self._reaping)
        if zygote.unusable:
            _log.warning("engine processes can't be forked here, each imports TensorFlow: %s", zygote.unusable)
        else:
            _log.warning("the process that engines are forked from ended (%s), it is started again", exit_text(status))
        return not zygote.unusable


def exit_text(status: int) -> str:
    """Returns how a process ended, for people."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:  # most real-time signals have no name
        return f"signal {-status}"
