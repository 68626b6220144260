"""What a killed driver leaves behind is ended; what an orderly one has left alone is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

#: Starts a child that would live on, names it to an orphan reaper, and says so.
DRIVER = """
import subprocess, sys, time
from avatar_rl.cluster.services.orphans import OrphanReaper
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep, start_new_session=True)
reaper = OrphanReaper()
print(child.pid, flush=True)
sys.stdin.readline()
reaper.close()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_child_ends_with_a_driver_that_is_killed(killed: bool) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert driver.stdout is not None and driver.stdin is not None
    child = psutil.Process(int(driver.stdout.readline()))
    if killed:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        _, left = psutil.wait_procs([child], timeout=20)
        assert left == []
    else:
        driver.stdin.write("end\n")
        driver.stdin.close()
        assert driver.wait(20) == 0
        assert child.is_running()
        child.kill()
