"""The towers of a checkpoint alone: vision and audio encoders with their projectors, frozen.

They are loaded without the language model, so that a worker process stays small. The code that runs
them is the model's own (``get_image_features`` and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.model.kinds import DTYPES, class_name
from avatar_rl.prompts.embeddings.names import TOWERS, tower_tensors
from avatar_rl.prompts.record import Modality

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Towers:
    """Runs a checkpoint's frozen towers on one medium at a time.

    Raises ModelError where the checkpoint lacks one of their tensors.
    """

    def __init__(self, folder: Path, *, dtype: str, device: torch.device) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, class_name(config.model_type))
        make = getattr(kind, "_from_config", None) or kind.from_config  # of an Auto class
        with torch.device("meta"):
            self._shell: Any = make(getattr(config, "thinker_config", config))
        places = [
            name for name, _ in self._shell.named_modules() if name.rpartition(".")[2] in TOWERS
        ]
        tensors = dict(tower_tensors(folder))
        for place in places:
            parent, _, word = place.rpartition(".")
            owner = self._shell.get_submodule(parent)
            tower = _filled(owner.get_submodule(word), word, tensors, folder, DTYPES[dtype])
            setattr(owner, word, tower.eval().requires_grad_(False).to(device))
        self.device = device

    @property
    def shell(self) -> nn.Module:
        """The model with its towers; all else is on the meta device."""
        shell: nn.Module = self._shell
        return shell

    @torch.no_grad()
    def embed(self, kind: Modality, features: Mapping[str, Tensor]) -> Tensor:
        """Embeddings of one medium, (N, 1 + D, H): N placeholder tokens, D deepstack layers (0 but
        for Qwen3), H the language model's width. ``features`` are the processor's, of this medium
        alone."""
        given = {name: tensor.to(self.device) for name, tensor in features.items()}
        if kind == "audio":
            found = self._shell.get_audio_features(**given, return_dict=True).last_hidden_state
            return found[:, None].cpu()
        run = self._shell.get_image_features if kind == "image" else self._shell.get_video_features
        output = run(**given, return_dict=True)
        layers = [torch.cat(list(output.pooler_output))]
        for layer in getattr(output, "deepstack_features", None) or ():
            layers.append(torch.cat(list(layer)) if isinstance(layer, list | tuple) else layer)
        return torch.stack(layers, 1).cpu()


def _filled(
    blank: nn.Module, word: str, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype
) -> nn.Module:
    """The tower ``blank`` (on the meta device) with the checkpoint's weights."""
    from transformers.initialization import no_init_weights

    config = cast("PretrainedConfig", blank.config)
    # Made for real: buffers that no checkpoint holds (rotary frequencies) are computed.
    with no_init_weights():
        tower = cast("type[PreTrainedModel]", type(blank))._from_config(config, dtype=dtype)
    state = {
        name.partition(".")[2]: tensor.to(dtype)
        for name, tensor in tensors.items()
        if name.startswith(f"{word}.")
    }
    missing, unknown = tower.load_state_dict(state, strict=False)
    if missing or unknown:
        raise ModelError(
            f"model folder {folder}: its {word} lacks {missing[:3]} and has {unknown[:3]} besides: "
            "copy the checkpoint again, or set learner.embeddings.mode to off"
        )
    return tower
