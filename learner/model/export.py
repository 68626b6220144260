"""Hugging Face checkpoints out: what vLLM and transformers load, every tensor read back after
writing."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from avatar_rl.common.errors import ModelError
from avatar_rl.common.types import JsonObject
from avatar_rl.common.weight_files import WeightFiles

#: Files of the base folder that come along: config, tokenizer, processor, chat templates, licence,
#: the voices that Qwen2.5-Omni does not load without.
COMPANIONS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "spk_dict.pt",
)
#: JSON files that describe another run or another set of weights.
FOREIGN = (
    "*.index.json",
    "adapter_config.json",
    "trainer_state.json",
    "params.json",
    "made.json",
)
SHARD_BYTES = 4 << 30


def export_checkpoint(weights: Mapping[str, Tensor], base: Path, out: Path) -> Path:
    """Write ``weights`` (published names) as a checkpoint folder with the companions of ``base``,
    by rename. Whoever loads it with default settings has the policy that was trained.

    Tensors of ``base`` that are not among ``weights`` (a talker, say) are copied, so the folder is
    complete. Its config names the dtype of ``weights``, in which loaders hold the model. Raises
    ModelError when a tensor reads back different from what was written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.{os.getpid()}-{uuid4().hex[:8]}"
    scratch.mkdir()  # not mkdtemp, which shuts everybody else out of the export
    try:
        _copy_companions(base, scratch)
        _write_dtype(scratch / "config.json", weights)
        complete = dict(weights)
        for file, names in WeightFiles.find(base).by_file().items():
            with safe_open(file, framework="pt") as tensors:
                complete.update(
                    {name: tensors.get_tensor(name) for name in names if name not in complete}
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


def _copy_companions(base: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for file in base.glob(pattern):
            if file.is_file() and not any(file.match(foreign) for foreign in FOREIGN):
                place = folder / file.relative_to(base)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)  # contents only: the base may be private, read-only


def _write_dtype(config: Path, weights: Mapping[str, Tensor]) -> None:
    """State the weights' dtype wherever a config states one: loaders cast to it."""
    numbers = Counter[torch.dtype]()
    for tensor in weights.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    if not numbers or not config.is_file():
        return
    [(most, _)] = numbers.most_common(1)
    dtype = str(most).removeprefix("torch.")
    content = json.loads(config.read_text())
    keys = ("dtype", "torch_dtype")

    def restate(section: JsonObject) -> None:
        for key, value in section.items():
            if key in keys:
                section[key] = dtype
            elif isinstance(value, dict):
                restate(value)

    restate(content)
    if not any(key in content for key in keys):
        content["dtype"] = dtype
    config.write_text(json.dumps(content, indent=2) + "\n")


def _write_shards(weights: Mapping[str, Tensor], folder: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(weights.items()):
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        # A head tied to the embeddings shares their memory, which a file cannot.
        shared = any(tensor.data_ptr() == other.data_ptr() for other in shards[-1].values())
        shards[-1][name] = tensor.clone() if shared and tensor.nbytes else tensor.contiguous()
        size += tensor.nbytes
    # safetensors makes private files; the folder, made anew, has the modes that the umask gives.
    mode = folder.stat().st_mode & 0o666
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(mode)
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
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
