"""The trainable policy: log-probabilities of completions, each prompt and its media computed once
per micro-batch.

Shapes: U distinct prompts, L prompt tokens (right-padded), B completions, T completion tokens
(right-padded)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import MicroBatch

if TYPE_CHECKING:
    from transformers import DynamicCache

#: Tokens whose logits are held at once; a 152k vocabulary in float32 makes that about 1.2 GB.
LOGIT_CHUNK = 2048
#: Padded positions that one more run of the model must save.
RUN_GAIN = 256


class PolicyOutput(NamedTuple):
    # (B, T) float32 (float64 of a float64 model), of the tokens at the sampling temperature; 0
    # where padded
    logprobs: Tensor
    entropy: Tensor  # (B, T) likewise, of the next-token distribution, no gradient; 0 where padded


class Policy(nn.Module):
    """Wraps a Hugging Face model so that one forward returns the log-probabilities of a
    micro-batch.

    ``share_prefix`` runs every distinct prompt once and lets its completions attend to the prompt's
    keys and values, gradients included; without it each completion carries its own copy of the
    prompt (needed with gradient checkpointing, which forbids the cache)."""

    def __init__(self, model: nn.Module, *, share_prefix: bool = True) -> None:
        super().__init__()
        self.model = model
        # The model's own head would compute logits for every prompt token; we apply it to
        # completion tokens only.
        if not isinstance(getattr(model, "lm_head", None), nn.Module):
            raise ModelError(
                f"model class {type(model).__name__} has no lm_head: use a language model that "
                "transformers loads with one"
            )
        self.lm_head: nn.Module = model.lm_head  # type: ignore[assignment]
        model.lm_head = nn.Identity()
        # Nor may the model bend hidden states that it takes for logits (Gemma 2 and later). A
        # factor on the logits (Granite, Cohere) does commute with the head.
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        if self.softcap is not None:
            config.final_logit_softcapping = None
        self.share_prefix = share_prefix
        #: Every micro-batch runs the model equally often. ZeRO 3 needs it: ranks gather weights in
        #: each run, together.
        self.uniform = False

    def release(self) -> None:
        """Give the model back as it was; the policy is of no use afterwards."""
        self.model.lm_head = self.lm_head
        if self.softcap is not None:
            config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
            config.final_logit_softcapping = self.softcap

    def forward(self, batch: MicroBatch, chunks: int | None = None) -> PolicyOutput:
        """Scores of a micro-batch; the head runs ``chunks`` times, by default as often as its
        tokens need."""
        hidden = self._shared(batch) if self.share_prefix else self._copied(batch)
        return self._score(hidden, batch, logit_chunks(batch.tokens) if chunks is None else chunks)

    def _shared(self, batch: MicroBatch) -> Tensor:
        """Hidden states that predict each completion token, (B, T, H), with one pass over the
        distinct prompts."""
        # A window or a state that is carried on must end with the prompt, not with padding.
        batch = _padded_left(batch)
        prefix = self.model(
            input_ids=batch.prompt_ids,
            attention_mask=batch.prompt_mask,
            position_ids=_positions(batch.prompt_positions),
            use_cache=True,
            **batch.features,
        )
        first = prefix.logits[batch.rows, -1]  # (B, H)
        lengths = batch.mask.sum(1).long().tolist()
        passes = [list(range(len(lengths)))] if self.uniform else length_runs(lengths)
        width = batch.token_ids.shape[1]
        pieces = []
        for run in passes:
            tokens = max(lengths[i] for i in run) if not self.uniform else width
            hidden = self._continue(batch, run, tokens, prefix.past_key_values, first)
            pieces.append(F.pad(hidden, (0, 0, 0, width - tokens)))
        order = torch.tensor([i for run in passes for i in run], device=first.device)
        return torch.cat(pieces)[order.argsort()]

    def _continue(
        self, batch: MicroBatch, run: list[int], tokens: int, prefix: DynamicCache, first: Tensor
    ) -> Tensor:
        """Hidden states (len(run), tokens, H) of some of the completions, on the keys and values of
        their prompts."""
        if tokens == 1 and not self.uniform:
            return first[run, None]
        index = torch.tensor(run, device=first.device)
        rows, steps = batch.rows[index], torch.arange(max(1, tokens - 1), device=first.device)
        cache = copy(prefix)
        # A copy of each layer: selecting replaces the layer's tensors.
        cache.layers = [copy(layer) for layer in prefix.layers]
        cache.batch_select_indices(rows)
        positions = batch.next_positions[rows, None] + steps
        rest = self.model(
            input_ids=batch.token_ids[index][:, : len(steps)],
            attention_mask=torch.cat(
                [batch.prompt_mask[rows], batch.mask[index][:, : len(steps)].long()], 1
            ),
            position_ids=_positions(positions.expand(len(batch.prompt_positions), -1, -1)),
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([first[index, None], rest.logits], 1)[:, :tokens]

    def _copied(self, batch: MicroBatch) -> Tensor:
        """The same hidden states with prompt and completion in one sequence; one prompt per
        micro-batch row."""
        if not torch.equal(batch.rows, torch.arange(len(batch.rows), device=batch.rows.device)):
            raise ValueError(
                "without share_prefix a micro-batch must carry one prompt per completion"
            )
        lengths = batch.prompt_mask.sum(1)  # (B,)
        completion = batch.token_ids.shape[1]
        total = int(lengths.max()) + completion
        size = (len(lengths), total)
        ids = batch.prompt_ids.new_zeros(size)
        mask = batch.prompt_mask.new_zeros(size)
        positions = batch.prompt_positions.new_zeros((len(batch.prompt_positions), *size))
        for row, length in enumerate(lengths.tolist()):
            end = length + completion
            ids[row, :length], ids[row, length:end] = (
                batch.prompt_ids[row, :length],
                batch.token_ids[row],
            )
            mask[row, :length], mask[row, length:end] = 1, batch.mask[row].long()
            positions[:, row, :length] = batch.prompt_positions[:, row, :length]
            positions[:, row, length:end] = batch.next_positions[row] + torch.arange(
                completion, device=ids.device
            )
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=_positions(positions),
            use_cache=False,
            **batch.features,
        )
        index = lengths[:, None] - 1 + torch.arange(completion, device=ids.device)  # (B, T)
        return output.logits.gather(1, index[..., None].expand(-1, -1, output.logits.shape[-1]))

    def _score(self, hidden: Tensor, batch: MicroBatch, chunks: int) -> PolicyOutput:
        keep = batch.mask.bool()
        tokens, temperature = (
            batch.token_ids[keep],
            batch.temperature[:, None].expand_as(batch.mask)[keep],
        )
        flat = hidden[keep]  # (N, H) real tokens only
        pieces = []
        # Some chunks may be empty. The head runs all the same: other ranks gather its weights at
        # the same time.
        for arguments in zip(
            *(whole.tensor_split(chunks) for whole in (flat, tokens, temperature)), strict=True
        ):
            if chunks > 1 and torch.is_grad_enabled():
                pieces.append(checkpoint(self._token_scores, *arguments, use_reentrant=False))
            else:
                pieces.append(self._token_scores(*arguments))
        logprobs, entropy = (torch.cat(part) for part in zip(*pieces, strict=True))
        empty = torch.zeros_like(batch.mask, dtype=logprobs.dtype)
        return PolicyOutput(
            empty.masked_scatter(keep, logprobs), empty.masked_scatter(keep, entropy)
        )

    def _token_scores(
        self, hidden: Tensor, tokens: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature[:, None]
        logprobs = torch.log_softmax(logits, -1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, tokens[:, None])[:, 0], entropy


def logit_chunks(tokens: int) -> int:
    """Chunks of at most ``LOGIT_CHUNK`` completion tokens."""
    return max(1, -(-tokens // LOGIT_CHUNK))


def length_runs(lengths: Sequence[int]) -> list[list[int]]:
    """Split completions, longest first, into runs of similar length: a new one where that saves
    ``RUN_GAIN`` positions.

    Completions of one prompt differ a lot in length. The prompt is computed once in any case; only
    they are split."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    runs: list[list[int]] = [[]]
    for place, i in enumerate(order):
        if runs[-1] and (lengths[runs[-1][0]] - lengths[i]) * (len(order) - place) >= RUN_GAIN:
            runs.append([])
        runs[-1].append(i)
    return runs


def _padded_left(batch: MicroBatch) -> MicroBatch:
    """The prompts' padding before them instead of behind."""
    width = batch.prompt_mask.shape[1]
    shift = width - batch.prompt_mask.sum(1, keepdim=True)  # (U, 1)
    index = (torch.arange(width, device=shift.device) - shift) % width
    positions = batch.prompt_positions
    return replace(
        batch,
        prompt_ids=batch.prompt_ids.gather(1, index),
        prompt_mask=batch.prompt_mask.gather(1, index),
        prompt_positions=positions.gather(2, index.expand_as(positions)),
    )


def _positions(positions: Tensor) -> Tensor:
    """(3, B, L) for M-RoPE models; (B, L) for text models."""
    return positions if len(positions) > 1 else positions[0]


def freeze(policy: nn.Module, fragments: tuple[str, ...]) -> int:
    """Switch gradients off for parameters whose name holds one of ``fragments``; returns how many
    still train."""
    trainable = 0
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(not any(fragment in name for fragment in fragments))
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable
