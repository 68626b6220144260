"""One copy of the project: every module has one name, and two copies on the path are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Runs the command line as `python -m cluster.cli` does, then lists files with two module names.
AS_A_SCRIPT = """
import collections, os, runpy, sys
sys.argv = ["cluster.cli", "train", "recipes/local.yaml", "--dry-run"]
try:
    runpy.run_module("cluster.cli", run_name="__main__", alter_sys=True)
except SystemExit as done:
    assert done.code == 0, done.code
names = collections.defaultdict(set)
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and os.path.realpath(file).startswith(os.getcwd() + "/") and ".venv" not in file:
        names[os.path.realpath(file)].add(name)
print("modules:", len(names))
print("twice:", sorted(os.path.relpath(file) for file, known in names.items() if len(known) > 1))
"""


def avatar(
    where: Path, *path: Path, module: str = "avatar_rl.cluster.cli", **variables: str
) -> subprocess.CompletedProcess[str]:
    """`avatar --version` of the copy that comes first on ``path``, started in ``where``."""
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, path))} | variables
    return subprocess.run(
        [sys.executable, "-P", "-m", module, "--version"],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with another copy of the command line and of what it stands on."""
    place = tmp_path / "other" / "avatar_rl"
    for part in ("common", "cluster"):
        shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "avatar_rl" / "__init__.py", place / "__init__.py")
    return place.parent


def test_the_script_hands_over_and_no_module_of_ours_has_two_names() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_A_SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told, twice = done.stdout.splitlines()[-2:]
    assert int(told.removeprefix("modules: ")) > 10
    # `-m cluster.cli` itself names the package, which is a docstring; nothing below it
    assert twice == "twice: ['cluster/__init__.py']"


def test_a_checkout_run_from_its_root_or_by_a_link_is_one_copy(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ROOT)
    for where, path in ((ROOT, (ROOT,)), (tmp_path, (ROOT, tmp_path / "link")), (ROOT, ())):
        done = avatar(where, *path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("avatar 0.") and str(ROOT / "avatar_rl") in done.stdout


def test_two_copies_are_named_with_what_to_do(other: Path, tmp_path: Path) -> None:
    ours, theirs = str(ROOT / "avatar_rl"), str(other / "avatar_rl")
    shadowed = avatar(tmp_path, other, ROOT)  # another copy comes before ours
    beside = avatar(other, ROOT)  # another copy where Ray's workers look: the current folder
    for done, used in ((shadowed, theirs), (beside, ours)):
        assert done.returncode == 1
        assert done.stderr.startswith("avatar: avatar_rl is there twice: " + used)
        assert ours in done.stderr and theirs in done.stderr
        assert "pip uninstall avatar-rl" in done.stderr and "AVATAR_RL_ROOT" in done.stderr


def test_the_copy_that_is_meant_can_be_named(other: Path, tmp_path: Path) -> None:
    theirs = str(other / "avatar_rl")
    named = avatar(tmp_path, other, ROOT, AVATAR_RL_ROOT=theirs)
    assert named.returncode == 0 and theirs in named.stdout
    relative = avatar(other, other, ROOT, AVATAR_RL_ROOT="avatar_rl")
    assert relative.returncode == 0 and theirs in relative.stdout
    wrong = avatar(tmp_path, ROOT, other, AVATAR_RL_ROOT=theirs)
    assert wrong.returncode == 1
    assert f"AVATAR_RL_ROOT is {theirs}, but avatar_rl is imported from" in wrong.stderr


def test_a_jobs_upload_stands_in_for_the_same_version_in_the_image(
    other: Path, tmp_path: Path
) -> None:
    upload = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    shutil.copytree(other, upload)
    done = avatar(upload, upload, ROOT)
    assert done.returncode == 0 and str(upload) in done.stdout
    assert "stands in for the installed" in done.stderr and str(ROOT) in done.stderr
    start = upload / "avatar_rl" / "__init__.py"
    start.write_text('__version__ = "9.9"\n')
    done = avatar(upload, upload, ROOT)
    assert done.returncode == 1 and "(9.9, in use)" in done.stderr and str(ROOT) in done.stderr
