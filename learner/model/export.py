"""Hugging Face checkpoints out: what vLLM and transformers load, every tensor read back after
writing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from avatar_rl.common.errors import ModelError

#: Files of the base folder that are copied as they are: config, tokenizer, processor, chat
#: template, the voices that Qwen2.5-Omni does not load without.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "spk_dict.pt")
SHARD_BYTES = 4 << 30


def export_checkpoint(weights: Mapping[str, Tensor], base: Path, out: Path) -> Path:
    """Write ``weights`` (published names) as a checkpoint folder with the companions of ``base``,
    by rename.

    Tensors of ``base`` that are not among ``weights`` (a talker, say) are copied, so the folder is
    complete. Raises ModelError when a tensor reads back different from what was written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for pattern in COMPANIONS:
            for file in base.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copy2(file, scratch / file.name)
        complete = dict(weights)
        for file in sorted(base.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                complete.update(
                    {
                        name: tensors.get_tensor(name)
                        for name in tensors.keys()  # noqa: SIM118  (not a dict)
                        if name not in complete
                    }
                )
        _write_shards(complete, scratch)
        _verify(complete, scratch)
        if out.exists():
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            out.rename(old)
            scratch.rename(out)
            shutil.rmtree(old)
        else:
            scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return out


def _write_shards(weights: Mapping[str, Tensor], folder: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(weights.items()):
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in weights.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


def _verify(weights: Mapping[str, Tensor], folder: Path) -> None:
    seen = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                seen.add(name)
                if not _same_bits(tensors.get_tensor(name), weights[name]):
                    raise ModelError(
                        f"tensor {name!r} in {file} reads back different from what was written: "
                        "check the disk"
                    )
    missing = set(weights) - seen
    if missing:
        raise ModelError(
            f"{len(missing)} tensors are missing from {folder}, first {sorted(missing)[0]!r}: "
            "check the disk"
        )


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Stricter than torch.equal, which lets another dtype pass; and a NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    )
