"""Forward and backward of text rows that each carry their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from avatar_rl.learner.batch.microbatch import Row
from benchmarks.packed_side import Side, weights_of


class CopiedText(Side):
    """transformers' own forward over ``count`` rows at once that each carry their prompt."""

    def __init__(self, folder: Path, rows: Sequence[Row], count: int) -> None:
        model: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model: Any = model.train()
        order = sorted(rows, key=lambda row: len(row.prompt.input_ids) + len(row.token_ids))
        self.batches = [order[i : i + count] for i in range(0, len(order), count)]

    @property
    def positions(self) -> int:
        return sum(
            len(rows) * max(len(row.prompt.input_ids) + len(row.token_ids) for row in rows)
            for rows in self.batches
        )

    def run(self) -> float:
        return sum(self._run(rows) for rows in self.batches)

    def _run(self, rows: Sequence[Row]) -> float:
        tokens = [torch.from_numpy(row.token_ids).long() for row in rows]
        whole = [torch.cat([row.prompt.input_ids, t]) for row, t in zip(rows, tokens, strict=True)]
        # padded on the left, so that the completions end together and one slice has all logits
        pad: Any = torch.nn.utils.rnn.pad_sequence
        ids = pad(whole, batch_first=True, padding_side="left")
        mask = pad([torch.ones_like(one) for one in whole], batch_first=True, padding_side="left")
        longest = max(map(len, tokens))
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            logits_to_keep=longest + 1,
            use_cache=False,
        ).logits[:, :-1]
        own = pad(tokens, batch_first=True, padding_side="left")
        logprobs = torch.log_softmax(logits.float(), -1).gather(2, own[..., None])[..., 0]
        weights = pad([weights_of(row) for row in rows], batch_first=True, padding_side="left")
        loss = (weights * logprobs).sum()
        loss.backward()
        return float(loss.detach())
