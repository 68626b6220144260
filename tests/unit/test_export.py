"""Checkpoints out: complete, proven by reading back, and whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import avatar_rl.learner.model.export
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.model.export import export_checkpoint
from avatar_rl.learner.model.names import checkpoint_names

NAN = float("nan")
WEIGHTS = {
    "thinker.w": torch.arange(12.0).reshape(3, 4),
    "thinker.b": torch.tensor([1.5, -2.0]).bfloat16(),
    "thinker.transposed": torch.arange(6.0).reshape(2, 3).T,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base checkpoint with a part that is not trained, and files of every sort."""
    folder = tmp_path / "base"
    folder.mkdir()
    old = {name: torch.zeros_like(value).contiguous() for name, value in WEIGHTS.items()}
    save_file({**old, "talker.w": torch.full((2,), 7.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"dtype": "bfloat16", "thinker_config": {}}')
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "spk_dict.pt",
        "notes.md",
    ):
        (folder / name).write_text(name)
    weight_map = dict.fromkeys([*WEIGHTS, "talker.w"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_folder_is_complete(base: Path, tmp_path: Path) -> None:
    out = export_checkpoint(WEIGHTS, base, tmp_path / "deep" / "out")
    found = load_file(out / "model.safetensors")
    assert found.keys() == {*WEIGHTS, "talker.w"}
    for name, tensor in WEIGHTS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert found["talker.w"].tolist() == [7, 7]
    assert {file.name for file in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "spk_dict.pt",
    }
    assert (out / "merges.txt").read_text() == "merges.txt"
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_what_cannot_be_compared_by_value_is_compared_by_bits(base: Path, tmp_path: Path) -> None:
    odd = {
        **WEIGHTS,
        "thinker.w": torch.full((3, 4), NAN),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
    }
    found = load_file(export_checkpoint(odd, base, tmp_path / "out") / "model.safetensors")
    assert (
        found["thinker.w"].isnan().all()
        and found["scalar"].shape == ()
        and found["empty"].shape == (0, 3)
    )


def test_large_checkpoints_are_sharded_with_an_index(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        avatar_rl.learner.model.export, "SHARD_BYTES", 50
    )  # the first part: b 4, transposed 24; then w 48 bytes and talker 8
    parts = [
        {"thinker.b": WEIGHTS["thinker.b"], "thinker.transposed": WEIGHTS["thinker.transposed"]}
    ]
    parts.append({"thinker.w": WEIGHTS["thinker.w"]})
    out = export_checkpoint(iter(parts), base, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    first, second, third = (f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
    assert index["weight_map"] == {
        "thinker.b": first,
        "thinker.transposed": first,
        "thinker.w": second,
        "talker.w": third,
    }
    assert index["metadata"]["total_size"] == 48 + 4 + 24 + 8
    for name, file in index["weight_map"].items():
        expected = {**WEIGHTS, "talker.w": torch.full((2,), 7.0)}[name]
        assert torch.equal(load_file(out / file)[name], expected)
    assert checkpoint_names(out) == {*WEIGHTS, "talker.w"}


def test_an_earlier_export_is_replaced_as_a_whole(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.json").write_text("old")
    export_checkpoint(WEIGHTS, base, out)
    assert not (out / "stale.json").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"]


def spoilt(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    changed = dict(weights)
    if how == "bit":
        changed["thinker.w"] = changed["thinker.w"].clone()
        changed["thinker.w"][2, 3] += 1
    elif how == "lost":
        del changed["thinker.b"]
    else:
        changed["thinker.b"] = changed["thinker.b"].float()
    return changed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("bit", r"tensor 'thinker\.w' .* reads back different"),
        ("lost", r"1 tensors are missing .* first 'thinker\.b'"),
        ("type", r"tensor 'thinker\.b' .* reads back different"),
    ],
)
def test_a_corrupt_write_is_caught_and_the_earlier_export_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    out = export_checkpoint(WEIGHTS, base, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()

    def bad_disk(tensors: dict[str, Tensor], *arguments: Any, **options: Any) -> None:
        save_file(spoilt(tensors, how), *arguments, **options)

    monkeypatch.setattr(avatar_rl.learner.model.export, "save_file", bad_disk)
    with pytest.raises(ModelError, match=message):
        export_checkpoint({name: value + 1 for name, value in WEIGHTS.items()}, base, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"]


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no"):
        checkpoint_names(tmp_path)
