"""Messages between the front and engine processes."""

from __future__ import annotations

import os
import socket

from modelport_server.engines import _messages as messages


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_a_message_comes_as_it_was_sent_and_a_longer_one_before_it_leaves_nothing() -> None:
    here, there = _pair()
    with here, there:
        for text in ("x" * 1000, "ü", ""):
            here.send(messages.pack({"text": text}))
            assert messages.receive(there) == {"text": text}


def test_the_other_side_is_gone() -> None:
    here, there = _pair()
    with there:
        here.close()
        assert messages.receive(there) is None


def test_forked_processes_receive_at_the_same_time() -> None:
    """They come from one process that has received messages before, as engine processes do from the zygote."""
    here, there = _pair()
    with here, there:
        here.send(messages.pack({"text": "before"}))
        assert messages.receive(there) == {"text": "before"}
        seen = messages._room.memory  # pyright: ignore[reportPrivateUsage]
        before = bytes(seen[:64])
        child = os.fork()
        if not child:
            here.send(messages.pack({"text": "after, in the child"}))
            messages.receive(there)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert bytes(seen[:64]) == before
