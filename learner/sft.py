"""Stage 0: supervised cold start on prompts with reasoning, through the RL learner's own engine
(docs/method.md 1.6)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from avatar_rl.common.errors import DataError
from avatar_rl.learner.batch.microbatch import MicroBatch, Pending, Row
from avatar_rl.learner.batch.packing import Size, pack
from avatar_rl.learner.engine import lr_at
from avatar_rl.learner.media.ahead import AheadEncoder
from avatar_rl.learner.model.policy import PolicyOutput
from avatar_rl.prompts.record import Prompt

if TYPE_CHECKING:
    from avatar_rl.learner.config import SftConfig
    from avatar_rl.learner.engine import TrainEngine
    from avatar_rl.prompts.encoding.template import PromptEncoder


log = logging.getLogger(__name__)

#: Share of the prompts that may be left out.
MAX_LEFT_OUT = 0.2


def target_text(prompt: Prompt) -> str:
    """The completion a prompt teaches: its reasoning and its answer in the output format
    (docs/method.md 1.5)."""
    if not prompt.reasoning:
        raise DataError(
            f"cold-start prompt {prompt.id!r} has no reasoning: fill its `reasoning` or leave it "
            "out"
        )
    return f"<think>{prompt.reasoning}</think><answer>{prompt.answer}</answer>"


class SftReport(TypedDict):
    """What some cold-start updates came to."""

    update: int  # the next one
    loss: float  # mean per token, averaged over the updates
    tokens: int


class ColdStart:
    """Cross-entropy on completion tokens, mean over the global batch's tokens; it does not depend
    on the split."""

    def __init__(
        self,
        engine: TrainEngine,
        encoder: PromptEncoder | AheadEncoder,
        prompts: Sequence[Prompt],
        config: SftConfig,
        *,
        rank: int,
    ) -> None:
        if len(prompts) < config.batch_size:
            raise DataError(
                f"cold start has {len(prompts)} prompts, fewer than one batch of "
                f"{config.batch_size}"
            )
        self.engine, self.encoder, self.config, self.rank = engine, encoder, config, rank
        self.prompts = list(prompts)
        for prompt in self.prompts:  # what the template refuses is said before any training
            encoder.text(prompt, _hinted(prompt))
        #: Rows that cannot be encoded and are left out, with the reason.
        self.left_out: dict[int, str] = {}
        tokenizer = encoder.tokenizer
        self.end = tokenizer.eos_token_id
        self.targets = [
            np.array(
                [*tokenizer(target_text(prompt), add_special_tokens=False)["input_ids"], self.end],
                dtype=np.int32,
            )
            for prompt in self.prompts
        ]

    def run(self, first: int, count: int) -> SftReport:
        """Updates ``first`` to ``first + count - 1``; returns the mean loss per token and the
        tokens seen."""
        loss = tokens = 0.0
        for update in range(first, first + count):
            step_loss, step_tokens = self._update(update)
            loss += step_loss
            tokens += step_tokens
        return {"update": first + count, "loss": loss / count, "tokens": int(tokens)}

    def _batch(self, update: int) -> list[int]:
        """Indices of one global batch: epochs shuffled from the seed, the same on every rank."""
        size = self.config.batch_size
        per_epoch = len(self.prompts) // size
        epoch, position = divmod(update, per_epoch)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.prompts))
        return order[position * size : (position + 1) * size].tolist()

    def _share(self, batch: list[int]) -> list[int]:
        """This rank's part of a batch. By row number: so a rank meets mostly its own part of the
        dataset, and decodes only that."""
        return np.array_split(np.sort(batch), self.engine.world_size)[self.rank].tolist()

    def _update(self, update: int) -> tuple[float, int]:
        batch = self._batch(update)
        total = sum(len(self.targets[i]) for i in batch)
        share = self._share(batch)
        if isinstance(self.encoder, AheadEncoder):
            coming = [self.prompts[i] for i in [*share, *self._share(self._batch(update + 1))]]
            self.encoder.ahead((prompt, _hinted(prompt)) for prompt in coming)
        rows = [row for i in share if (row := self._row(i)) is not None]
        sizes = [Size(row.key, len(row.prompt.input_ids), len(row.token_ids)) for row in rows]
        micro_batches = [
            Pending([rows[i] for i in indices])
            for indices in pack(sizes, self.config.micro_batch_tokens, name="cold_start")
        ]
        # On the engine's device: nccl takes no CPU tensor.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.engine.device)

        def cross_entropy(_: int, micro_batch: MicroBatch, output: PolicyOutput) -> Tensor:
            loss = -output.logprobs.sum() / total  # padded positions are 0
            loss_sum.add_(loss.detach())
            return loss

        # A rank without a share (fewer prompts than ranks) still takes part in the collectives.
        spare = micro_batches[0] if micro_batches else Pending([self._any_row(batch)])
        self.engine.accumulate(micro_batches, cross_entropy, spare)
        config = self.config
        rate = lr_at(
            update,
            lr=config.optimizer.lr,
            warmup=config.warmup,
            total=config.steps,
            schedule=config.schedule,
            floor=config.lr_floor,
        )
        self.engine.step(rate)
        if self.engine.world_size > 1:
            dist.all_reduce(loss_sum)
        return float(loss_sum), total

    def _row(self, index: int) -> Row | None:
        """None where the prompt cannot be encoded: it is left out.

        Raises DataError when more than a fifth of the dataset is.
        """
        prompt = self.prompts[index]
        hinted = _hinted(prompt)
        try:
            encoded = self.encoder.encode(prompt, hinted)
        except DataError as error:
            if index not in self.left_out:
                log.warning("cold-start prompt %s left out: %s", prompt.id, error)
                self.left_out[index] = str(error)
            if len(self.left_out) > MAX_LEFT_OUT * len(self.prompts):
                raise DataError(
                    f"{len(self.left_out)} of {len(self.prompts)} cold-start prompts cannot be "
                    f"encoded, last: {error}; run `avatar data validate` on the dataset"
                ) from error
            return None
        return Row((prompt.id, hinted), encoded, self.targets[index], media=encoded.media)

    def _any_row(self, batch: Sequence[int]) -> Row:
        """Any of the batch that can be encoded. Raises DataError where none can."""
        for index in batch:
            if (row := self._row(index)) is not None:
                return row
        raise DataError(
            f"no prompt of a cold-start batch can be encoded: {self.left_out[batch[0]]}"
        )


def _hinted(prompt: Prompt) -> bool:
    """Whether the row teaches to follow a hint."""
    return prompt.extra.get("hinted") == "true"
