"""Hugging Face checkpoints out: what vLLM and transformers load, every tensor read back after
writing."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_64_intdigest

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


def export_checkpoint(
    weights: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]], base: Path, out: Path
) -> Path:
    """Write ``weights`` (published names), all at once or part by part, as a checkpoint folder with
    the companions of ``base``, by rename. Whoever loads it with default settings has the policy
    that was trained.

    Tensors of ``base`` that are not among ``weights`` (a talker, say) are copied, so the folder is
    complete. Its config names the dtype of ``weights``, in which loaders hold the model. No more
    than one shard is held at a time. Raises ModelError when a tensor reads back different from what
    was written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.{os.getpid()}-{uuid4().hex[:8]}"
    scratch.mkdir()  # not mkdtemp, which shuts everybody else out of the export
    try:
        _copy_companions(base, scratch)
        shards = _Shards(scratch)
        for part in [weights] if isinstance(weights, Mapping) else weights:
            for name in sorted(part):
                shards.add(name, part[name])
        _write_dtype(scratch / "config.json", shards.floats)
        for file, names in WeightFiles.find(base).by_file().items():
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    if name not in shards.written:
                        shards.add(name, tensors.get_tensor(name))
        shards.finish()
        _verify(shards.written, scratch)
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


def _write_dtype(config: Path, numbers: Counter[torch.dtype]) -> None:
    """State the weights' dtype wherever a config states one: loaders cast to it. ``numbers``: of
    values in each floating type."""
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


class _Print(NamedTuple):
    """What a tensor must be when it is read back."""

    dtype: torch.dtype
    shape: torch.Size
    checksum: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Print:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        return cls(tensor.dtype, tensor.shape, xxh3_64_intdigest(flat.numpy().data))


class _Shards:
    """Writes tensors to files of at most ``SHARD_BYTES``, in the order in which they come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, _Print] = {}
        self.floats = Counter[torch.dtype]()  # values in each type
        self._shard: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # tensors of each file
        self._size = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Part of the current shard from now on; its memory may change afterwards."""
        if self._shard and self._size + tensor.nbytes > SHARD_BYTES:
            self._write()
        # A copy: a file cannot share memory (a tied head), and parameters change.
        self._shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.written[name] = _Print.of(self._shard[name])
        if tensor.is_floating_point():
            self.floats[tensor.dtype] += tensor.numel()
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write the last shard and, where there are several, the index."""
        self._write()
        count = len(self._files)
        if count == 1:
            self._scratch(1).rename(self.folder / "model.safetensors")
            return
        index: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._scratch(number).rename(self.folder / file)
            index |= dict.fromkeys(names, file)
        text = json.dumps({"metadata": {"total_size": self._total}, "weight_map": index}, indent=1)
        (self.folder / "model.safetensors.index.json").write_text(text)

    def _write(self) -> None:
        self._files.append(list(self._shard))
        file = self._scratch(len(self._files))
        save_file(self._shard, file, metadata={"format": "pt"})
        # safetensors makes private files; the folder, made anew, has the modes that the umask
        # gives.
        file.chmod(self.folder.stat().st_mode & 0o666)
        self._shard, self._size = {}, 0

    def _scratch(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


def _verify(written: Mapping[str, _Print], folder: Path) -> None:
    seen = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                seen.add(name)
                if _Print.of(tensors.get_tensor(name)) != written[name]:
                    raise ModelError(
                        f"tensor {name!r} in {file} reads back different from what was written: "
                        "check the disk"
                    )
    missing = set(written) - seen
    if missing:
        raise ModelError(
            f"{len(missing)} tensors are missing from {folder}, first {sorted(missing)[0]!r}: "
            "check the disk"
        )
