"""What a recipe says is what a run does: YAML's surprises are refused or read as they are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.load import load_recipe, parse_overrides
from avatar_rl.cluster.recipe.yaml_text import parse_yaml
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import Json

DATA = "data: {synthetic: {n_train: 8}}\n"


def load(folder: Path, text: str, *arguments: str) -> RunConfig:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, parse_overrides(arguments))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("-.5E+2", -50.0),
        ("no", "no"),
        ("Off", "Off"),
        ("yes", "yes"),
        ("true", True),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("007", "007"),
        ("0x10", 16),
        ("1_000", 1000),
        ("~", None),
        ("", None),
        ("~/runs", "~/runs"),
    ],
)
def test_a_scalar_is_what_it_looks_like(text: str, value: Json) -> None:
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop: {steps: 3}\nloop: {fresh: 2}", r"key 'loop' is there twice, in lines 2 and 3"),
        ("loop: {steps: 3, steps: 4}", r"key 'steps' is there twice, in lines 2 and 2"),
        ("loop:\n  steps: yes", r"loop\.steps: .*\(given: 'yes'\)"),
        ("loop:\n  steps: true", r"loop\.steps: a number is due here, not true or false"),
        ("name: 123", r"name: .*\(given: 123\), write it in quotes"),
        ("learner: {optimizer: {lr: .nan}}", r"learner\.optimizer\.lr: .*finite"),
        ("supervision: {stall_s: .inf}", r"supervision\.stall_s: .*finite"),
        ("buffer: {tls_ca: off}", r"buffer\.tls_ca: write null where nothing is meant"),
        ("output: {upload: None}", r"output\.upload: write null where nothing is meant"),
        ("output: {folder: $HOME/runs}", r"output\.folder: variables are not replaced"),
        ("model: {path: $HOME/model}", r"model\.path: variables are not replaced"),
        ("output: {folder: ''}", r"output\.folder: the path is empty"),
        ("model: {path: ' '}", r"model\.path: the path is empty"),
        (f"name: {'x' * 300}", r"name: .*at most 100 characters"),
        ("seed: 99999999999999999999", r"seed: .*less than 4294967296"),
        ("loop: {steps: 99999999999}", r"loop\.steps: .*less than or equal to 1000000000"),
        ("learner: {optimizer: {betas: [2, 3]}}", r"betas\.0: .*less than 1"),
        *(
            (f"rewards: {{judge: {{base_url: '{url}'}}}}", r"judge\.base_url: .*" + words)
            for url, words in (
                ("localhost:8000", "no URL of an endpoint: write http://HOST"),
                ("http://127.0.0.1:99999/v1", "Port out of range.*write http://HOST"),
                ("http://[::1/v1", "is no URL.*write http://HOST"),
                ("unix:///x", "no URL of an endpoint"),
                ("http://a:secret@host/v1", "name a variable in api_key_env"),
                ("http://ho st/v1", "holds a blank"),
            )
        ),
        ("output: {folder: ~nobody-here/runs}", r"output\.folder: there is no such home folder"),
    ],
)
def test_what_yaml_lets_pass_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, DATA + text)


def test_words_and_numbers_reach_their_keys(tmp_path: Path) -> None:
    config = load(tmp_path, DATA + "name: no\nlearner: {optimizer: {lr: 1e-3}}", "--loop.steps=1e1")
    assert (config.name, config.learner.optimizer.lr, config.loop.steps) == ("no", 1e-3, 10)
    assert load(tmp_path, DATA + "output: {export: no}").output.export is False


def test_home_is_expanded_wherever_a_path_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "data: {train: ~/a.jsonl, media: {disk_cache: ~/cache}}\nmodel: {path: ~/model}\n"
    config = load(tmp_path, text, "--output.folder=~/runs")
    assert config.output.folder == tmp_path / "runs"
    assert config.data.train == tmp_path / "a.jsonl"
    assert config.data.media.disk_cache == tmp_path / "cache"
    assert config.model.path == str(tmp_path / "model")
    (tmp_path / "runs").mkdir()
    assert main(["runs", "--folder=~/runs"]) == 0


def test_a_recipe_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes("name: t  # café\n".encode("latin-1") + DATA.encode())
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not UTF-8 text \(byte 14\)"):
        load_recipe(file)
    file.write_bytes(b"\xef\xbb\xbf" + DATA.encode())
    assert load_recipe(file).name == "avatar"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rollout.sampling.max_tokens=4096"],
            r"max_prompt_tokens 14336 \+ rollout\.sampling\.max_tokens 4096 exceed "
            r"rollout\.engine\.max_model_len 16384: raise max_model_len to 18432",
        ),
        (["--evaluation.max_tokens=4096"], r"evaluation\.max_tokens 4096 exceed"),
        (["--rollout.sampling.temperature=0"], r"rollout\.sampling\.temperature 0 .* above 0"),
        (
            ["--rollout.sampling.temperature=1e-9"],
            r"temperature 1e-09 .* above 0\.01",
        ),
        (["--rollout.sampling.top_k=1"], r"rollout\.sampling\.top_k 1 .* above 1"),
        (["--rollout.sampling.top_p=1e-6"], r"rollout\.sampling\.top_p 1e-06 .* above 0\.01"),
        (["--rollout.sampling.stop=['']"], r"rollout\.sampling\.stop\.0: .* at least 1 character"),
        (["--loop.fresh=1", "--loop.replayed=0"], r"loop\.fresh 1 .* set loop\.fresh to 2"),
        (["--loop.fresh=1", "--learner.objective.alpha=0"], r"loop\.fresh 1 .*alpha above 0"),
    ],
)
def test_a_run_that_could_learn_nothing_is_refused(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, DATA, *arguments)


def test_a_group_of_one_with_a_baseline_is_accepted(tmp_path: Path) -> None:
    for extra in (
        ["--loop.replayed=0", "--learner.objective.fresh_advantage=vcrs"],
        ["--loop.replayed=4"],
    ):
        assert load(tmp_path, DATA, "--loop.fresh=1", *extra).loop.fresh == 1


def test_faults_of_several_kinds_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path, DATA, "--rollout.sampling.temperature=0", "--rollout.sampling.max_tokens=9999"
        )
    assert "temperature 0" in str(caught.value) and "max_tokens 9999" in str(caught.value)


@pytest.mark.parametrize("option", ["--preset", "--resume", "--stage", "--from-stage"])
def test_an_option_that_a_shell_left_empty_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "r.yaml").write_text(DATA)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "r.yaml"), f"{option}=", "--dry-run"])
    assert ended.value.code == 2 and f"{option} has no value" in capsys.readouterr().err


def test_an_endpoint_that_is_no_url_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.jsonl").write_text("{}")
    asked = ["hints", "generate", str(tmp_path / "d.jsonl"), "--model=m", "--out=o.jsonl"]
    assert main([*asked, "--base-url=foo"]) == 1
    assert "--base-url foo: Value error, is no URL of an endpoint" in capsys.readouterr().err


def test_a_current_folder_that_is_gone_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["runs"]) == 1
    assert "the current folder is gone: change to another" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/a")

    (tmp_path / "r.yaml").write_text(DATA)
    monkeypatch.setattr("avatar_rl.cluster.commands.train.read_recipe", failing)
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run"]) == 1
    assert "/somewhere/a: Permission denied; correct the path" in capsys.readouterr().err
