"""Caches that processes share, a locale without UTF-8, what a process imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = "data: {synthetic: {n_train: 8}}\n"

_WRITER = """
import sys
from pathlib import Path
import numpy as np
from avatar_rl.prompts.media.cache import DiskCache, Entry
cache = DiskCache(Path(sys.argv[1]), limit=60_000)
rng = np.random.default_rng(int(sys.argv[2]))
for _ in range(150):
    n = int(rng.integers(40))
    entry = cache.get(f"key{n}")
    if entry is None:
        cache.put(f"key{n}", Entry(np.full(3_000, n, np.uint8), float(n), 2.0 * n))
    else:
        assert entry.array.shape == (3_000,) and (entry.array == n).all()
        assert entry.duration == 2.0 * n
"""


def test_disk_cache_keeps_its_bound_with_several_processes(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(seed)])
        for seed in range(3)
    ]
    worst = 0
    while any(writer.poll() is None for writer in writers):
        sizes = []
        for path in tmp_path.glob("*.npy"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        worst = max(worst, sum(sizes))
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    sizes = [path.stat().st_size for path in tmp_path.glob("*.npy")]
    assert int((tmp_path / "bytes").read_text()) == sum(sizes) <= 60_000 and len(sizes) >= 15
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_a_locale_without_utf_8_works(tmp_path: Path, locale: str) -> None:
    file = tmp_path / "rezept.yaml"
    file.write_text(DATA + "data2: café 你好\n", encoding="utf-8")
    plain = {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(file), "--dry-run"],
        env={**os.environ, **plain},
        capture_output=True,
    )
    said = done.stderr.decode()
    assert done.returncode == 1 and "data2: unknown key" in said and "Traceback" not in said
    file.write_text(
        "data: {synthetic: {n_train: 8}, template: {instruction: 你好}}\n", encoding="utf-8"
    )
    done = subprocess.run(done.args, env={**os.environ, **plain}, capture_output=True)
    assert done.returncode == 0 and "你好" in done.stdout.decode()


LIGHT = (
    "avatar_rl.cluster.training.restarts",
    "avatar_rl.rewards.actor",
    "avatar_rl.buffer_service.weights.store",
    "avatar_rl.learner.state_replica",
    "avatar_rl.learner.actor",
)


def test_who_computes_nothing_imports_no_torch() -> None:
    """Driver, reward actors, weight store and state replica: seconds of every start and 150 MiB
    each."""
    code = (
        f"import importlib, sys\nfor name in {LIGHT}: importlib.import_module(name)\n"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "False"
