"""What a model's encoders make of media, put where the placeholders of the prompts stand in a pack.

An encoder runs as a module of its own, so ranks that gather its weights (ZeRO 3) or sum its
gradients (ZeRO 1 to 3) can all run it: a rank without such media runs it on a blank one whose
result counts nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import ENCODERS, MicroBatch
from avatar_rl.prompts.encoding.embeddings import MediaEmbeddings

#: Sound frames of a blank sound; the encoders shorten them eightfold at most.
BLANK_FRAMES = 16
#: The part of a model (a word of its parameters' names) that a kind of media runs.
TOWERS = {"image": "visual", "video": "visual", "audio": "audio_tower"}
_FEATURE = {kind: feature for feature, kind in ENCODERS.items()}


class Encoded(NamedTuple):
    """Embeddings (M, H) of all media of one kind, and their deepstack features (D, M, H)."""

    values: Tensor
    deepstack: Tensor | None


def text_model(model: nn.Module) -> nn.Module | None:
    """The language model inside a model with encoders; None where it has none."""
    if not callable(getattr(model, "get_image_features", None)):
        return None
    inner: Any = model.model
    return getattr(inner, "language_model", inner)


def embed(
    model: nn.Module, batch: MicroBatch, encoders: Iterable[str], span: slice | None = None
) -> tuple[Tensor, MediaEmbeddings | None]:
    """(1, N, H) what the language model reads, media included, and the media themselves.

    ``encoders`` are the kinds of media whose encoder runs in any case. With ``span`` both are of
    these positions of the pack, and places count from its first. Raises ModelError where media and
    placeholders disagree.
    """
    span = slice(0, len(batch.input_ids)) if span is None else span
    words = model.get_input_embeddings()(batch.input_ids[None, span])  # type: ignore[operator]
    parts = [batch.media] if batch.media is not None else []
    for kind in (kind for kind in _FEATURE if kind in batch.encoders | set(encoders)):
        if kind in batch.encoders:
            encoded = _encode(model, kind, batch.features)
            parts.append(_placed(model, kind, encoded, batch))
        else:
            blank = _encode(model, kind, _blank(model, kind, words.device))
            for value in (v for v in blank if v is not None and v.requires_grad):
                words = words + 0.0 * value.sum()
    media = MediaEmbeddings.merged(parts)
    if media is not None:
        if words.shape[1] < len(batch.input_ids):
            # An encoder that trains stays in the graph also where all its media are elsewhere.
            media = media.within(span).moved(-span.start)
        values = media.values.to(words.device, words.dtype)
        words = words.index_copy(1, media.places.to(words.device), values[None])
    return words, media


def deepstack_inputs(media: MediaEmbeddings | None, positions: int) -> dict[str, Any]:
    """What Qwen3's language model takes besides: where visual tokens are (1, N) and, layer by
    layer, what is added there."""
    if media is None or media.deepstack is None or media.visual_places is None:
        return {}
    order = media.visual_places.argsort()
    mask = torch.zeros(1, positions, dtype=torch.bool, device=media.visual_places.device)
    mask[0, media.visual_places] = True
    return {
        "visual_pos_masks": mask,
        "deepstack_visual_embeds": list(media.deepstack[:, order]),
    }


def _placed(model: Any, kind: str, encoded: Encoded, batch: MicroBatch) -> MediaEmbeddings:
    """Embeddings of one kind at the placeholders of the prompts whose media were encoded. A
    completion that happens to sample a placeholder keeps its ordinary embedding."""
    token = getattr(model.config, f"{kind}_token_id")
    places = torch.nonzero((batch.input_ids == token) & batch.encoded)[:, 0]
    if len(places) != len(encoded.values):
        raise ModelError(
            f"a pack has {len(places)} {kind} placeholders, but its media fill "
            f"{len(encoded.values)}: the processor and the model of this folder do not belong "
            "together"
        )
    visual = None if encoded.deepstack is None else places
    return MediaEmbeddings(places, encoded.values, visual, encoded.deepstack)


def _encode(model: Any, kind: str, features: dict[str, Tensor]) -> Encoded:
    """Run the encoder of one kind of media; without a graph where it is frozen."""
    tower = _tower(model, kind)
    trained = any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        if kind == "audio":
            output = model.get_audio_features(
                features["input_features"].to(tower.dtype), features["feature_attention_mask"]
            )
            return Encoded(output.last_hidden_state, None)
        encode = model.get_image_features if kind == "image" else model.get_video_features
        output = encode(features[_FEATURE[kind]], features[f"{kind}_grid_thw"])
        deepstack = getattr(output, "deepstack_features", None)
        return Encoded(
            torch.cat(tuple(output.pooler_output)),
            torch.stack([torch.cat(tuple(layer)) for layer in deepstack]) if deepstack else None,
        )


def _tower(model: Any, kind: str) -> Any:
    name = TOWERS[kind]
    return getattr(model, name) if hasattr(model, name) else getattr(model.model, name)


def _blank(model: Any, kind: str, device: torch.device) -> dict[str, Tensor]:
    """The smallest input of an encoder."""
    config = _tower(model, kind).config
    if kind == "audio":
        return {
            "input_features": torch.zeros(1, config.num_mel_bins, BLANK_FRAMES, device=device),
            "feature_attention_mask": torch.ones(1, BLANK_FRAMES, dtype=torch.long, device=device),
        }
    side = config.spatial_merge_size
    channels = getattr(config, "in_channels", None) or config.in_chans
    width = channels * config.temporal_patch_size * config.patch_size**2
    return {
        _FEATURE[kind]: torch.zeros(side * side, width, device=device),
        f"{kind}_grid_thw": torch.tensor([[1, side, side]], device=device),
    }
