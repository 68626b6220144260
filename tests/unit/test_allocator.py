"""Worker processes get the allocator that Ray brings, unless the user preloads one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from avatar_rl.cluster.services.allocator import jemalloc

#: An allocator that refuses its settings says so on standard error.
LOOK = "print('libjemalloc' in open('/proc/self/maps').read())"


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux'")
def test_a_process_uses_it_and_its_settings_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    environment = os.environ | jemalloc()
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
    wrong = environment | {"MALLOC_CONF": environment["MALLOC_CONF"] + ",no_such_setting:1"}
    assert subprocess.run(
        [sys.executable, "-c", LOOK], env=wrong, capture_output=True, text=True
    ).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux'")
def test_one_that_cannot_be_loaded_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "libjemalloc.so").write_bytes(b"not a library")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert jemalloc() == {}


def test_the_users_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    assert jemalloc() == {}
