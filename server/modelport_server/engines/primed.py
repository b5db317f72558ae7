"""An engine process that is begun before anybody knows what it is to load: it imports OpenVINO meanwhile.

Started by ``modelport_server.engines.ahead``; the command line gives the front's pid and the socket pair's
end. Once it has imported OpenVINO it says so. Then the front sends the file descriptors of an engine process,
once, and this is one from then on; or it closes its end, and this one ends.
"""

from __future__ import annotations

import contextlib
import socket
import sys

from modelport_server.engines._system import live_under, take_cores
from modelport_server.engines.ahead import PRIMED
from modelport_server.engines.kinds import OPENVINO
from modelport_server.engines.worker import preload, run_engine
from modelport_server.engines.zygote import MAX_FDS, rename


def main() -> None:
    """Runs it; the arguments are the front's pid and a file descriptor."""
    front, fd = (int(argument) for argument in sys.argv[1:])
    if not live_under(front):
        return
    take_cores()
    preload(OPENVINO)
    if fds := _ordered(socket.socket(fileno=fd)):
        rename("primed")
        run_engine(front, fds)


def _ordered(control: socket.socket) -> list[int]:
    """Returns the file descriptors of an engine process; none if the front wants none."""
    with control, contextlib.suppress(ConnectionError):
        control.send(PRIMED)
        return socket.recv_fds(control, len(PRIMED), MAX_FDS)[1]
    return []


if __name__ == "__main__":
    main()
