"""The wheel as a user has it: complete, one import root, and deaf to folders of the same names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

from avatar_rl import __version__
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "prompts", "buffer_service", "rewards", "actors", "learner", "cluster")
DATA = ("recipes", "deploy")

#: A user's own reward, in a package that is called as one of ours.
FUSION = "def fn(prompt, completions):\n    return [0.25] * len(completions)\n"
ASK_FUSION = """
from avatar_rl.rewards import suite
from avatar_rl.rewards.custom import load_reward
print(load_reward("rewards.fusion:fn")(None, [1, 2]), suite.__file__)
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left beside the sources does not get in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("avatar_rl", *PACKAGES, *DATA):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", source / "dist"]
    done = run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    assert done.returncode == 0, done.stderr
    [built] = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel. Its heavy dependencies are those of this one:
    a path alone, so that this one's editable install is not seen there."""
    place = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place).returncode == 0
    pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python"]
    done = run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=place)
    assert done.returncode == 0, done.stderr
    [site] = place.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return place / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder with packages of our rooms' names that nobody may import."""
    for name in ("rewards", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    return tmp_path


def test_the_wheel_holds_every_file_once_below_one_root(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"avatar_rl-{__version__}.dist-info/METADATA").decode()
    assert max(Counter(names).values()) == 1
    assert {name.partition("/")[0] for name in names} == {
        "avatar_rl",
        f"avatar_rl-{__version__}.dist-info",
    }
    expected = {"avatar_rl/__init__.py"}
    for package, patterns in (
        *((name, ("*.py", "*.lua", "*.html", "*.js", "*.css", "*.svg")) for name in PACKAGES),
        *((name, ("*",)) for name in DATA),
    ):
        for pattern in patterns:
            files = (file for file in (ROOT / package).rglob(pattern) if file.is_file())
            expected |= {f"avatar_rl/{file.relative_to(ROOT).as_posix()}" for file in files}
    assert {name for name in names if name.startswith("avatar_rl/")} == expected
    assert len([name for name in expected if name.endswith(".lua")]) > 10
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_the_installed_command_takes_ours_and_brings_its_recipes(
    installed: Path, elsewhere: Path
) -> None:
    for variables in ({}, {"PYTHONPATH": str(elsewhere)}):
        version = run(installed / "avatar", "--version", cwd=elsewhere, **variables)
        assert version.returncode == 0, version.stderr
        assert version.stdout.startswith(f"avatar {__version__} ({installed.parent}")
        dry = run(
            installed / "avatar",
            *("train", "recipes/local.yaml", "--dry-run", "--loop.steps", "7"),
            cwd=elsewhere,
            **variables,
        )
        assert dry.returncode == 0, dry.stderr
        shown, _, resources = dry.stdout.partition("# resources")
        expected = load_recipe(ROOT / "recipes" / "local.yaml", [("loop.steps", "7")])
        assert RunConfig.model_validate(yaml.safe_load(shown)) == expected
        assert "x rollout actor" in resources
        assert "recipes/local.yaml is not here; taken from the package: " in dry.stderr


def test_a_recipe_here_comes_before_the_packages(installed: Path, elsewhere: Path) -> None:
    (elsewhere / "recipes").mkdir()
    (elsewhere / "recipes" / "local.yaml").write_text("name: mine\ndata: {train: mine.jsonl}\n")
    command = (installed / "avatar", "train", "recipes/local.yaml", "--dry-run")
    own = run(*command, cwd=elsewhere)
    assert own.returncode == 0 and "name: mine" in own.stdout and own.stderr == ""
    missing = run(*command[:2], "recipes/absent.yaml", "--dry-run", cwd=elsewhere)
    assert missing.returncode == 1
    assert "recipe recipes/absent.yaml does not exist" in missing.stderr


def test_a_users_reward_in_a_package_of_our_name_is_the_users(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").touch()
    (tmp_path / "rewards" / "fusion.py").write_text(FUSION)
    done = run(*(installed / "python", "-c", ASK_FUSION), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    scores, ours = done.stdout.rsplit(" ", 1)
    assert scores == "[0.25, 0.25]" and ours.startswith(str(installed.parent))


def test_the_wheel_beside_a_checkout_is_refused(installed: Path) -> None:
    done = run(installed / "avatar", "presets", cwd=ROOT)  # Ray's workers would import the checkout
    assert done.returncode == 1
    assert str(ROOT / "avatar_rl") in done.stderr and str(installed.parent) in done.stderr
