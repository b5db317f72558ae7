"""An engine process's own loop."""

from __future__ import annotations

import os
import socket

import pytest

from modelport_server.engines import _messages as messages
from modelport_server.engines.worker import Worker


def test_an_instance_that_cant_go_on_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(messages.pack({"op": "run", "id": 1, "slot": 0, "signature": "serving_default"}))
        Worker(theirs, []).answer()  # it has no such slot
    assert ended == [1]
    assert "IndexError" in capsys.readouterr().err


def test_an_instance_ends_when_the_front_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.close()
        Worker(theirs, []).answer()
    assert ended == []
