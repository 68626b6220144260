"""What becomes of old config keys: renamed with one warning, or refused with what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from pydantic import ValidationError

from avatar_rl.actors.config import EngineConfig, RequestSampling, SamplingConfig
from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.cluster.checkpoints.resume import check_recipe
from avatar_rl.cluster.commands.configuration import reference
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.curriculum.stages import resolve
from avatar_rl.cluster.recipe.fields import sections as sections_of
from avatar_rl.cluster.recipe.load import load_recipe, to_yaml
from avatar_rl.common import config as common_config
from avatar_rl.common.config import Section, current_keys, subsection
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import JsonObject

ROOT = Path(__file__).parents[2]
WRITE = "python -m avatar_rl.cluster.commands.configuration > docs/configuration.md"


class Wheel(Section):
    inches: int = 26

    ALIASES: ClassVar[Mapping[str, str]] = {"size": "inches"}
    REMOVED: ClassVar[Mapping[str, str]] = {"colour": "paint it yourself"}


class Bicycle(Section):
    front: Wheel = Wheel()
    spare: Wheel | None = None


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> Iterator[None]:
    common_config._warned.clear()
    yield
    common_config._warned.clear()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_an_old_key_works_and_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        made = Bicycle.model_validate({"front": {"size": 20}, "spare": {"size": 24}})
    assert (made.front.inches, made.spare and made.spare.inches) == (20, 24)
    assert warnings_of(caplog) == [
        "front.size is called front.inches now; the old name goes with the next release",
        "spare.size is called spare.inches now; the old name goes with the next release",
    ]


def test_a_removed_key_is_refused_with_its_remedy() -> None:
    with pytest.raises(ConfigError, match=r"^spare\.colour is no longer a key: paint it yourself$"):
        Bicycle.model_validate({"spare": {"colour": "red"}})
    with pytest.raises(ConfigError, match=r"^colour is no longer a key"):
        Wheel.model_validate({"colour": "red"})


def test_both_names_of_one_key_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"front\.size is the old name of front\.inches, and both"
    ):
        Bicycle.model_validate({"front": {"size": 20, "inches": 21}})


def test_unknown_keys_are_left_to_the_check() -> None:
    raw: JsonObject = {"front": {"inch": 20}, "bell": {"size": 1}}
    assert current_keys(Bicycle, raw) == raw
    with pytest.raises(ValidationError, match="Extra inputs"):
        Bicycle.model_validate(raw)


def test_what_an_older_version_wrote_is_read_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    raw: JsonObject = {"front": {"size": 20, "colour": "red"}}
    assert Bicycle.recorded(raw) == Bicycle(front=Wheel(inches=20))
    assert raw == {"front": {"size": 20, "colour": "red"}}
    assert caplog.records == []


def test_sections_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Wheel().inches = 3  # type: ignore[misc]


def test_every_alias_leads_to_a_key_and_no_gone_key_is_still_there() -> None:
    found = {RunConfig, *(section for _, section, _ in sections_of(RunConfig))}
    assert {EngineConfig, BufferConfig, SamplingConfig} <= found
    for section in found:
        assert set(section.ALIASES.values()) <= set(section.model_fields), section
        gone = section.ALIASES.keys() | section.REMOVED.keys()
        assert gone.isdisjoint(section.model_fields), section


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference(), f"write it anew: {WRITE}"
    assert WRITE in page


def test_every_key_is_on_the_reference_page_with_a_description() -> None:
    lines = reference().splitlines()
    keys = [
        f"{path}.{key}"
        for path, section, _ in [("", RunConfig, False), *sections_of(RunConfig)]
        for key in section.model_fields
        if subsection(section, key) is None
    ]
    assert len(keys) > 200
    for key in keys:
        [row] = [line for line in lines if line.startswith(f"| `{key.removeprefix('.')}` |")]
        _, kind, default, text = row.strip("| ").split(" | ")
        assert kind and default and len(text) > 10 and text.endswith("."), row


RECIPE: JsonObject = {"data": {"train": "train.jsonl"}}


def written(folder: Path, **sections: JsonObject) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE | sections))
    return file


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("buffer.lease_s", "set rollout.lease_s for rollout actors and learner.lease_s"),
        ("rollout.sampling.n", "loop.fresh and loop.replayed"),
        ("rollout.engine.seed", "the recipe's `seed`"),
    ],
)
def test_keys_that_nothing_read_are_refused_by_name(tmp_path: Path, key: str, remedy: str) -> None:
    section, *inner = key.split(".")
    value: JsonObject = {inner[-1]: 4}
    for part in reversed(inner[:-1]):
        value = {part: value}
    with pytest.raises(
        ConfigError, match=rf"recipe\.yaml:\n  {key} is no longer a key: .*{remedy}"
    ):
        load_recipe(written(tmp_path, **{section: value}))
    with pytest.raises(ConfigError, match=rf"^{key} is no longer a key: .*{remedy}"):
        load_recipe(written(tmp_path), [(key, "4")])
    stages = {**RECIPE, "stages": [{"name": "a", "overrides": {section: value}}]}
    with pytest.raises(ConfigError, match=rf"recipe c, stage a:\n  {key} is no longer a key"):
        resolve(stages, [], preset_name=None, source="c")


@pytest.mark.parametrize(
    ("learner", "words"),
    [
        ({"ranks": 4, "sequence_parallel": 3}, "3 does not divide ranks 4: set it to one of 1, 2"),
        ({"sequence_parallel": 2}, "2 does not divide ranks 1: .* ranks to a multiple of 2"),
        (
            {"ranks": 2, "sequence_parallel": 2, "router": "balanced"},
            "sequence_parallel 2 and router: balanced exclude each other",
        ),
    ],
)
def test_ranks_that_cannot_share_packs_are_refused(
    tmp_path: Path, learner: JsonObject, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(written(tmp_path, learner=learner))


def test_old_names_lie_over_and_under_new_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipe over preset, override over recipe, stage over all: whichever name each one uses."""
    old, new = "checkpoint.hold_bytes", "checkpoint.replica_bytes"
    by_old = written(tmp_path, checkpoint={"hold_bytes": 5})
    assert load_recipe(by_old).checkpoint.replica_bytes == 5
    assert load_recipe(by_old, [(new, "6")]).checkpoint.replica_bytes == 6
    assert load_recipe(by_old, [(old, "7")]).checkpoint.replica_bytes == 7
    overlay = {"checkpoint": {"replica_bytes": 8}}
    monkeypatch.setattr("avatar_rl.cluster.recipe.load.stated", lambda name: overlay)
    monkeypatch.setattr("avatar_rl.cluster.recipe.load.by_hand", lambda name, given: [])
    assert load_recipe(by_old, preset_name="any").checkpoint.replica_bytes == 5
    assert load_recipe(written(tmp_path), preset_name="any").checkpoint.replica_bytes == 8
    below = {**RECIPE, "preset": "any", "checkpoint": {"hold_bytes": 9}}
    file = tmp_path / "below.yaml"
    file.write_text(yaml.safe_dump(below))
    assert load_recipe(file).checkpoint.replica_bytes == 9
    stages = [
        {"name": "a"},
        {"name": "b", "overrides": {"checkpoint": {"hold_bytes": 10}}},
        {"name": "c", "overrides": {"checkpoint": {"replica_bytes": 11}}},
    ]
    found = resolve({**below, "stages": stages}, [], preset_name=None, source="c").stages
    assert [stage.config.checkpoint.replica_bytes for stage in found] == [9, 10, 11]
    assert warnings_of(caplog) == [
        f"{old} is called {new} now; the old name goes with the next release"
    ]


