"""Child processes that do not outlive the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from little import ROOT, is_running, waited_until

PROGRAM = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from fedmix.deployment.processes import Group
group = Group()
try:
    child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    for line in group.read([Path(sys.executable).name, "-c", child], os.environ, log=Path({log!r})):
        print(*[one.pid for one in group._members], int(line), flush=True)
finally:
    group.close()
    print("closed", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(how: signal.Signals, tmp_path: Path) -> None:
    """Even when it is killed, and what they started themselves as well."""
    program = PROGRAM.format(root=str(ROOT), log=str(tmp_path / "log"))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        os.kill(run.pid, how)
        rest = run.stdout.read()
        run.wait()
    assert rest == ("" if how == signal.SIGKILL else "closed\n")
    waited_until(lambda: not any(is_running(pid) for pid in pids))
