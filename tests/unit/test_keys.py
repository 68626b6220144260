"""Keys of a recipe explain themselves: suggestions, origins, schema, other frameworks' names."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import jsonschema
import pytest
from pydantic_core import to_jsonable_python

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.commands.keys.schema import schema
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.fields import all_keys, section_at, sections
from avatar_rl.cluster.recipe.layers import Layers
from avatar_rl.cluster.recipe.load import load_recipe, read_recipe
from avatar_rl.cluster.recipe.other_names import SWIFT, TABLES, TRL, VERL, counterpart, page
from avatar_rl.cluster.recipe.presets import PRESETS
from avatar_rl.common.config import subsection

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LOCAL = ROOT / "recipes" / "local.yaml"


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


# -- did you mean ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--learner.optimzer.lr", "did you mean 'optimizer'?"),  # beside it
        ("--learner.lr", "did you mean 'learner.optimizer.lr' or 'cold_start.optimizer.lr'?"),
        ("--optimizer.lr", "did you mean 'learner.optimizer.lr' or 'cold_start.optimizer.lr'?"),
        ("--steps", "did you mean 'loop.steps' or 'cold_start.steps'?"),
        ("--max_tokns", "did you mean 'rollout.sampling.max_tokens' or "),
        ("--learningrate", "did you mean 'learner.optimizer.lr'?"),
        ("--rewards.judge.url", "did you mean 'base_url'?"),
        ("--learning_rate", "TRL's learning_rate is learner.optimizer.lr here"),
        ("--learner.learning-rate", "TRL's learning_rate is learner.optimizer.lr here"),
        ("--num_generations", "TRL's num_generations is loop.fresh here (beside loop.replayed"),
        ("--temperature", "TRL's temperature is rollout.sampling.temperature here"),
        ("--use_vllm", "TRL's use_vllm has no counterpart here: rollouts always come from vLLM"),
        ("--actor_rollout_ref.rollout.n", "verl's actor_rollout_ref.rollout.n is loop.fresh here"),
        ("--kl_loss_coef", "verl's actor_rollout_ref.actor.kl_loss_coef is learner.objective.beta"),
        ("--freeze_vit", "ms-swift's freeze_vit is learner.optimizer.freeze here"),
        ("--batch_size", "what other programs call batch_size is loop.prompts_per_step here"),
        ("--loop.zzz", "known here: steps, prompts_per_step, fresh"),
    ],
)
def test_a_wrong_key_is_told_what_may_be_meant(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said_by(capsys, "train", str(LOCAL), "--dry-run", override, "1")
    assert code == 1 and said in text


def test_several_keys_of_another_framework_are_all_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rollout = "{n: 8, temperature: 1.0}"
    code, text = said_by(
        capsys, "train", str(LOCAL), "--dry-run", "--actor_rollout_ref.rollout", rollout
    )
    assert code == 1
    assert "rollout.n is loop.fresh here" in text
    assert "rollout.temperature is rollout.sampling.temperature here" in text


# -- other frameworks ------------------------------------------------------------------------------


def test_every_counterpart_is_a_key_and_every_note_says_why_there_is_none() -> None:
    for rows in TABLES.values():
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            is_there = row.key in all_keys() or section_at(row.key) is not None
            assert is_there if row.key else row.note, row
    assert counterpart("nothing") is None
    assert counterpart("lr_warmup_steps") == counterpart(
        "actor_rollout_ref.actor.optim.lr_warmup_steps"
    )


#: GRPOConfig and what it is made of, read from the source: importing it takes seconds.
TRL_SOURCES = (
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)


def declared(package: str, module: str, name: str) -> set[str]:
    """Fields that a dataclass of an installed package declares itself."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / module).read_text())
    [found] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    lines = [n.target for n in found.body if isinstance(n, ast.AnnAssign)]
    return {target.id for target in lines if isinstance(target, ast.Name)}


def test_trl_has_the_keys_that_are_said_to_be_its_own() -> None:
    theirs = {
        name
        for package, module, classes in TRL_SOURCES
        for name in declared(package, module, classes)
    }
    assert len(theirs) > 150
    # of its scripts, and of older versions that recipes are still written for
    others = {"model_name_or_path", "dataset_name", "reward_funcs", "ref_model"}
    others |= {"warmup_ratio", "max_prompt_length", "use_peft", "lora_r", "use_rslora"}
    others |= {"lora_alpha", "lora_dropout", "lora_target_modules"}
    assert {row.name for row in TABLES[TRL]} - others <= theirs


def test_the_page_is_made_of_the_tables() -> None:
    assert (ROOT / "docs" / "other-frameworks.md").read_text() == page()
    assert all(f"## {name}\n" in page() for name in (TRL, VERL, SWIFT))


# -- defaults and origins --------------------------------------------------------------------------


def test_a_section_that_is_given_in_part_keeps_its_defaults() -> None:
    for _, section, _ in [("", RunConfig, False), *sections(RunConfig)]:
        for name, field in section.model_fields.items():
            inner = subsection(section, name)
            if inner is None or field.is_required() or field.default is None:
                continue
            assert field.get_default(call_default_factory=True) == inner(), (section, name)


@pytest.mark.parametrize("preset", [None, "grpo", "avatar_plus", "omnivideo_qi"])
@pytest.mark.parametrize("recipe", [path for path in RECIPES if "stages" not in read_recipe(path)])
def test_the_value_that_is_explained_is_the_one_in_force(recipe: Path, preset: str | None) -> None:
    overrides = [("learner.optimizer.lr", "3e-4"), ("rewards.weights.format", "0.25")]
    config = load_recipe(recipe, overrides, preset_name=preset)
    layers = Layers.of(read_recipe(recipe), str(recipe), preset, overrides)
    for path in all_keys():
        value: object = config
        for name in path.split("."):
            value = getattr(value, name, None)
        assert to_jsonable_python(layers.value(path)[0]) == to_jsonable_python(value), path