def test_the_engines_old_key_still_sets_how_weights_arrive(tmp_path: Path) -> None:
    config = load_recipe(written(tmp_path), [("rollout.engine.adopt_mode", "drain")])
    assert config.rollout.engine.weight_update == "drain"


def test_a_run_of_an_older_version_is_not_another_recipe(tmp_path: Path) -> None:
    config = load_recipe(written(tmp_path))
    recorded = yaml.safe_load(to_yaml(config))
    recorded["buffer"]["lease_s"] = 120.0
    recorded["rollout"]["sampling"]["n"] = 1
    recorded["rollout"]["engine"]["seed"] = 0
    recorded["rollout"]["engine"]["adopt_mode"] = recorded["rollout"]["engine"].pop("weight_update")
    recorded["checkpoint"]["hold_bytes"] = recorded["checkpoint"].pop("replica_bytes")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    check_recipe(tmp_path, config)
    with pytest.raises(ConfigError, match=r"rollout\.engine\.weight_update: keep -> drain"):
        check_recipe(
            tmp_path, load_recipe(written(tmp_path), [("rollout.engine.weight_update", "drain")])
        )


def test_a_requests_sampling_is_the_recipes_with_a_count() -> None:
    config = SamplingConfig(temperature=0.7, max_tokens=90, min_tokens=5)
    assert RequestSampling.of(config, 4) == RequestSampling(
        n=4, temperature=0.7, max_tokens=90, min_tokens=5
    )
    greedy = RequestSampling.of(config, 1, temperature=0.0, max_tokens=30)
    assert (greedy.greedy, greedy.n, greedy.max_tokens, greedy.min_tokens) == (True, 1, 30, 5)
    with pytest.raises(ValidationError, match="4 equal completions"):
        RequestSampling(n=4, temperature=0)


def test_rollouts_in_fp8_are_another_policy(tmp_path: Path) -> None:
    fp8 = ("rollout.engine.quantization", "fp8")
    with pytest.raises(ConfigError, match=r"quantization fp8: .*Set probe\.tolerance"):
        load_recipe(written(tmp_path), [fp8])
    allowed = [fp8, ("probe.tolerance", "0.6")]
    assert load_recipe(written(tmp_path), allowed).rollout.engine.quantization == "fp8"
    with pytest.raises(ConfigError, match=r"needs a correction of the mismatch: set .*to auto"):
        load_recipe(written(tmp_path), [*allowed, ("learner.objective.old_logprobs", "behaviour")])
