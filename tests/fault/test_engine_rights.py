"""What an engine process may do: no network, and a priority that does not stand in the way of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

_NO_NETWORK = """
import ctypes, json, os, socket, subprocess, sys, tempfile, threading
from modelport_server.engines._system import close_network

begun, go_on = threading.Event(), threading.Event()
outcomes = {}

def attempt(name, work):
    try:
        work()
        outcomes[name] = "done"
    except OSError as error:
        outcomes[name] = os.strerror(error.errno)

def wait_and_try():
    begun.set()
    go_on.wait()
    attempt("earlier thread", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close())

thread = threading.Thread(target=wait_and_try)
thread.start()
begun.wait()
inherited = socket.socket(socket.AF_UNIX)
outcomes["why"] = close_network()
go_on.set()
thread.join()

def io_uring():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(425, 8, ctypes.create_string_buffer(120)) < 0:
        raise OSError(ctypes.get_errno(), "")

for name in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        attempt(f"{name} {kind.name}", lambda: socket.socket(getattr(socket, name), kind).close())
attempt("io_uring", io_uring)
child = [sys.executable, "-c", "import socket; socket.socket(socket.AF_INET)"]
outcomes["child"] = "PermissionError" in subprocess.run(child, capture_output=True, text=True).stderr
attempt("AF_UNIX", lambda: socket.socket(socket.AF_UNIX).close())
attempt("pair", lambda: [side.close() for side in socket.socketpair()])
attempt("file", lambda: tempfile.TemporaryFile().close())
attempt("thread", lambda: threading.Thread(target=int).start())
attempt("memory", lambda: os.close(os.memfd_create("x")))
inherited.close()
print(json.dumps(outcomes))
"""

_PRIORITY = """
import json, os, sys, threading
from modelport_server.engines._system import Priority

if sys.argv[1] != "0":
    os.setgroups([])
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
me = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
done = threading.Event()
waiting = threading.Thread(target=done.wait)
waiting.start()
priority = Priority()
priority.lower()
made = []
later = threading.Thread(target=done.wait)
priority.run(lambda: made.append(me()))
lowered = [me(), os.getpriority(os.PRIO_PROCESS, waiting.native_id)]
later.start()
with priority.raised_if_starved(0.01):
    while priority.can_return and me() == 19:
        done.wait(0.01)
    raised = me()
again = me()
priority.restore()
lasting = (threading.main_thread(), waiting, later)
restored = sorted({os.getpriority(os.PRIO_PROCESS, thread.native_id) for thread in lasting})
done.set()
print(json.dumps([priority.can_return, made[0], lowered, raised, again, restored]))
"""

_FED = """
import json, os, threading, time
from modelport_server.engines._system import Priority

me = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
asked = []

def cpu_clock():
    asked.append(me())
    return time.monotonic() if fed else 0.0  # as if it had a core all the time, and then none

priority = Priority(cpu_clock)
priority.lower()
fed = True
with priority.raised_if_starved(0.1):
    while len(asked) < 5:
        time.sleep(0.01)
    busy = me()
    fed = False
    while me() == 19:
        time.sleep(0.01)
priority.restore()
print(json.dumps([priority.can_return, busy]))
"""

_CHILD = """
import json, os, subprocess, sys, time
from modelport_server.engines._system import Priority, children, cpu_s

priority = Priority()
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
its = lambda: (os.getpriority(os.PRIO_PROCESS, child.pid), len(os.sched_getaffinity(child.pid)))
before = its()
priority.lower()
lowered = its()
others = lambda: cpu_s() - time.process_time()
began = others()
while others() < began + 0.05:
    time.sleep(0.01)
priority.restore()
restored = its()
known = children() == [child.pid]
child.kill()
child.wait()
print(json.dumps([known, before == restored, lowered[0], children()]))
"""

_CORES = """
import json, os, sys, threading
from modelport_server.engines._system import Priority

if sys.argv[1] != "0":
    os.setgroups([])
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
done = threading.Event()

def start():
    thread = threading.Thread(target=done.wait)
    thread.start()
    return thread

cores = lambda *threads: [len(os.sched_getaffinity(thread.native_id)) for thread in threads]
main, waiting = threading.main_thread(), start()
priority = Priority()
priority.lower()
lowered = cores(main, waiting, start())
within = priority.run_on_all_cores(lambda: cores(main, threading.current_thread(), start()))
priority.lower()
after = cores(*threading.enumerate())
with priority.raised_if_starved(0.01):
    while min(cores(*threading.enumerate())) < int(sys.argv[2]):
        done.wait(0.01)
again = cores(*threading.enumerate())
priority.restore()
restored = cores(*threading.enumerate())
done.set()
print(json.dumps([lowered, within, [sorted(set(found)) for found in (after, again, restored)]]))
"""


def _run(code: str, *arguments: object) -> Any:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_socket_leaves_the_machine_and_all_else_works() -> None:
    outcomes = _run(_NO_NETWORK)
    if outcomes["why"]:
        pytest.skip(f"this kernel does not filter system calls: {outcomes['why']}")
    assert outcomes.pop("child")
    assert outcomes.pop("why") == ""
    allowed = {name for name, outcome in outcomes.items() if outcome == "done"}
    assert allowed == {"AF_UNIX", "pair", "file", "thread", "memory"}
    assert outcomes.pop("io_uring") == "Function not implemented"
    assert {outcomes[name] for name in outcomes.keys() - allowed} == {"Permission denied"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only a privileged process may raise its priority")
def test_a_process_that_has_a_core_all_the_time_stays_lowered() -> None:
    assert _run(_FED) == [True, 19]


@pytest.mark.skipif(os.geteuid() != 0, reason="only a privileged process may raise its priority")
def test_children_come_along_and_what_they_compute_counts() -> None:
    assert _run(_CHILD) == [True, True, 19, []]


@pytest.mark.skipif(os.geteuid() != 0, reason="only a privileged process may raise its priority")
def test_a_process_that_may_comes_back_as_a_whole() -> None:
    ordinary = os.getpriority(os.PRIO_PROCESS, 0)
    assert _run(_PRIORITY, 0) == [True, 19, [19, 19], ordinary, 19, [ordinary]]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="there is no core to leave to others")
@pytest.mark.parametrize("user", [0, 65534] if os.geteuid() == 0 else [0])
def test_work_that_can_wait_leaves_cores_to_others_and_comes_back_to_them(user: int) -> None:
    every = len(os.sched_getaffinity(0))
    fewer = every - max(1, every // 4)
    assert _run(_CORES, user, every) == [[fewer] * 3, [fewer, every, every], [[fewer], [fewer], [every]]]


def test_a_process_that_may_not_keeps_its_own_threads_as_they_are() -> None:
    ordinary = os.getpriority(os.PRIO_PROCESS, 0)
    if ordinary == 19:
        pytest.skip("this process has the lowest priority already")
    nobody = 65534 if os.geteuid() == 0 else 0
    assert _run(_PRIORITY, nobody) == [False, 19, [ordinary, ordinary], ordinary, ordinary, [ordinary]]
