"""From trajectories to micro-batches under a token budget, each prompt and its media once per
micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.prompts.encoding.template import FEATURES, EncodedPrompt


@dataclass(frozen=True)
class Row:
    """One completion to score or to train on. ``key`` is equal for completions that share their
    prompt."""

    key: tuple[str, bool]  # prompt id, hinted
    prompt: EncodedPrompt
    token_ids: NDArray[np.int32]  # (T,)
    temperature: float = 1.0


class Size(NamedTuple):
    """What packing needs to know of a row; known before its media are decoded."""

    key: tuple[str, bool]
    prompt_tokens: int
    tokens: int


def pack(sizes: Sequence[Size], budget: int, *, share_prefix: bool) -> list[list[int]]:
    """Split rows into micro-batches of at most ``budget`` padded tokens (a single larger row stands
    alone).

    Cost of a micro-batch = distinct prompts x longest prompt + rows x longest completion. These are
    the tokens that the model really computes. Rows of one prompt stay together, and similar lengths
    meet, so that little is padding. Deterministic: every rank packs the whole step and finds the
    same micro-batches."""
    indices = range(len(sizes))
    if share_prefix:
        order = sorted(indices, key=lambda i: (sizes[i].key, sizes[i].tokens, i))
        runs = [list(run) for _, run in groupby(order, key=lambda i: sizes[i].key)]
    else:
        runs = [[i] for i in indices]
    runs.sort(key=lambda run: (sizes[run[0]].prompt_tokens, sizes[run[-1]].tokens, run[0]))
    batches: list[list[int]] = [[]]
    fill = _Fill()
    for run in runs:
        fill.open_prompt()
        for i in run:
            if batches[-1] and fill.cost_with(sizes[i]) > budget:
                batches.append([])
                fill = _Fill()
                fill.open_prompt()
            batches[-1].append(i)
            fill.add(sizes[i])
    return batches if batches[0] else []


@dataclass
class _Fill:
    """Padded size of the micro-batch being filled."""

    prompts: int = 0
    prompt_tokens: int = 0
    rows: int = 0
    tokens: int = 0
    new_prompt: bool = False

    def open_prompt(self) -> None:
        self.new_prompt = True

    def cost_with(self, size: Size) -> int:
        prompts = (self.prompts + int(self.new_prompt)) * max(
            self.prompt_tokens, size.prompt_tokens
        )
        return prompts + (self.rows + 1) * max(self.tokens, size.tokens)

    def add(self, size: Size) -> None:
        self.prompts += int(self.new_prompt)
        self.new_prompt = False
        self.rows += 1
        self.prompt_tokens = max(self.prompt_tokens, size.prompt_tokens)
        self.tokens = max(self.tokens, size.tokens)


def share_out(
    batches: Sequence[list[int]], sizes: Sequence[Size], world_size: int
) -> list[list[list[int]]]:
    """Micro-batches per rank, heaviest first onto the least loaded. Ranks may differ in count:
    ``TrainEngine.accumulate`` evens that out."""
    load = [0] * world_size
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    weight = [
        sum(sizes[i].tokens for i in batch)
        + sum({sizes[i].key: sizes[i].prompt_tokens for i in batch}.values())
        for batch in batches
    ]
    for index in sorted(range(len(batches)), key=lambda i: (-weight[i], i)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        load[rank] += weight[index]
        shares[rank].append(batches[index])
    return shares


def collate(rows: Sequence[Row], *, share_prefix: bool) -> MicroBatch:
    """One micro-batch of B rows. Completion tokens are left-aligned in (B, T)."""
    keys: dict[tuple[str, bool] | int, int] = {}
    prompts: list[EncodedPrompt] = []
    index = []
    for position, row in enumerate(rows):
        key = row.key if share_prefix else position
        if key not in keys:
            keys[key] = len(prompts)
            prompts.append(row.prompt)
        index.append(keys[key])
    tokens = [torch.from_numpy(np.asarray(row.token_ids, dtype=np.int64)) for row in rows]
    return MicroBatch(
        prompt_ids=_pad([prompt.input_ids for prompt in prompts]),
        prompt_mask=_pad([torch.ones_like(prompt.input_ids) for prompt in prompts]),
        prompt_positions=_pad([prompt.position_ids for prompt in prompts])
        .transpose(0, 1)
        .contiguous(),
        next_positions=torch.tensor([prompt.next_position for prompt in prompts]),
        features=_merge_features(prompts),
        rows=torch.tensor(index),
        token_ids=_pad(tokens),
        mask=_pad([torch.ones(len(row)) for row in tokens]),
        temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
    )


@dataclass(frozen=True)
class Pending:
    """A micro-batch that is collated in its turn: all of a step's at once would hold their media in
    memory twice."""

    rows: Sequence[Row]
    share_prefix: bool

    @property
    def features(self) -> set[str]:
        """Names of the media tensors that the micro-batch will have."""
        return {name for row in self.rows for name in row.prompt.features if name in FEATURES}

    @property
    def tokens(self) -> int:
        """Completion tokens without padding."""
        return sum(len(row.token_ids) for row in self.rows)

    def collate(self) -> MicroBatch:
        return collate(self.rows, share_prefix=self.share_prefix)


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


@dataclass
class MicroBatch:
    """Completions and the distinct prompts they answer."""

    prompt_ids: Tensor  # (U, L) int64
    prompt_mask: Tensor  # (U, L) int64, 1 = token
    prompt_positions: Tensor  # (3, U, L) M-RoPE or (1, U, L) int64
    next_positions: Tensor  # (U,) int64, position of the first completion token
    features: dict[str, Tensor]  # media tensors of the U prompts, concatenated in prompt order
    rows: Tensor  # (B,) int64, which prompt each completion answers
    token_ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) float, 1 = token
    temperature: Tensor  # (B,) float

    def to(self, device: torch.device) -> MicroBatch:
        features = {name: value.to(device) for name, value in self.features.items()}
        tensors = {
            entry.name: getattr(self, entry.name).to(device)
            for entry in fields(self)
            if entry.name != "features"
        }
        return MicroBatch(features=features, **tensors)

    @property
    def tokens(self) -> int:
        """Completion tokens without padding."""
        return int(self.mask.sum())
