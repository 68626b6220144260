"""From recipe, preset and overrides to a checked configuration, and what the command line says to
mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.curriculum.stages import resolve as resolve_stages
from avatar_rl.cluster.recipe.load import load_recipe, parse_overrides, resolve_recipe, to_yaml
from avatar_rl.cluster.recipe.overlays import leaves, merge, value_at
from avatar_rl.cluster.recipe.presets import PRESETS, TOUCHED, preset, resolved
from avatar_rl.common.errors import ConfigError
from avatar_rl.rewards.config import STAGE_WEIGHTS

ROOT = Path(__file__).parents[2]
BASE = {"name": "t", "data": {"synthetic": {"n_train": 8}}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path, BASE)


def write(folder: Path, content: object) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def load(file: Path, *arguments: str, preset_name: str | None = None) -> RunConfig:
    return load_recipe(file, parse_overrides(arguments), preset_name=preset_name)


# -- presets ---------------------------------------------------------------------------------------

#: fresh, replayed, TAS, hints (docs/method.md 1.1 to 1.4, 3)
METHODS = {
    "grpo": (8, 0, 0.0, False),
    "grpo4": (4, 0, 0.0, False),
    "tas_only": (8, 0, 0.3, False),
    "replay_only": (4, 4, 0.0, False),
    "avatar_no_hint": (4, 4, 0.3, False),
    "avatar": (4, 4, 0.3, True),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(recipe: Path, name: str) -> None:
    config = load(recipe, preset_name=name)
    assert config.preset == name
    if name in METHODS:
        objective = config.learner.objective
        assert METHODS[name] == (
            config.loop.fresh,
            config.loop.replayed,
            objective.tas_lambda,
            config.buffer.hints.enabled,
        )


def test_published_baselines_have_their_constants(recipe: Path) -> None:
    gspo = load(recipe, preset_name="gspo").learner.objective
    assert (gspo.ratio, gspo.epsilon, gspo.upper, gspo.tas_lambda) == (
        "sequence",
        3e-4,
        4e-4,
        0.0,
    )  # docs/method.md 2.3
    dapo = load(recipe, preset_name="dapo").learner.objective
    assert (dapo.loss_type, dapo.epsilon, dapo.upper) == ("dapo", 0.2, 0.28)
    dr_grpo = load(recipe, preset_name="dr_grpo").learner.objective
    assert (dr_grpo.loss_type, dr_grpo.scale_rewards) == ("dr_grpo", "none")


def test_every_key_that_a_preset_touches_is_named_by_all() -> None:
    for name in PRESETS:
        assert set(resolved(name)) == set(TOUCHED)
        assert all(setting.source for setting in resolved(name).values())


def test_a_preset_resolves_to_what_it_names(recipe: Path) -> None:
    """So nothing that a preset leaves open comes from elsewhere."""
    plain = RunConfig.model_validate(BASE).model_dump(mode="json")
    for name in PRESETS:
        found = load(recipe, preset_name=name).model_dump(mode="json")
        named = RunConfig.model_validate({**BASE, **merge(preset(name), BASE)})
        assert found == named.model_dump(mode="json") | {"preset": name}
        changed = {
            key for key, value in leaves(found) if key != "preset" and value_at(plain, key) != value
        }
        assert all(any(f"{key}.".startswith(f"{one}.") for one in TOUCHED) for key in changed)


@pytest.mark.parametrize("below", PRESETS)
def test_a_preset_over_any_other_resolves_to_itself(tmp_path: Path, below: str) -> None:
    recipe = write(tmp_path, {**BASE, "preset": below})
    for name in PRESETS:
        alone = resolve_recipe({**BASE, "preset": name}, [], source="r")
        assert load(recipe, preset_name=name) == alone
        stages = [{"name": "one", "preset": name, "steps": 3}]
        staged = resolve_stages(
            {**BASE, "preset": below, "stages": stages}, [], preset_name=None, source="r"
        )
        of_stage = staged.stages[0].config
        assert of_stage.learner == alone.learner and of_stage.rewards == alone.rewards
        assert of_stage.buffer == alone.buffer and of_stage.rollout == alone.rollout
        assert of_stage.loop == alone.loop.model_copy(update={"steps": 3})


def test_what_is_given_by_hand_wins_over_presets_and_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, {**BASE, "preset": "avatar", "loop": {"fresh": 3, "steps": 7}})
    config = load(file)
    assert (config.loop.fresh, config.loop.replayed, config.loop.steps) == (3, 4, 7)
    over = load(file, preset_name="grpo")
    assert (over.preset, over.loop.fresh, over.loop.replayed, over.loop.steps) == ("grpo", 3, 0, 7)
    last = load(file, "--loop.fresh", "5", preset_name="grpo")
    assert (last.loop.fresh, last.loop.replayed) == (5, 0)
    assert main(["train", str(file), "--preset", "grpo", "--dry-run"]) == 0
    assert "# loop.fresh: 3 by hand, 8 in preset grpo" in capsys.readouterr().out
    equal = write(tmp_path, {**BASE, "preset": "avatar", "loop": {"fresh": 4}})
    assert main(["train", str(equal), "--dry-run"]) == 0
    assert "by hand" not in capsys.readouterr().out


def test_reward_weights_replace_those_below(tmp_path: Path) -> None:
    file = write(
        tmp_path, {**BASE, "preset": "omnivideo_qi", "rewards": {"weights": {"accuracy": 1.0}}}
    )
    assert load(file).rewards.weights == {"accuracy": 1.0}
    joined = load(file, "--rewards.weights.format", "0.2").rewards.weights
    assert joined == {"accuracy": 1.0, "format": 0.2}
    staged = load(file, "--rewards.stage", "3").rewards
    assert (staged.stage, staged.weights) == (3, STAGE_WEIGHTS[3])
    file = write(tmp_path, {**BASE, "rewards": {"stage": 2}})
    assert load(file).rewards.weights == STAGE_WEIGHTS[2]
    assert load(file, "--rewards.weights.judge", "0").rewards.weights == {
        **STAGE_WEIGHTS[2],
        "judge": 0.0,
    }
    again = RunConfig.model_validate(yaml.safe_load(to_yaml(load(file))))
    assert again.rewards.weights == STAGE_WEIGHTS[2]
    file = write(tmp_path, {**BASE, "rewards": {"stage": 2, "weights": {"accuracy": 1.0}}})
    with pytest.raises(ConfigError, match="keep one of them"):
        load(file)


def test_frames_and_fps_replace_each_other(tmp_path: Path) -> None:
    file = write(tmp_path, {**BASE, "preset": "paper"})
    assert load(file).data.reader.frames == 32
    fps = {**BASE["data"], "reader": {"fps": 1.0}}  # type: ignore[dict-item]
    file = write(tmp_path, {**BASE, "preset": "paper", "data": fps})
    assert (load(file).data.reader.frames, load(file).data.reader.fps) == (None, 1.0)


def test_the_two_set_ups_of_avatar_are_those_of_the_table(recipe: Path) -> None:
    """docs/method.md 1.6."""
    paper, code = load(recipe, preset_name="paper"), load(recipe, preset_name="official_code")
    for config in (paper, code):
        sampling = config.rollout.sampling
        assert (config.loop.fresh, config.loop.replayed) == (4, 4)
        assert (config.learner.optimizer.lr, config.learner.warmup) == (5e-7, 0.05)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 50)
        assert (sampling.max_tokens, config.rollout.engine.max_model_len) == (2048, 16_384)
    assert (paper.learner.objective.alpha, code.learner.objective.alpha) == (0.6, 1.0)
    assert (paper.rewards.format, code.rewards.format) == ("signed", "binary")
    assert paper.learner.lora is not None and code.learner.lora is not None
    assert paper.learner.lora.rank == 16
    assert set(paper.learner.lora.targets) == {"vision", "audio", "projector", "llm"}
    assert (code.learner.lora.rank, code.learner.lora.alpha) == (8, 32)
    assert code.learner.lora.targets == ("all-linear",)
    assert (paper.data.reader.frames, code.data.reader.frames) == (32, 16)
    assert (code.data.reader.max_pixels, code.data.reader.image_max_pixels) == (50_176, 401_408)
    assert code.data.reader.audio_in_video and code.learner.optimizer.zero_stage == 2
    assert code.rewards.weights == {"accuracy": 1.0, "format": 0.5}
    assert (paper.buffer.warm_up, code.buffer.warm_up) == (128, 10)


def test_presets_are_not_changed_by_merging() -> None:
    before = json.dumps(preset("avatar"))
    merged = merge(preset("avatar"), {"loop": {"fresh": 1}})
    assert merged["loop"] == {**preset("avatar")["loop"], "fresh": 1}
    assert json.dumps(preset("avatar")) == before


# -- overrides -------------------------------------------------------------------------------------


def test_overrides_reach_any_depth_and_keep_their_neighbours(tmp_path: Path) -> None:
    file = write(tmp_path, {**BASE, "learner": {"optimizer": {"lr": 1e-3, "zero_stage": 2}}})
    config = load(
        file,
        "--learner.optimizer.lr",
        "1e-4",
        "--loop.max_staleness=0",
        "--learner.optimizer.freeze",
        "[visual, audio_tower]",
        "--seed",
        "7",
        "--data.media.disk_cache",
        "null",
        "--output.export=false",
    )
    assert config.learner.optimizer.lr == 1e-4  # YAML reads 1e-4 as a word
    assert config.learner.optimizer.zero_stage == 2
    assert config.learner.optimizer.freeze == ("visual", "audio_tower")
    assert (config.loop.max_staleness, config.seed, config.output.export) == (0, 7, False)
    assert config.data.media.disk_cache is None


def test_a_later_override_wins(recipe: Path) -> None:
    assert load(recipe, "--seed", "1", "--seed", "2").seed == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps=3"], "unexpected argument 'steps=3'"),
        (["--"], "unexpected argument '--'"),
        (["--seed"], "--seed has no value"),
        (["--seed", "--loop.steps", "3"], "--seed has no value"),
    ],
)
def test_malformed_overrides_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides(arguments)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--learner.optimiser.lr=1", r"learner\.optimiser: unknown key, did you mean 'optimizer'"),
        ("--lop.steps=1", r"lop: unknown key, did you mean 'loop'"),
        (
            "--data.synthetic.n_trian=1",
            r"data\.synthetic\.n_trian: unknown key, did you mean 'n_train'",
        ),
        ("--loop.zzz=1", r"loop\.zzz: unknown key, known here: steps, prompts_per_step, fresh"),
        ("--loop.steps=0", r"loop\.steps: .*greater than or equal to 1 \(given: 0\)"),
        ("--loop.steps=many", r"loop\.steps: .*integer.*\(given: 'many'\)"),
        (
            "--learner.optimizer.zero_stage=4",
            r"learner\.optimizer\.zero_stage: .*less than or equal to 3",
        ),
        ("--learner.objective.loss_type=ppo", r"learner\.objective\.loss_type: .*'grpo', 'dapo'"),
        (
            "--learner.optimizer.offload_optimizer=true",
            r"offload_optimizer needs zero_stage 1, 2 or 3",
        ),
        (
            "--learner.share_prefix=false",
            r"learner\.share_prefix is no longer a key: .*delete",
        ),
        (
            "--learner.micro_batch_tokens=300",
            r"exceed learner\.micro_batch_tokens 300, .*raise micro_batch_tokens to 16384",
        ),
        ("--data.train=x.jsonl", r"data: data has both `synthetic` and dataset files"),
        ("--rollout.max_sequences=2", r"rollout\.max_sequences 2 is below one group of 8"),
        ("--rewards.weights.acuracy=1", r"rewards\.weights: unknown reward 'acuracy'"),
        ("--seed.deep=1", r"seed: "),
        ("--seed=[1", r"--seed '\[1' is not a YAML value"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(recipe, override)


def test_fusion_needs_room_for_its_unimodal_rollouts(recipe: Path) -> None:
    overrides = ("--rewards.weights.fusion", "0.5", "--rollout.max_sequences")
    assert load(recipe, *overrides, "24").rewards.asks_unimodal
    with pytest.raises(
        ConfigError, match=r"max_sequences 23 is below one group of 24 \(fusion: with video alone"
    ):
        load(recipe, *overrides, "23")


def test_all_mistakes_are_told_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(recipe, "--loop.steps=0", "--loop.fersh=1", "--learner.ranks=-1")
    assert all(
        name in str(caught.value)
        for name in ("loop.steps", "loop.fersh", "learner.ranks", "'fresh'")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loop: {steps: 3", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping of sections, found list"),
        ("", r"data: Field required"),
        ("data: {}", r"data needs `train: FILE` or a `synthetic:` section"),
        ("preset: nonsense\ndata: {train: x}", "unknown preset 'nonsense': choose one of grpo"),
        ("data: {train: x}\ncold_start: {steps: 1}", r"cold_start needs `data\.sft: FILE`"),
        ("loop: 3\ndata: {train: x}", r"loop: "),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, content))


def test_a_missing_recipe_names_its_neighbours(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist: there are .*recipe\.yaml"):
        load(recipe.with_name("absent.yaml"))


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder: name the \.yaml file in it"):
        load(tmp_path)


def test_what_is_printed_loads_to_the_same_configuration(tmp_path: Path, recipe: Path) -> None:
    config = load(recipe, "--learner.optimizer.lr", "3e-5", preset_name="gspo")
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(config))
    assert load(printed) == config


# -- the command line ------------------------------------------------------------------------------


def test_exit_codes_and_messages(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[list[str], str]] = [
        (["train", str(tmp_path / "absent.yaml")], "does not exist"),
        (["train", str(recipe), "--dry-run", "--preset", "nonsense"], "unknown preset"),
        (["train", str(recipe), "--dry-run", "--loop.stepz", "3"], "did you mean 'steps'"),
        (["train", str(recipe), "--dry-run", "--learner.ranks", "4000"], "learner.ranks"),
        (["train", str(recipe), "--dry-run", "stray"], "unexpected argument"),
        (["data", "synthesize", str(tmp_path)], "already holds something"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("avatar: ") and message in captured.err
        assert "Traceback" not in captured.err
    for arguments in ([], ["tarin"], ["train"], ["presets", "a", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        capsys.readouterr()


def test_presets_are_listed_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(preset.meaning in line for line, preset in zip(lines, PRESETS.values(), strict=True))
    assert main(["presets", "official_code"]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "1.0" in shown["learner.objective.alpha"] and "[C]" in shown["learner.objective.alpha"]
    assert shown["loop.schedule"].endswith("default")
    assert main(["presets", "avatr"]) == 1
    assert "unknown preset 'avatr'" in capsys.readouterr().err


def test_interruption_has_its_own_exit_code(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("avatar_rl.cluster.commands.train.load_recipe", interrupt)
    assert main(["train", str(recipe)]) == 130
    assert "interrupted" in capsys.readouterr().err
