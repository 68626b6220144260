"""The trainable policy: log-probabilities of completions, each prompt and its media computed once
per pack.

Shapes: N positions of a pack, B completions, T completion tokens (right-padded)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import MicroBatch, Tree
from avatar_rl.learner.model import attention
from avatar_rl.learner.model.head import TiledHead, chunked_scores, tiles
from avatar_rl.learner.model.media import deepstack_inputs, embed, text_model
from avatar_rl.learner.model.sequence import SequenceGroup

#: ``Routers.replay``: takes (positions of this rank, layers, k), or None.
Replay = Callable[[Tensor | None], None]


class PolicyOutput(NamedTuple):
    # (B, T) float32 (float64 of a float64 model), of the tokens at the sampling temperature; 0
    # where padded
    logprobs: Tensor
    entropy: Tensor  # (B, T) likewise, of the next-token distribution, no gradient; 0 where padded


class Policy(nn.Module):
    """Wraps a Hugging Face model so that one forward returns the log-probabilities of a
    micro-batch.

    With ``sequence`` a rank computes its slice of each pack, and every rank of the group gets the
    log-probabilities of all: they call ``forward`` together, on the same micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        sequence: SequenceGroup | None = None,
        replay: Replay | None = None,
    ) -> None:
        """``replay`` is told before each forward which experts its positions shall take."""
        super().__init__()
        self.sequence, self.replay = sequence, replay
        # The model's own head would compute logits for every position of the pack; we apply it to
        # those that predict a completion token only.
        head = getattr(model, "lm_head", None)
        if not isinstance(head, nn.Module):
            raise ModelError(
                f"model class {type(model).__name__} has no lm_head: use a language model that "
                "transformers loads with one"
            )
        self._own_head = (head,)  # in a tuple: its parameters are known as those of ``lm_head``
        self.model = model
        # Nor may the model bend hidden states that it takes for logits (Gemma 2 and later). A
        # factor on the logits (Granite, Cohere) does commute with the head.
        config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        if self.softcap is not None:
            config.final_logit_softcapping = None
        self.lm_head: nn.Module = head
        # Only of what is a linear layer and nothing more does the weight tell all.
        if isinstance(head, nn.Linear) and type(head) is nn.Linear:
            self.lm_head = TiledHead(head, self.softcap)
        model.lm_head = nn.Identity()
        attention.register()
        self._own_attention = config._attn_implementation
        config._attn_implementation = attention.NAME

    def release(self) -> None:
        """Give the model back as it was; the policy is of no use afterwards."""
        [self.model.lm_head] = self._own_head
        config: Any = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        config._attn_implementation = self._own_attention
        if self.softcap is not None:
            config.final_logit_softcapping = self.softcap

    def head_runs(self, tokens: int) -> int:
        """How often the head is run for so many completion tokens."""
        return 1 if isinstance(self.lm_head, TiledHead) else tiles(tokens)

    def forward(
        self, batch: MicroBatch, head_runs: int | None = None, encoders: Iterable[str] = ()
    ) -> PolicyOutput:
        """Scores of a micro-batch.

        Args:
            head_runs: How often the head is run, by default as often as its tokens need.
            encoders: Kinds of media whose encoder is run even if the micro-batch has none, since
                another rank's has. What it returns counts nothing.
        """
        batch = self._filled(batch)
        span, keep = self._span(batch), batch.mask.bool()
        if self.replay is not None:
            self.replay(None if batch.experts is None else batch.experts[span])
        if self.sequence is not None:
            keep = keep & (batch.predicts >= span.start) & (batch.predicts < span.stop)
        # (M, H), of real tokens only
        states = self._states(batch, encoders, span)[batch.predicts[keep] - span.start]
        tokens = batch.token_ids[keep]
        temperature = batch.temperature[:, None].expand_as(batch.mask)[keep]
        if isinstance(self.lm_head, TiledHead):
            logprobs, entropy = self.lm_head(states, tokens, temperature)
        else:
            runs = self.head_runs(len(tokens)) if head_runs is None else head_runs
            logprobs, entropy = chunked_scores(
                self.lm_head, self.softcap, states, tokens, temperature, runs
            )
        empty = torch.zeros_like(batch.mask, dtype=logprobs.dtype)
        found = [empty.masked_scatter(keep, values) for values in (logprobs, entropy)]
        if self.sequence is not None:
            found = [self.sequence.added(values) for values in found]
        return PolicyOutput(*found)

    def placed(self, batch: MicroBatch, device: torch.device) -> MicroBatch:
        """The micro-batch on ``device``; of stored embeddings those that this rank reads."""
        batch = self._filled(batch)
        if self.sequence is not None and batch.media is not None:
            batch = replace(batch, media=batch.media.within(self._span(batch)))
        return batch.to(device)

    def _filled(self, batch: MicroBatch) -> MicroBatch:
        """With a position for each rank at least, since layers take no empty slice: a prompt of its
        own that nobody looks at."""
        size = len(batch.input_ids)
        missing = 0 if self.sequence is None else self.sequence.size - size
        if missing <= 0:
            return batch
        return replace(
            batch,
            input_ids=F.pad(batch.input_ids, (0, missing)),
            positions=F.pad(batch.positions, (0, missing)),
            encoded=F.pad(batch.encoded, (0, missing)),
            experts=None
            if batch.experts is None
            else F.pad(batch.experts, (0, 0, 0, 0, 0, missing), value=-1),
            trees=(*batch.trees, Tree(size, missing, ())),
        )

    def _span(self, batch: MicroBatch) -> slice:
        """The positions of a pack that this rank computes."""
        size = len(batch.input_ids)
        return slice(0, size) if self.sequence is None else self.sequence.span(size)

    def _states(self, batch: MicroBatch, encoders: Iterable[str], span: slice) -> Tensor:
        """(N, H) last hidden states of the pack's positions ``span``."""
        size = span.stop - span.start
        positions = batch.positions[:, span]
        common = {
            # Without one, models would look for packed sequences in the positions by themselves.
            "attention_mask": torch.ones(1, size, dtype=torch.long, device=batch.mask.device),
            "position_ids": positions[:, None] if len(positions) > 1 else positions,
            "use_cache": False,
        }
        with attention.packed(batch.trees, self.sequence):
            inner = text_model(self.model)
            if inner is None:
                # No module in between may be left out: some scale what becomes the logits.
                return self.model(input_ids=batch.input_ids[None, span], **common).logits[0]
            words, media = embed(self.model, batch, encoders, span)
            output = inner(inputs_embeds=words, **common, **deepstack_inputs(media, size))
            return output.last_hidden_state[0]


def freeze(policy: nn.Module, fragments: tuple[str, ...]) -> int:
    """Switch gradients off for parameters whose name holds one of ``fragments``; returns how many
    still train."""
    trainable = 0
    for name, parameter in policy.named_parameters():
        if any(fragment in name for fragment in fragments):
            parameter.requires_grad_(False)
        # Under ZeRO 3 a parameter may be split already and hold nothing itself.
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        trainable += size if parameter.requires_grad else 0
    return trainable
