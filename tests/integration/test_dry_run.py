"""``avatar train RECIPE --dry-run`` of every recipe that is shipped: complete, and without a heavy
import."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.curriculum.stages import resolve
from avatar_rl.cluster.recipe.load import load_recipe, read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

DRY_RUN = """
import sys
from avatar_rl.cluster.cli import main
assert main(["train", sys.argv[1], "--dry-run"]) == 0
heavy = {"torch", "ray", "vllm", "deepspeed", "transformers"} & set(sys.modules)
assert not heavy, f"a dry run imported {heavy}"
"""


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_dry_run_shows_recipe_and_resources_at_once(file: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", DRY_RUN, str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    shown, _, resources = done.stdout.partition("# resources")
    if "stages" in read_recipe(file):  # one document per stage: tests/unit/test_curriculum.py
        config = (
            resolve(read_recipe(file), (), preset_name=None, source=file.name).stages[-1].config
        )
    else:
        config = load_recipe(file)
        assert RunConfig.model_validate(yaml.safe_load(shown)) == config
    assert f"{config.rollout.workers} x rollout actor" in resources
    assert f"{config.learner.ranks} x learner rank" in resources
    # Processor time: on a busy machine the wall clock says nothing about the program.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5
