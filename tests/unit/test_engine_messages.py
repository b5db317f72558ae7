"""Messages between the front and engine processes."""

from __future__ import annotations

import socket
import subprocess
import sys

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


_FORKED = """
import os, socket
from modelport_server.engines import _messages as messages

here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
here.send(messages.pack({"text": "before"}))
messages.receive(there)
memory = messages._room.memory
before = bytes(memory[:64])
child = os.fork()
here.send(messages.pack({"text": "after"}))
if not child:
    messages.receive(there)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(bytes(memory[:64]) == before)
"""


def test_forked_processes_receive_into_memory_of_their_own() -> None:
    """They come from one process that has received messages before, as engine processes do from the zygote."""
    done = subprocess.run([sys.executable, "-c", _FORKED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
