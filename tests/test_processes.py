"""``benchmarks/processes.py``: what a benchmark or a test starts ends whole."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import processes
import pytest
from processes import Server, Started, free_port

# a child that no signal but SIGKILL ends; its number is written when it is deaf
CHILD = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
CHILD += "print(__import__('os').getpid(), flush=True)\ntime.sleep(600)"
PARENT = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {CHILD!r}])\n"
ENDS = PARENT + "import time; time.sleep(600)"  # by SIGTERM
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ENDS
FAILS = PARENT + "import time; time.sleep(1); sys.exit('no memory')"


def child(log) -> int:
    """The number of the process that the command has started."""
    until = time.monotonic() + 60
    while not (log.is_file() and log.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.02)
    return int(log.read_text())


def gone(process: int) -> bool:
    """Whether it has ended, or does soon: a killed process is listed until the system has been told."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("code", "expected"), [(ENDS, -signal.SIGTERM), (DEAF, -signal.SIGKILL)])
def test_no_child_outlives_what_started_it(tmp_path, code, expected):
    log = tmp_path / "log"
    started = Started([sys.executable, "-c", code], log=log)
    number = child(log)
    assert started.stop(seconds=0.5)[0] == expected
    assert gone(number)
    assert started.stop()[0] == expected  # again is no error


def fails_while_it_runs(log) -> None:
    with Started([sys.executable, "-c", ENDS], log=log):
        raise KeyError(child(log))


def test_a_failure_ends_it_too(tmp_path):
    with pytest.raises(KeyError) as failed:
        fails_while_it_runs(tmp_path / "log")
    assert gone(failed.value.args[0])


def test_it_ends_with_who_started_it(tmp_path):
    """As where a limit of time ends a benchmark."""
    log = tmp_path / "log"
    code = "import sys, time\nfrom pathlib import Path\nfrom processes import Started\n"
    code += "with Started([sys.executable, '-c', sys.argv[1]], log=Path(sys.argv[2])):\n    time.sleep(600)"
    environment = {**os.environ, "PYTHONPATH": str(Path(processes.__file__).parent)}
    with Started([sys.executable, "-c", code, ENDS, str(log)], environment, tmp_path / "starter") as starter:
        number = child(log)
        starter.process.terminate()
        starter.process.wait(60)
        assert gone(number)


@pytest.mark.parametrize(
    ("code", "told"), [(FAILS, "no memory\nthe server has ended with code 1"), (ENDS, "not ready")]
)
def test_a_server_that_does_not_start_says_so_and_leaves_nothing(tmp_path, code, told):
    log = tmp_path / "log"
    server = Server([sys.executable, "-c", code], free_port(), log=log)
    number = child(log)
    with pytest.raises(SystemExit, match=told):
        server.wait(1.5 if code == ENDS else 60)
    assert gone(number)
