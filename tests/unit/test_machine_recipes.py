"""Recipes by machine: they dry-run as they stand, fill their machine and fit it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.commands.doctor import preflight, shortcomings
from avatar_rl.cluster.curriculum.stages import resolve
from avatar_rl.cluster.machine.fit import RESERVE, demands, learner_nodes
from avatar_rl.cluster.recipe.load import load_recipe, read_recipe
from avatar_rl.cluster.recipe.memory import GIB, MemoryPlan
from avatar_rl.common.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "gpu").glob("*.yaml"))
MACHINES = [path for path in RECIPES if load_recipe(path).resources.machine is not None]
NAMES = [path.stem for path in MACHINES]
TEXT_TOKENS = 500
SOUND_TOKENS = 30 * 25


def test_every_machine_of_the_plan_has_its_recipe() -> None:
    assert {
        "omni_7b_8gpu",
        "omni_7b_4x8",
        "vl_7b_8gpu",
        "qwen3_vl_8b_8gpu",
        "qwen3_vl_30b_8gpu_lora",
        "qwen3_omni_30b_8gpu_lora",
        "text_8b_8gpu",
    } <= set(NAMES)


@pytest.mark.parametrize("recipe", MACHINES, ids=NAMES)
def test_a_recipe_fills_its_machine_and_fits_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    shown = said[said.index("# the machine it is written for: ") :]
    assert "TOO LITTLE" not in shown and " idle" not in shown and "under 10 GiB" not in shown
    assert re.search(r"# missing here\n#   model: \S+ is not a folder; set model.path\n", said)
    config = load_recipe(recipe)
    plan, machine = MemoryPlan.of(config), config.resources.machine
    assert plan is not None and machine is not None
    assert all(demand.fits for demand in demands(config))
    assert plan.learner_gpu + RESERVE <= machine.gpu_gib * GIB
    # A prompt's whole group is one pack, so that its prompt is computed once.
    template, tokens = config.data.template, config.rollout.sampling.max_tokens
    assert config.pack_tokens >= template.max_prompt_tokens + config.loop.group_size * tokens or (
        config.data.template.total_video_tokens is None
    )
    assert config.rollout.engine.max_model_len >= template.max_prompt_tokens + tokens


@pytest.mark.parametrize("recipe", MACHINES, ids=NAMES)
def test_a_recipe_needs_no_more_than_its_paths(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data in their place, what is left to say is of this machine and the model's folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    changes = [(f"data.{name}", str(tmp_path / f"{name}.jsonl")) for name in ("train", "heldout")]
    changes += [(f"output.{name}", str(tmp_path)) for name in ("folder", "cache")]
    config = load_recipe(recipe, changes)
    said = {line.partition(":")[0] for line in shortcomings(config)}
    of_a_cluster = {"redis", "Ray cluster", "buffer.password_env"}
    here = {"model", "CPU", "GPU", "memory", "/dev/shm", "disk"}
    assert said <= here | (of_a_cluster if config.resources.address else set()), said
    assert "model" in said


@pytest.mark.parametrize("recipe", MACHINES, ids=NAMES)
def test_half_a_minute_of_720p_fits_its_prompt(recipe: Path) -> None:
    data = load_recipe(recipe).data
    total, longest = data.template.total_video_tokens, data.template.max_prompt_tokens
    if total is None:
        assert recipe.stem.startswith("text")
        return
    assert total + TEXT_TOKENS + (SOUND_TOKENS if data.reader.audio_in_video else 0) <= longest
    if "omni" in recipe.stem:  # sound where clips have it, and prompts without it beside
        assert data.reader.audio_in_video and data.media.missing_sound == "silence"


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").glob("*omni_*.yaml")), ids=lambda file: file.stem
)
def test_omni_recipes_of_a_cluster_hear_their_clips(recipe: Path) -> None:
    data = load_recipe(recipe).data
    assert data.reader.audio_in_video and data.media.missing_sound == "silence"


def test_the_curriculum_hears_its_clips_in_every_stage() -> None:
    file = ROOT / "recipes" / "avatar_curriculum_7b.yaml"
    stages = resolve(read_recipe(file), (), preset_name=None, source=file.name).stages
    assert len(stages) == 4
    for data in (stage.config.data for stage in stages):
        assert data.reader.audio_in_video and data.media.missing_sound == "silence"
        assert data.reader.frames == 32 and data.reader.fps is None


def test_a_recipe_that_is_changed_is_held_against_its_machine(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "gpu" / "omni_7b_8gpu.yaml"

    def of(*changes: tuple[str, str]) -> list[str]:
        config = load_recipe(recipe, changes)
        return [demand.what for demand in demands(config) if not demand.fits]

    assert of() == []
    assert of(("learner.ranks", "8")) == ["GPUs"]
    assert of(("learner.optimizer.zero_stage", "0")) == ["learner GPU"]
    assert of(("resources.object_store_bytes", str(1 << 30))) == ["object store, versions"]
    assert of(("resources.machine.memory_gib", "64")) == ["memory, node"]
    assert of(("resources.machine.shm_gib", "32")) == ["/dev/shm, object store"]
    assert of(("resources.learner_cpus", "32")) == ["cores, node"]
    assert of(("rollout.engine.gpu_memory_utilization", "0.2")) == ["rollout GPU"]
    # An adapter is small: so are its versions.
    assert of(("learner.lora", "{rank: 32}"), ("resources.object_store_bytes", str(1 << 30))) == []
    with pytest.raises(ConfigError, match=r"resources.machine: GPUs: 10.0 needed, it has 8.0; ch"):
        preflight({"": load_recipe(recipe, [("learner.ranks", "8")])})


def test_ranks_fill_whole_nodes() -> None:
    assert learner_nodes(ROOT / "recipes" / "gpu" / "omni_7b_4x8.yaml", 8) == 3
    assert learner_nodes(ROOT / "recipes" / "qwen2_5_omni_7b.yaml", 8) == 1
    assert learner_nodes(ROOT / "recipes" / "omnivideo_30b.yaml", 4) == 2