def test_origins_are_named() -> None:
    layers = Layers.of(
        {"preset": "grpo", "loop": {"steps": 3}, "rewards": {"weights": {"format": 1}}},
        "mine.yaml",
        "dapo",
        [("rewards.weights.accuracy", "2"), ("seed", "4")],
    )
    assert layers.value("loop.steps") == (3, "mine.yaml")
    assert layers.value("loop.prompts_per_step") == (8, "default")
    assert layers.value("loop.replayed") == (0, "preset dapo, from the command line")
    assert layers.value("learner.objective.epsilon_high")[0] == 0.28
    assert layers.value("seed") == (4, "the command line")
    assert layers.value("rewards.weights") == (
        {"format": 1, "accuracy": 2},
        "mine.yaml and the command line",
    )
    assert layers.value("cold_start.steps") == (None, "section cold_start is left out")
    named = Layers.of({"preset": "grpo"}, "mine.yaml", None, [])
    assert named.value("loop.replayed") == (0, "preset grpo, which mine.yaml names")


def test_explain_says_what_there_is_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said_by(capsys, "explain", "learner.objective.beta", str(LOCAL))
    lines = [re.sub(" +", " ", line.strip()) for line in text.splitlines()]
    assert code == 0
    assert lines[:2] == [
        "learner.objective.beta",
        "Weight of the k3 KL to the reference policy; 0 needs no reference.",
    ]
    assert {"type number ≥ 0", "default 0.1", "value 0.02", f"from {LOCAL}"} <= set(lines)
    assert any(line.startswith("elsewhere beta, actor_rollout_ref") for line in lines)
    assert lines[-1] == "read on docs/objective.md; docs/configuration.md"


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (("alpha",), ("learner.objective.alpha", "default    0.6")),
        (("--learner.objective.alpha",), ("default    0.6",)),
        (("lr",), ("learner.optimizer.lr", "cold_start.optimizer.lr")),
        (("num_generations",), ("TRL's num_generations is loop.fresh", "default    4")),
        (("use_vllm",), ("TRL's use_vllm has no counterpart",)),
        (("sampling", str(LOCAL)), ("rollout.sampling.max_tokens", "48")),
        (("loop.fresh", "--preset", "grpo"), ("value      8", "preset grpo")),
        (("loop.fresh", str(LOCAL), "--loop.fresh", "6"), ("value      6", "the command line")),
    ],
)
def test_explain_understands_parts_sections_and_other_names(
    words: tuple[str, ...], pieces: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said_by(capsys, "explain", *words)
    assert code == 0 and all(piece in text for piece in pieces), text


def test_explain_of_nothing_known_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said_by(capsys, "explain", "tas_lamda")
    assert code == 1 and "did you mean learner.objective.tas_lambda?" in text
    code, text = said_by(capsys, "explain", "zzzzz")
    assert code == 1 and "no key of a recipe is called 'zzzzz'" in text


def test_help_all_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--dry-run" in text
    assert [path for path in all_keys() if f"  --{path}" not in text] == []


def test_a_pages_documentation_is_there() -> None:
    from avatar_rl.cluster.commands.keys.explain import PAGES, page_of

    assert all((ROOT / name).is_file() for name in {*PAGES.values(), page_of("seed")})


# -- schema ----------------------------------------------------------------------------------------


def test_the_schema_is_sound_and_every_recipe_names_it() -> None:
    written = json.loads((ROOT / "recipes" / "schema.json").read_text())
    assert written == schema(), "avatar schema > recipes/schema.json"
    jsonschema.Draft202012Validator.check_schema(written)
    validator = jsonschema.Draft202012Validator(written)
    for recipe in [*RECIPES, *(ROOT / "recipes" / "gpu").glob("*.yaml")]:
        first = recipe.read_text().splitlines()[0]
        up = "" if recipe in RECIPES else "../"
        assert first == f"# yaml-language-server: $schema={up}schema.json"
        validator.validate(read_recipe(recipe))


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": {"train": "x"}, "loop": {"stepz": 3}},
        {"data": {"train": "x"}, "loop": {"steps": 0}},
        {"data": {"train": "x"}, "learner": {"objective": {"loss_type": "ppo"}}},
        {"data": {"train": "x"}, "preset": "gropo"},
        {"data": {"train": "x"}, "stages": [{"kind": "rl"}]},
        {"loop": {"steps": 3}},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(wrong)


def test_the_schema_has_every_key_with_its_description() -> None:
    text = json.dumps(schema())
    for key in all_keys().values():
        assert json.dumps(key.description) in text or key.path == "preset", key.path
    assert all(name in text for name in PRESETS)


def test_a_shell_completes_keys_and_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.shell_completion import BashComplete

    from avatar_rl.cluster.cli import avatar

    complete = BashComplete(avatar, {}, "avatar", "_AVATAR_COMPLETE")
    found = {item.value for item in complete.get_completions(["train", "x.yaml"], "--loop.st")}
    assert found == {"--loop.steps", "--loop.step_timeout_s"}
    found = {item.value for item in complete.get_completions(["train", "--preset"], "grpo")}
    assert found == {"grpo", "grpo4", "grpo_updates"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said_by(capsys, "completion", shell)
    assert code == 0 and "_AVATAR_COMPLETE" in text
