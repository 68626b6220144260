"""The cold start that the demo brings along: it is what this tree would make, and a run takes it
only where it fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import cold_start_folder, prepare_base_model, prepare_datasets
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.cluster.recipe.ready_start import (
    MANIFEST,
    read_made,
    ready_start,
    settings_of,
    why_not_ready,
)
from avatar_rl.cluster.training.make_ready import WEIGHTS, fingerprint
from avatar_rl.common.errors import ConfigError

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "recipes" / "local.yaml"
SHIPPED = ROOT / "recipes" / "assets" / "tiny_omni"
STALE = (
    "recipes/assets/tiny_omni is not what this tree makes any more: `make cold-start` makes it "
    "anew (10 minutes on two cores); commit the folder"
)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    return load_recipe(LOCAL)


def near(print_of: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint to compare with, whose last digits may differ."""
    pictures, sounds = print_of["pictures"], print_of["sounds"]
    return print_of | {
        "pictures": pytest.approx(pictures, abs=0.2),
        "sounds": pytest.approx(sounds, abs=2),
    }


def test_the_shipped_cold_start_is_what_this_tree_would_make(
    config: RunConfig, tiny_omni: Path
) -> None:
    made = read_made(SHIPPED)
    assert settings_of(config) == made.settings, STALE
    assert fingerprint(config, tiny_omni) == near(made.fingerprint), STALE
    assert fingerprint(config, SHIPPED) == near(made.fingerprint), STALE
    assert ready_start(config) == SHIPPED
    assert made.accuracy >= 0.6 and made.prompts == 200


def test_it_is_small_and_its_files_are_those_listed() -> None:
    names = {file.name for file in SHIPPED.iterdir()} - {MANIFEST}
    assert names == set(read_made(SHIPPED).files)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 5e6


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "chat template": (
        "files",
        lambda model: (model / "chat_template.jinja").write_text("{{ messages }}"),
    ),
    "processor": (
        "files",
        lambda model: edit(
            model / "processor_config.json",
            lambda read: read["feature_extractor"].update(hop_length=80),
        ),
    ),
    "tokenizer": (
        "files",
        lambda model: edit(model / "tokenizer.json", lambda read: read["model"]["merges"].pop()),
    ),
    "width": (
        "files",
        lambda model: edit(
            model / "config.json",
            lambda read: read["thinker_config"]["text_config"].update(hidden_size=64),
        ),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_the_tiny_model_is_seen(
    what: str, config: RunConfig, tiny_omni: Path, tmp_path: Path
) -> None:
    part, change = CHANGES[what]
    model = tmp_path / "model"
    shutil.copytree(tiny_omni, model)
    change(model)
    from avatar_rl.cluster.training import make_ready

    files = {file.name: make_ready._content(file) for file in model.iterdir()}
    known = read_made(SHIPPED).fingerprint[part]
    assert {name: files[name] for name in known} != known


def test_a_change_of_template_or_world_is_seen(config: RunConfig, tiny_omni: Path) -> None:
    known = read_made(SHIPPED).fingerprint
    template = config.data.template.model_copy(update={"instruction": "Be brief."})
    data = config.data.model_copy(update={"template": template})
    other = fingerprint(config.model_copy(update={"data": data}), tiny_omni)
    assert other["texts"] != known["texts"] and other["tokens"] != known["tokens"]
    assert config.data.synthetic is not None
    world = config.data.synthetic.model_copy(update={"seed": 1})
    data = config.data.model_copy(update={"synthetic": world})
    other = fingerprint(config.model_copy(update={"data": data}), tiny_omni)
    assert other["texts"] != known["texts"] and other["pictures"] != near(known)["pictures"]


def test_the_weights_are_trained_ones_of_the_tiny_model(tiny_omni: Path) -> None:
    with (
        safe_open(SHIPPED / WEIGHTS, framework="np") as trained,
        safe_open(tiny_omni / WEIGHTS, framework="np") as base,
    ):
        names = set(base.keys())
        assert names == set(trained.keys())
        head = "thinker.lm_head.weight"
        assert abs(trained.get_tensor(head) - base.get_tensor(head)).max() > 0.05


# -- which runs take it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        ("seed", "3"),
        ("cold_start.ranks", "1"),
        ("data.synthetic.n_train", "16"),
        ("data.template.cache_bytes", "0"),
        ("preset", "grpo"),
    ],
)
def test_what_the_cold_start_does_not_depend_on_leaves_it_ready(
    override: tuple[str, str], config: RunConfig
) -> None:
    assert ready_start(load_recipe(LOCAL, [override])) == SHIPPED


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("cold_start.steps", "10"), "cold_start.steps 1500, here 10"),
        (("cold_start.optimizer.lr", "1e-4"), "cold_start.optimizer.lr 0.0015, here 0.0001"),
        (("data.template.instruction", "Be brief."), "data.template.instruction '', here 'Be b"),
        (("data.synthetic.n_sft", "64"), "data.synthetic.n_sft 6400, here 64"),
        (("data.synthetic.seed", "1"), "data.synthetic.seed 0, here 1"),
        (("model.path", "/models/mine"), "model.path 'tiny', here '/models/mine'"),
    ],
)
def test_a_recipe_of_other_settings_trains_its_own_and_says_why(
    override: tuple[str, str], said: str, config: RunConfig
) -> None:
    changed = load_recipe(LOCAL, [override])
    assert ready_start(changed) is None
    assert said in why_not_ready(changed)


def test_from_scratch_asks_for_nothing(config: RunConfig) -> None:
    scratch = load_recipe(LOCAL, [("cold_start.ready", "null")])
    assert ready_start(scratch) is None and why_not_ready(scratch) == ""
    assert ready_start(load_recipe(LOCAL, [("cold_start", "null")])) is None


def test_it_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert ready_start(load_recipe(LOCAL)) == SHIPPED


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"version https://git-lfs"), WEIGHTS),
        (lambda folder: (folder / "config.json").unlink(), "config.json is not the file"),
        (lambda folder: (folder / MANIFEST).write_text('{"settings"'), "made.json is torn"),
        (lambda folder: (folder / MANIFEST).unlink(), "made.json is missing"),
        (shutil.rmtree, "made.json is missing"),
    ],
)
def test_a_damaged_one_is_an_error_with_the_remedy(
    damage: Callable[[Path], object], said: str, config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "ready"
    shutil.copytree(SHIPPED, folder)
    damage(folder)
    with pytest.raises(ConfigError, match=r"make cold-start.*cold_start\.ready: null") as caught:
        ready_start(load_recipe(LOCAL, [("cold_start.ready", str(folder))]))
    assert said in str(caught.value)


def test_only_the_clips_that_are_needed_are_made(tmp_path: Path, config: RunConfig) -> None:
    few = [("data.synthetic", "{n_train: 3, n_heldout: 2}"), ("output.cache", str(tmp_path))]
    phases: list[str] = []
    counted: list[tuple[int, int]] = []

    def tell(phase: str, detail: str) -> None:
        phases.append(f"{phase} {detail}")

    datasets = prepare_datasets(
        load_recipe(LOCAL, few), tell, lambda done, total: counted.append((done, total))
    )
    assert datasets.sft is None and counted == [(n, 5) for n in range(1, 6)]
    assert len(list(tmp_path.rglob("*.mp4"))) == 5
    assert prepare_base_model(load_recipe(LOCAL, few), tell) == SHIPPED
    assert not list(tmp_path.glob("tiny-omni-*"))
    scratch = [*few, ("data.synthetic.n_sft", "4"), ("cold_start.ready", "null")]
    trained = load_recipe(LOCAL, scratch)
    datasets = prepare_datasets(trained, tell)
    assert datasets.sft is not None and len(datasets.sft.read_text().splitlines()) == 4
    assert len(list(tmp_path.rglob("*.mp4"))) == 9
    assert cold_start_folder(trained, SHIPPED, datasets.sft) == cold_start_folder(
        load_recipe(LOCAL, scratch[:-1]), SHIPPED, datasets.sft
    )
