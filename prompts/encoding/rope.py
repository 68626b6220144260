"""M-RoPE positions of a prompt from its token ids and media grids; needs the model's config, never
its weights.

The engine and the learner must place every token alike, so the learner's forward always gets these
positions. Omni models use transformers' own ``get_rope_index``. The vision-language families use
the rule they were trained with, which vLLM keeps: whatever follows a medium starts at the highest
position so far + 1. (transformers 5 counts only height and width there, which for Qwen2.5-VL
differs from vLLM once a video is longer in time than in space.)"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from avatar_rl.common.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OMNI = {
    "qwen2_5_omni": (
        "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni",
        "Qwen2_5OmniPreTrainedModelForConditionalGeneration",
    ),
    "qwen3_omni_moe": (
        "transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe",
        "Qwen3OmniMoePreTrainedModelForConditionalGeneration",
    ),
}
#: Whether a video is one block in time (True) or a block per frame behind a written timestamp
#: (False).
VISION_LANGUAGE = {"qwen2_5_vl": True, "qwen3_vl": False, "qwen3_vl_moe": False}
MULTIMODAL = OMNI.keys() | VISION_LANGUAGE.keys()


class Positions(NamedTuple):
    ids: Tensor  # (3, L) int64, or (1, L) for a text model
    next: int  # position of the first completion token


class PositionRule:
    """Positions for one model.

    ``config`` is its transformers config: the top one, or an omni checkpoint's thinker config
    together with ``kind``, the model_type of the top one."""

    def __init__(self, config: PretrainedConfig, kind: str | None = None) -> None:
        self.kind: str = kind or config.model_type
        self.config = getattr(config, "thinker_config", config)
        self._omni = _omni_namespace(self.kind, self.config) if self.kind in OMNI else None

    def __call__(
        self,
        input_ids: Tensor,
        features: Mapping[str, Tensor],
        *,
        seconds_per_grid: Tensor | None = None,
        audio_in_video: bool = False,
    ) -> Positions:
        """Positions of ``input_ids`` (L,) whose media have the grids and masks in ``features``.

        ``seconds_per_grid`` (videos,) float: seconds between two temporal grid steps. Raises
        DataError when placeholders and grids disagree."""
        length = len(input_ids)
        grids = features.keys() & {"image_grid_thw", "video_grid_thw"}
        if not grids:  # text, or audio alone, which counts like text
            axes = 3 if self.kind in MULTIMODAL else 1
            return Positions(torch.arange(length).expand(axes, -1).clone(), length)
        if self._omni is not None:
            ids = self._omni_positions(input_ids, features, seconds_per_grid, audio_in_video)
        elif self.kind in VISION_LANGUAGE:
            ids = self._vision_positions(input_ids, features, seconds_per_grid)
        else:
            raise ModelError(
                f"model type {self.kind!r} takes no images or videos; supported: "
                f"{sorted(MULTIMODAL)}"
            )
        if ids.shape[-1] != length:
            raise DataError(
                f"{length} prompt tokens but {ids.shape[-1]} positions: placeholders and media "
                "disagree"
            )
        # The completion continues after the last prompt token, as in a forward over the whole
        # sequence: an interleaved audio track that ends early leaves higher positions behind it.
        return Positions(ids, int(ids[:, -1].max()) + 1)

    def _omni_positions(
        self,
        input_ids: Tensor,
        features: Mapping[str, Tensor],
        seconds: Tensor | None,
        audio_in_video: bool,
    ) -> Tensor:
        mask = features.get("feature_attention_mask")
        rope_class, namespace = self._omni  # type: ignore[misc]
        positions, _ = rope_class.get_rope_index(
            namespace,
            input_ids[None],
            features.get("image_grid_thw"),
            features.get("video_grid_thw"),
            torch.ones_like(input_ids)[None],
            audio_in_video,
            None if mask is None else mask.sum(-1),
            seconds,
        )
        return positions[:, 0].long()

    def _vision_positions(
        self, input_ids: Tensor, features: Mapping[str, Tensor], seconds: Tensor | None
    ) -> Tensor:
        whole = VISION_LANGUAGE[self.kind]
        merge = self.config.vision_config.spatial_merge_size
        images = iter(features.get("image_grid_thw", torch.empty(0, 3)).tolist())
        videos = iter(_video_blocks(features.get("video_grid_thw"), seconds, whole))
        kinds = torch.zeros_like(input_ids)
        kinds[input_ids == self.config.image_token_id] = 1
        kinds[input_ids == self.config.video_token_id] = 2
        pieces: list[Tensor] = []
        start = 0
        for kind, run in groupby(kinds.tolist()):
            count = sum(1 for _ in run)
            while (
                count > 0
            ):  # two media may touch where a chat template puts no marker between them
                if kind == 0:
                    piece, taken = torch.arange(count).expand(3, -1), count
                else:
                    (frames, height, width), step = (
                        (next(images), 0.0) if kind == 1 else next(videos)
                    )
                    rate = getattr(self.config.vision_config, "tokens_per_second", 1) * step
                    piece = _grid(int(frames), int(height) // merge, int(width) // merge, rate)
                    taken = piece.shape[1]
                pieces.append(piece + start)
                start = int(pieces[-1].max()) + 1
                count -= taken
        return torch.cat(pieces, 1)


def _video_blocks(
    grids: Tensor | None, seconds: Tensor | None, whole: bool
) -> list[tuple[list[int], float]]:
    """(grid, seconds per temporal step) of every run of video tokens."""
    if grids is None:
        return []
    steps = [1.0] * len(grids) if seconds is None else seconds.tolist()
    if whole:
        return list(zip(grids.tolist(), steps, strict=True))
    return [([1, h, w], 0.0) for t, h, w in grids.tolist() for _ in range(int(t))]


def _grid(frames: int, height: int, width: int, rate: float) -> Tensor:
    """(3, frames*height*width) temporal, height and width index of every token of a medium, from
    0."""
    axes = torch.meshgrid(
        (torch.arange(frames) * rate).long(),
        torch.arange(height),
        torch.arange(width),
        indexing="ij",
    )
    return torch.stack([axis.reshape(-1) for axis in axes])


def _omni_namespace(kind: str, config: PretrainedConfig) -> tuple[Any, SimpleNamespace]:
    """transformers' position code on a light stand-in for the model it is a method of."""
    from importlib import import_module

    module, name = OMNI[kind]
    rope_class = getattr(import_module(module), name)
    names = (
        "image_token_id",
        "video_token_id",
        "audio_token_id",
        "vision_start_token_id",
        "audio_start_token_id",
        "position_id_per_seconds",
        "seconds_per_chunk",
        "audio_config",  # Qwen3-Omni counts a sound's tokens by its windows
    )
    # Published configs spell them *_token_index; transformers maps the names, Qwen3-Omni has no
    # seconds_per_chunk.
    fields = SimpleNamespace(**{name: getattr(config, name, None) for name in names})
    namespace = SimpleNamespace(
        spatial_merge_size=config.vision_config.spatial_merge_size, config=fields
    )
    for method in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        setattr(namespace, method, getattr(rope_class, method).__get__(namespace))
    return rope_class, namespace
