"""Adapters as folders in PEFT's layout: written, and merged into the checkpoint they belong to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_rl.common.errors import ConfigError, ModelError
from avatar_rl.common.types import JsonObject
from avatar_rl.common.weight_files import WeightFiles
from avatar_rl.learner.adapter.base import FILE, BaseRecord
from avatar_rl.learner.adapter.targets import choose
from avatar_rl.learner.lora_config import LoraConfig

if TYPE_CHECKING:
    import peft
    from torch import Tensor

#: Folder of the adapter inside an exported checkpoint, which is the merged model.
ADAPTER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: In front of a layer's name in PEFT's files.
PREFIX = "base_model.model."
#: Settings that change what an adapter computes, and are not merged here; with their plain values.
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "target_parameters": None,
}

#: (Prefix in transformers' model, in a published checkpoint), of layers that may have an adapter.
_RENAMES = (("", "thinker."), ("model.language_model.", "model."), ("model.visual.", "visual."))


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def export_adapter(
    tensors: Mapping[str, Tensor], settings: peft.LoraConfig, base: BaseRecord, out: Path
) -> None:
    """Write an adapter that ``PeftModel.from_pretrained(model, out)`` loads, where ``model`` is the
    base as transformers loads it (of an omni model its thinker)."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, out / WEIGHTS, metadata={"format": "pt"})
    content = {name: _plain(value) for name, value in settings.to_dict().items()}
    content |= {"base_model_name_or_path": base.model, "inference_mode": True}
    (out / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (out / FILE).write_bytes(base.content())


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else value


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk: its settings, checked, and where it is."""

    path: Path
    settings: JsonObject

    @classmethod
    def open(cls, path: Path) -> AdapterFolder:
        """Raises ModelError for what is no LoRA adapter, or one of a kind that cannot be merged."""
        try:
            settings = json.loads((path / CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path / CONFIG} cannot be read ({error}): copy it again from its source"
            ) from error
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        if kind != "LORA":
            raise ModelError(f"adapter {path} is of peft_type {kind}: only LORA can be merged here")
        odd = [name for name, usual in _PLAIN.items() if settings.get(name) not in (usual, None)]
        if odd:
            raise ModelError(
                f"adapter {path} has {odd[0]}: {settings[odd[0]]}, which is not merged here: merge "
                "it with PEFT (merge_and_unload, then save_pretrained) and name the result"
            )
        if not (path / WEIGHTS).is_file():
            raise ModelError(f"adapter {path} has no {WEIGHTS}: copy it again from its source")
        return cls(path, settings)

    def base(self, given: Path | None) -> Path:
        """The folder of its base: ``given``, or the one that it names.

        Raises ConfigError where there is none on this machine, and ModelError for one of other
        weights than it was trained on.
        """
        record = BaseRecord.read(self.path)
        named = self.settings.get("base_model_name_or_path")
        folder = given or (Path(str(named)) if named else None)
        if folder is None or not folder.is_dir():
            raise ConfigError(
                f"model.path {self.path} is an adapter, and its base {folder} is no folder here: "
                "set model.base to the checkpoint folder that it was trained on"
            )
        if record is not None:
            replace(BaseRecord.of(folder, None), lora=record.lora).check(record, self.path)
        return folder.resolve()

    def scaling(self, layer: str) -> float:
        """The factor of a layer's product, by PEFT's rules."""
        rank = _pattern(self.settings.get("rank_pattern"), layer, self._number("r"))
        alpha = _pattern(self.settings.get("alpha_pattern"), layer, self._number("lora_alpha"))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _number(self, key: str) -> float:
        value = self.settings.get(key)
        if not isinstance(value, int | float):
            raise ModelError(f"adapter {self.path}: {key} in {CONFIG} is {value}, a number is due")
        return value


def _pattern(patterns: object, layer: str, usual: float) -> float:
    """The value of the first pattern that names ``layer``."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(usual)


def check_targets(folder: Path, config: LoraConfig, key: str) -> None:
    """Whether ``config`` can be trained on the checkpoint in ``folder``. ``Adapter.attach`` has the
    last word, since transformers may name and join layers in another way.

    Raises ConfigError as ``choose`` does, and ModelError as ``WeightFiles.find``.
    """
    chosen_layers(folder, config, key)


def chosen_layers(folder: Path, config: LoraConfig, key: str = "learner.lora") -> list[str]:
    """Published names of the layers that get an adapter, by the headers of the checkpoint: in
    milliseconds, before a process starts. Targets with a dot, which name a place in transformers'
    model, are taken as they are. Raises as ``check_targets`` does."""
    from safetensors import safe_open

    layers: dict[str, tuple[int, int]] = {}
    for file, names in WeightFiles.find(folder).by_file().items():
        with safe_open(file, framework="np") as tensors:
            for name in names:
                shape = tuple(tensors.get_slice(name).get_shape())
                if name.endswith(".weight") and len(shape) == 2:
                    layers[name.removesuffix(".weight")] = shape
    known = tuple(target for target in config.targets if "." not in target)
    placed = [target for target in config.targets if "." in target]
    if not known:
        return placed
    return [*choose(layers, config.model_copy(update={"targets": known}), key=key), *placed]


def merge_adapter(adapter: AdapterFolder, base: Path, out: Path) -> Path:
    """Write the checkpoint ``base`` with ``adapter`` merged into it to ``out``, by rename.

    Raises ModelError for an adapter of another model: a layer that ``base`` lacks, or another
    shape.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    from avatar_rl.learner.adapter.lora import merge
    from avatar_rl.learner.model.export import export_checkpoint

    found = WeightFiles.find(base).tensors
    tensors = load_file(adapter.path / WEIGHTS)
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, side = name.removeprefix(PREFIX).partition(".lora_")
        if side == "B.weight":
            continue
        if side not in ("", "A.weight"):
            raise ModelError(f"adapter {adapter.path} has {name!r}, which is not merged here")
        place = _place(f"{layer}.weight" if side else layer, found, adapter, base)
        with safe_open(found[place], framework="pt") as file:
            weight = file.get_tensor(place)
        if not side:  # a whole tensor, of modules_to_save
            merged[place] = tensor.to(weight.dtype)
        else:
            other = tensors.get(f"{PREFIX}{layer}.lora_B.weight")
            if other is None or (other.shape[0], tensor.shape[1]) != tuple(weight.shape):
                shape = None if other is None else (other.shape[0], tensor.shape[1])
                raise ModelError(
                    f"adapter {adapter.path} is of another base: its layer {layer} makes {shape}, "
                    f"{place} of {base} has shape {tuple(weight.shape)}; set model.base to its own"
                )
            merged[place] = merge(weight, tensor, other, adapter.scaling(layer))
        if merged[place].shape != weight.shape:
            raise ModelError(
                f"adapter {adapter.path} is of another base: {place} has shape "
                f"{tuple(merged[place].shape)}, in {base} {tuple(weight.shape)}"
            )
    if not merged:
        raise ModelError(f"adapter {adapter.path} holds no tensor: copy it again from its source")
    return export_checkpoint(merged, base, out)


def _place(name: str, found: Mapping[str, Path], adapter: AdapterFolder, base: Path) -> str:
    """The tensor of the checkpoint that ``name``, a parameter of transformers' model, is. Raises
    ModelError where there is none."""
    renamed = [new + name.removeprefix(old) for old, new in _RENAMES if name.startswith(old)]
    for candidate in (name, *renamed):
        if candidate in found:
            return candidate
    raise ModelError(
        f"adapter {adapter.path} is of another base: it adapts {name!r}, which {base} does not "
        "hold; set model.base to the checkpoint folder that it was trained on"
    )
