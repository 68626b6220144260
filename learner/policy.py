"""The trainable policy: log-probabilities of completions, each prompt and its media computed once per micro-batch.

Shapes: U distinct prompts, L prompt tokens (right-padded), B completions, T completion tokens (right-padded).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: Tokens whose logits are held at once; a 152k vocabulary in float32 makes that about 1.2 GB.
LOGIT_CHUNK = 2048


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
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            moved[entry.name] = (
                {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)
            )
        return MicroBatch(**moved)


class PolicyOutput(NamedTuple):
    logprobs: (
        Tensor  # (B, T) float32 (float64 of a float64 model), of the tokens at the sampling temperature; 0 where padded
    )
    entropy: Tensor  # (B, T) likewise, of the next-token distribution, no gradient; 0 where padded


class Policy(nn.Module):
    """Wraps a Hugging Face model so that one forward returns the log-probabilities of a micro-batch.

    ``share_prefix`` runs every distinct prompt once and lets its completions attend to the prompt's keys and values,
    gradients included; without it each completion carries its own copy of the prompt (needed with gradient
    checkpointing, which forbids the cache).
    """

    def __init__(self, model: nn.Module, *, share_prefix: bool = True) -> None:
        super().__init__()
        self.model = model
        # The model's own head would compute logits for every prompt token; we apply it to completion tokens only.
        self.lm_head: nn.Module = model.lm_head  # type: ignore[assignment]
        model.lm_head = nn.Identity()
        self.share_prefix = share_prefix

    def forward(self, batch: MicroBatch) -> PolicyOutput:
        hidden = self._shared(batch) if self.share_prefix else self._copied(batch)
        return self._score(hidden, batch)

    def _shared(self, batch: MicroBatch) -> Tensor:
        """Hidden states that predict each completion token, (B, T, H), with one pass over the distinct prompts."""
        prefix = self.model(
            input_ids=batch.prompt_ids,
            attention_mask=batch.prompt_mask,
            position_ids=_positions(batch.prompt_positions),
            use_cache=True,
            **batch.features,
        )
        last = batch.prompt_mask.sum(1) - 1
        first = prefix.logits[torch.arange(len(last), device=last.device), last][batch.rows]  # (B, H)
        length = batch.token_ids.shape[1]
        if length == 1:
            return first[:, None]
        cache = prefix.past_key_values
        cache.batch_select_indices(batch.rows)
        steps = torch.arange(length - 1, device=batch.rows.device)
        positions = batch.next_positions[batch.rows, None] + steps  # (B, T-1)
        mask = torch.cat([batch.prompt_mask[batch.rows], batch.mask[:, :-1].long()], 1)
        rest = self.model(
            input_ids=batch.token_ids[:, :-1],
            attention_mask=mask,
            position_ids=_positions(positions.expand(len(batch.prompt_positions), -1, -1)),
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([first[:, None], rest.logits], 1)

    def _copied(self, batch: MicroBatch) -> Tensor:
        """The same hidden states with prompt and completion in one sequence; one prompt per micro-batch row."""
        if not torch.equal(batch.rows, torch.arange(len(batch.rows), device=batch.rows.device)):
            raise ValueError("without share_prefix a micro-batch must carry one prompt per completion")
        lengths = batch.prompt_mask.sum(1)  # (B,)
        completion = batch.token_ids.shape[1]
        total = int(lengths.max()) + completion
        size = (len(lengths), total)
        ids = batch.prompt_ids.new_zeros(size)
        mask = batch.prompt_mask.new_zeros(size)
        positions = batch.prompt_positions.new_zeros((len(batch.prompt_positions), *size))
        for row, length in enumerate(lengths.tolist()):
            end = length + completion
            ids[row, :length], ids[row, length:end] = batch.prompt_ids[row, :length], batch.token_ids[row]
            mask[row, :length], mask[row, length:end] = 1, batch.mask[row].long()
            positions[:, row, :length] = batch.prompt_positions[:, row, :length]
            positions[:, row, length:end] = batch.next_positions[row] + torch.arange(completion, device=ids.device)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=_positions(positions), use_cache=False, **batch.features
        )
        index = lengths[:, None] - 1 + torch.arange(completion, device=ids.device)  # (B, T)
        return output.logits.gather(1, index[..., None].expand(-1, -1, output.logits.shape[-1]))

    def _score(self, hidden: Tensor, batch: MicroBatch) -> PolicyOutput:
        keep = batch.mask.bool()
        tokens, temperature = batch.token_ids[keep], batch.temperature[:, None].expand_as(batch.mask)[keep]
        flat = hidden[keep]  # (N, H) real tokens only
        pieces = []
        for start in range(0, len(flat), LOGIT_CHUNK):
            part = slice(start, start + LOGIT_CHUNK)
            arguments = (flat[part], tokens[part], temperature[part])
            if len(flat) > LOGIT_CHUNK and torch.is_grad_enabled():
                pieces.append(checkpoint(self._token_scores, *arguments, use_reentrant=False))
            else:
                pieces.append(self._token_scores(*arguments))
        logprobs, entropy = (torch.cat(part) for part in zip(*pieces, strict=True))
        empty = torch.zeros_like(batch.mask, dtype=logprobs.dtype)
        return PolicyOutput(empty.masked_scatter(keep, logprobs), empty.masked_scatter(keep, entropy))

    def _token_scores(self, hidden: Tensor, tokens: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature[:, None]
        logprobs = torch.log_softmax(logits, -1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, tokens[:, None])[:, 0], entropy


def _positions(positions: Tensor) -> Tensor:
    """(3, B, L) for M-RoPE models; (B, L) for text models."""
    return positions if len(positions) > 1 else positions[0]


def freeze(policy: nn.Module, fragments: tuple[str, ...]) -> int:
    """Switch gradients off for parameters whose name holds one of ``fragments``; returns how many still train."""
    trainable = 0
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(not any(fragment in name for fragment in fragments))
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable
