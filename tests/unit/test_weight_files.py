"""A checkpoint is what its index says: for the engine's contract, the learner and the export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avatar_rl.actors.config import EngineConfig
from avatar_rl.actors.engine.launch import engine_arguments
from avatar_rl.buffer_service.weights.receiver import WeightContract
from avatar_rl.common.errors import ModelError
from avatar_rl.common.weight_files import INDEX, WeightFiles, loadable_folder
from avatar_rl.learner.model.export import export_checkpoint
from avatar_rl.learner.model.names import checkpoint_names

OLD, NEW = 1.0, 2.0


def weights(*names: str, value: float = NEW) -> dict[str, torch.Tensor]:
    return {name: torch.full((4,), value) for name in names}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def sharded(folder: Path) -> None:
    """Tensors a and b in two shards with an index."""
    for number, name in enumerate("ab", 1):
        save_file(weights(name), folder / f"model-0000{number}-of-00002.safetensors")
    places = {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate("ab", 1)}
    write_index(folder, places)


def single(folder: Path) -> None:
    save_file(weights("a", "b"), folder / "model.safetensors")


def odd_name(folder: Path) -> None:
    save_file(weights("a", "b"), folder / "weights.safetensors")


def without_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).unlink()


STRAYS = (
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "params.json",
)


@pytest.mark.parametrize("make", [sharded, single, odd_name, without_index])
@pytest.mark.parametrize("stray", [None, *STRAYS])
def test_files_beside_the_checkpoint_do_not_count(
    tmp_path: Path, make: Callable[[Path], None], stray: str | None
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    make(base)
    if stray == "params.json":
        (base / stray).write_text("{}")
    elif stray:
        save_file(weights("b", "foreign", value=OLD), base / stray)
    assert checkpoint_names(base) == {"a", "b"}
    WeightContract(base).check(weights("a", "b").items())
    out = export_checkpoint(weights("a", value=3.0), base, tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == {"a", "b"}
    assert load_file(out / "model.safetensors")["b"][0] == NEW
    assert not (out / "params.json").exists()
    # Loaders that take whole folders see the same.
    view = loadable_folder(base)
    held = {name for file in view.glob("*.safetensors") for name in load_file(file)}
    assert held == {"a", "b"}
    assert (view / "config.json").read_text() == "{}"
    assert view == base or not (view / "params.json").exists()
    arguments = engine_arguments(base, "qwen3", EngineConfig(), "cpu")
    assert (Path(arguments["model"]) == base) == (view == base)


def test_a_stale_single_file_beside_an_index_does_not_count(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file(weights("a", "b", value=OLD), tmp_path / "model.safetensors")
    found = WeightFiles.find(tmp_path)
    assert {file.name for file in found.files} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert not (loadable_folder(tmp_path) / "model.safetensors").exists()


def test_a_whole_folder_is_loaded_in_place(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert loadable_folder(tmp_path) == tmp_path


def cut(folder: Path) -> None:
    sharded(folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def lost_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def lost_shard_without_index(folder: Path) -> None:
    lost_shard(folder)
    (folder / INDEX).unlink()


def foreign_shards(folder: Path) -> None:
    sharded(folder)
    save_file(weights("c"), folder / "model-00002-of-00002.safetensors")


def overlap(folder: Path) -> None:
    for number in (1, 2):
        save_file(weights("a"), folder / f"model-0000{number}-of-00002.safetensors")


def two_series(folder: Path) -> None:
    without_index(folder)
    save_file(weights("c"), folder / "model-00001-of-00003.safetensors")


def two_files(folder: Path) -> None:
    save_file(weights("a"), folder / "first.safetensors")
    save_file(weights("b"), folder / "second.safetensors")


def adapter_only(folder: Path) -> None:
    save_file(weights("a"), folder / "adapter_model.safetensors")


def adapter(folder: Path) -> None:
    single(folder)
    (folder / "adapter_config.json").write_text("{}")


def no_map(folder: Path) -> None:
    single(folder)
    (folder / INDEX).write_text("[]")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def empty_map(folder: Path) -> None:
    single(folder)
    write_index(folder, {})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cut, r"model-00002-of-00002\.safetensors is cut short.*copy it again"),
        (lost_shard, r"names the shard model-00002-of-00002\.safetensors.*copy it"),
        (lost_shard_without_index, r"lacks the shard model-00002-of-00002\.safetensors.*copy it"),
        (foreign_shards, "holds 'b', which it does not.*copy both again"),
        (overlap, "both hold 'a'.*restore it"),
        (two_series, "no model.safetensors.index.json that says which.*restore the index"),
        (two_files, r"first\.safetensors, second\.safetensors and no.*restore the index"),
        (adapter_only, r"no \*\.safetensors file of a model.*convert it"),
        (adapter, r"an adapter \(adapter_config\.json\): merge it"),
        (no_map, "is no index of a checkpoint.*copy it again"),
        (empty_map, "names no tensor: copy it again"),
        (lambda folder: None, r"no \*\.safetensors file"),
        (pointer, r"model\.safetensors is a pointer of Git LFS.*git lfs pull"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path)
    for find in (WeightFiles.find, loadable_folder, checkpoint_names, WeightContract):
        with pytest.raises(ModelError, match=words):
            find(tmp_path)
