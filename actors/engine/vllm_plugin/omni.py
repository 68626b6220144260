"""Omni models with sound and video, as transformers computes them (docs/dependencies.md).

Stock vLLM 0.32 places interleaved sound otherwise. For Qwen2.5-Omni it gives the audio_bos token no
position of its own and does not let the bos and eos pairs share theirs (log-probs off by up to
0.12). For Qwen3-Omni it cuts the times of video tokens to whole numbers before it adds their start
and orders them, and starts the eos behind all positions instead of behind the last piece (off by up
to 0.6). Where a prefill window ends between an audio chunk and the next video chunk, both scatter
video embeddings into audio slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avatar_rl.prompts.encoding.rope import PositionRule

if TYPE_CHECKING:
    from types import ModuleType

    from transformers import PretrainedConfig
    from vllm.model_executor.models.qwen2_5_omni_thinker import (
        Qwen2_5OmniThinkerForConditionalGeneration,
    )
    from vllm.multimodal.inputs import MultiModalFeatureSpec

_INSTALLED = "_avatar_rl"


def install() -> None:
    """Correct the thinker classes and their embedding merges in place."""
    from vllm.model_executor.models import qwen2_5_omni_thinker, qwen3_omni_moe_thinker

    # Each module has the merge under a name of its own.
    _correct(qwen2_5_omni_thinker, "Qwen2_5OmniThinkerForConditionalGeneration", "qwen2_5_omni")
    _correct(
        qwen3_omni_moe_thinker, "Qwen3OmniMoeThinkerForConditionalGeneration", "qwen3_omni_moe"
    )


def _correct(module: ModuleType, name: str, kind: str) -> None:
    thinker: Any = getattr(module, name)  # its methods change here
    if hasattr(thinker, _INSTALLED):
        return
    stock = thinker.get_mrope_input_positions

    def get_mrope_input_positions(
        self: Qwen2_5OmniThinkerForConditionalGeneration,
        input_tokens: list[int],
        mm_features: list[MultiModalFeatureSpec],
    ) -> tuple[Tensor, int]:
        interleaved = any(_flag(feature, "use_audio_in_video") for feature in mm_features)
        # Qwen3-Omni's times are cut differently with a video alone, too.
        videos = kind == "qwen3_omni_moe" and any(f.modality == "video" for f in mm_features)
        if interleaved or videos:
            return positions(self.config, kind, input_tokens, mm_features, interleaved=interleaved)
        return stock(self, input_tokens, mm_features)

    def check_interleaved_audio_video(
        is_video: Tensor, is_audio: Tensor, num_video: int, num_audio: int
    ) -> bool:
        # The interleaved merge scatters per modality, which is right for every layout that holds
        # both.
        return num_video > 0 and num_audio > 0

    thinker.get_mrope_input_positions = get_mrope_input_positions
    module.check_interleaved_audio_video = check_interleaved_audio_video  # type: ignore[attr-defined]
    setattr(thinker, _INSTALLED, True)


def positions(
    config: PretrainedConfig,
    kind: str,
    input_tokens: Sequence[int],
    mm_features: Sequence[MultiModalFeatureSpec],
    *,
    interleaved: bool,
) -> tuple[Tensor, int]:
    """Positions (3, L) of a prompt of L tokens, and an offset: token t of the completion is at
    position L + t + offset. This is vLLM's contract."""
    ordered = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
    names = {
        "image_grid_thw": ("image", "image_grid_thw"),
        "video_grid_thw": ("video", "video_grid_thw"),
        # The rule reads audio lengths off a mask's row sums; the lengths themselves, as one column,
        # sum to the same.
        "feature_attention_mask": ("audio", "audio_feature_lengths"),
        "seconds": ("video", "second_per_grid_ts"),
    }
    found: dict[str, Tensor] = {}
    for name, (modality, key) in names.items():
        fields = [
            feature.data.get(key)
            for feature in ordered
            if feature.modality == modality and feature.data is not None
        ]
        values = [
            field.data.reshape(1, -1)
            for field in fields
            if field is not None and isinstance(field.data, Tensor)
        ]
        if values:
            found[name] = torch.cat(values)
    seconds = found.pop("seconds", None)
    placed = PositionRule(config, kind)(
        torch.tensor(list(input_tokens)),
        found,
        seconds_per_grid=None if seconds is None else seconds.reshape(-1).float(),
        audio_in_video=interleaved,
    )
    return placed.ids, placed.next - len(input_tokens)


def _flag(feature: MultiModalFeatureSpec, key: str) -> bool:
    field = feature.data.get(key) if feature.modality == "video" and feature.data else None
    return field is not None and bool(field.data)
