"""One pack of prompts and completions as the model takes it: a single sequence in which each prompt
stands once, followed by its completions.

Shapes: N positions of the pack, B completions, T tokens of the longest one. The state that predicts
a completion's first token is its prompt's last, so the last token of a completion needs no position
and has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.common.errors import ModelError
from avatar_rl.prompts.encoding.embeddings import MediaEmbeddings
from avatar_rl.prompts.encoding.template import FEATURES, EncodedPrompt

#: The feature that runs an encoder, and what the encoder makes embeddings of.
ENCODERS = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio"}


@dataclass(frozen=True)
class Row:
    """One completion to score or to train on. ``key`` is equal for completions that share their
    prompt."""

    key: tuple[str, bool]  # prompt id, hinted
    prompt: EncodedPrompt
    token_ids: NDArray[np.int32]  # (T,)
    temperature: float = 1.0
    media: MediaEmbeddings | None = None  # takes the place of the prompt's media tensors
    #: (T - 1, layers, k), the experts that the tokens but the last shall take; None: their own.
    experts: NDArray[np.uint8] | NDArray[np.uint16] | None = None


class Tree(NamedTuple):
    """A prompt and its completions in a pack, one behind the other from position ``start``."""

    start: int
    prompt: int  # tokens
    completions: tuple[int, ...]  # positions of each: its tokens but the last


@dataclass
class MicroBatch:
    """A pack of distinct prompts and the completions that answer them."""

    input_ids: Tensor  # (N,) int64
    positions: Tensor  # (3, N) M-RoPE or (1, N) int64
    trees: tuple[Tree, ...]  # who may look at whom
    features: dict[str, Tensor]  # media tensors of the prompts without embeddings, in their order
    encoded: Tensor  # (N,) bool, the positions of those prompts
    media: MediaEmbeddings | None  # of the other prompts
    predicts: Tensor  # (B, T) int64, position whose state predicts the token; 0 where padded
    token_ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) float, 1 = token
    temperature: Tensor  # (B,) float
    #: (N, layers, k) int32, the experts that the positions shall take, -1 for their own; None: all
    #: their own.
    experts: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
            trees=self.trees,
            features={name: value.to(device) for name, value in self.features.items()},
            encoded=self.encoded.to(device),
            media=None if self.media is None else self.media.to(device),
            predicts=self.predicts.to(device),
            token_ids=self.token_ids.to(device),
            mask=self.mask.to(device),
            temperature=self.temperature.to(device),
            experts=None if self.experts is None else self.experts.to(device),
        )

    @property
    def tokens(self) -> int:
        """Completion tokens without padding."""
        return int(self.mask.sum())

    @property
    def encoders(self) -> set[str]:
        """Kinds of media that the model's encoders have to run for."""
        return {kind for name, kind in ENCODERS.items() if name in self.features}


@dataclass(frozen=True)
class Pending:
    """A micro-batch that is collated in its turn: all of a step's at once would hold their media in
    memory twice."""

    rows: Sequence[Row]

    @property
    def encoders(self) -> set[str]:
        """``MicroBatch.encoders`` of the micro-batch."""
        found = {name for row in self.rows if row.media is None for name in row.prompt.features}
        return {kind for name, kind in ENCODERS.items() if name in found}

    @property
    def tokens(self) -> int:
        """Completion tokens without padding."""
        return sum(len(row.token_ids) for row in self.rows)

    def collate(self) -> MicroBatch:
        return collate(self.rows)


def collate(rows: Sequence[Row]) -> MicroBatch:
    """The pack of B completions, in whatever order they come. Those with equal keys share one
    prompt; what is known of each token is left-aligned in (B, T)."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.key, []).append(number)
    tokens = [torch.from_numpy(np.asarray(row.token_ids, dtype=np.int64)) for row in rows]
    predicts: list[Tensor] = [torch.empty(0)] * len(rows)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    trees: list[Tree] = []
    places: list[int] = [0] * len(rows)
    start = 0
    for members in groups.values():
        prompt = rows[members[0]].prompt
        length = len(prompt.input_ids)
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        place = start + length
        for number in members:
            count = len(tokens[number]) - 1
            own = torch.arange(count)
            ids.append(tokens[number][:-1])
            positions.append((prompt.next_position + own).expand(len(prompt.position_ids), -1))
            predicts[number] = torch.cat([torch.tensor([start + length - 1]), place + own])
            places[number] = place
            place += count
        trees.append(Tree(start, length, tuple(len(tokens[number]) - 1 for number in members)))
        start = place
    firsts = [rows[members[0]] for members in groups.values()]
    known = [
        row.media.moved(tree.start)
        for row, tree in zip(firsts, trees, strict=True)
        if row.media is not None
    ]
    encoded = torch.zeros(start, dtype=torch.bool)
    for row, tree in zip(firsts, trees, strict=True):
        encoded[tree.start : tree.start + tree.prompt] = row.media is None
    return MicroBatch(
        input_ids=torch.cat(ids),
        positions=torch.cat(positions, 1),
        trees=tuple(trees),
        features=_merge_features([row.prompt for row in firsts if row.media is None]),
        encoded=encoded,
        media=MediaEmbeddings.merged(known),
        predicts=_pad(predicts),
        token_ids=_pad(tokens),
        mask=_pad([torch.ones(len(row)) for row in tokens]),
        temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
        experts=_experts(rows, places, start),
    )


def _experts(rows: Sequence[Row], places: Sequence[int], size: int) -> Tensor | None:
    """``MicroBatch.experts`` of rows whose tokens begin at ``places`` of a pack of ``size``. Raises
    ModelError for rows of different models."""
    kinds = {row.experts.shape[1:] for row in rows if row.experts is not None}
    if not kinds:
        return None
    if len(kinds) > 1:
        raise ModelError(
            f"completions with experts of {sorted(kinds)} (layers, each) in one pack: they are of "
            "different models; start from an empty buffer"
        )
    [kind] = kinds
    found = torch.full((size, *kind), -1, dtype=torch.int32)
    for row, place in zip(rows, places, strict=True):
        if row.experts is not None:
            given = torch.from_numpy(row.experts.astype(np.int32))
            found[place : place + len(given)] = given
    return found


def padded(values: Sequence[NDArray[np.float32]]) -> Tensor:
    """(B, T) float tensor of per-token values, left-aligned, 0 where padded."""
    return _pad([torch.from_numpy(np.array(value, dtype=np.float32)) for value in values])


def _pad(tensors: Sequence[Tensor]) -> Tensor:
    """Stack along a new first axis, zero-padding the last one on the right."""
    width = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors])


def _merge_features(prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for name in FEATURES:
        parts = [prompt.features[name] for prompt in prompts if name in prompt.features]
        if not parts:
            continue
        # (audios, [mel,] frames): widths may differ
        if name in ("input_features", "feature_attention_mask"):
            width = max(part.shape[-1] for part in parts)
            parts = [F.pad(part, (0, width - part.shape[-1])) for part in parts]
        merged[name] = torch.cat(parts)
    return merged
