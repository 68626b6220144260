"""A run's config.yaml by libyaml: the bytes and values of PyYAML's own dumper and loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.common.plain_yaml import parse_plain, plain_yaml

RECIPES = Path(__file__).parents[2] / "recipes"
ODD = {
    "words": ["no", "on", "~", "1e-3", "007", "é 音 🎵", "x: y", " a\n b\n", "#", "2026-12-01", ""],
    "numbers": [0, -1, 1e-3, 1.5e300, 2**70],
    "nothing": None,
    "deep": {"empty": {}, "list": [], "flag": False},
}


@pytest.mark.parametrize("name", ["local.yaml", "odd values"])
def test_what_is_written_is_what_pyyaml_writes_and_comes_back(name: str) -> None:
    value = load_recipe(RECIPES / name).model_dump(mode="json") if name[-1] == "l" else ODD
    text = plain_yaml(value)
    assert text == yaml.safe_dump(value, sort_keys=False, width=110)
    assert parse_plain(text) == yaml.safe_load(text) == value


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "a: !!python/name:os.system x", "\x07"])
def test_what_cannot_be_read_is_a_yaml_error(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_plain(text)
