"""What the rollout engine needs inside vLLM's workers: log-probabilities and a vocabulary like the
learner's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler


class RolloutSampler(Sampler):
    """Returns log softmax(logits / temperature) over the whole vocabulary, what the learner
    computes.

    vLLM offers log-probabilities either before the temperature or after every restriction
    (forbidden tokens, top-k, top-p). Tokens in ``forbidden`` are never drawn; like top-k and top-p
    that restriction is not in the log-probability, so an on-policy ratio is exactly 1."""

    def __init__(self, stock: Sampler, forbidden: Tensor) -> None:
        super().__init__(stock.logprobs_mode, stock.use_fp64_gumbel)
        self.forbidden = forbidden  # (F,) int64 token ids
        self._temperature: Tensor | None = (
            None  # (B,) of the step that is being sampled; None when all are greedy
        )

    def forward(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any
    ) -> Any:
        self._temperature = sampling_metadata.temperature
        return super().forward(logits, sampling_metadata, *args, **kwargs)

    def compute_logprobs(self, logits: Tensor) -> Tensor:  # type: ignore[override]  # static there, called on self
        if self._temperature is not None:
            greedy = self._temperature < 1e-5  # greedy rows have no temperature to speak of: use 1
            logits = logits.float() / torch.where(greedy, 1.0, self._temperature)[:, None]
        return logits.log_softmax(dim=-1, dtype=torch.float32)

    def apply_logits_processors(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = super().apply_logits_processors(logits, *args, **kwargs)
        return logits.index_fill_(1, self.forbidden, float("-inf"))


class WorkerExtension:
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    model_runner: Any

    def install_rollout_sampler(self, forbidden: list[int]) -> None:
        stock = self.model_runner.sampler
        if type(stock) is not Sampler:
            raise RuntimeError(
                f"vLLM samples with {type(stock).__module__}.{type(stock).__name__}, which "
                "returns other "
                "log-probabilities: set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        device = self.model_runner.device
        self.model_runner.sampler = RolloutSampler(
            stock, torch.tensor(forbidden, dtype=torch.long, device=device)
        )
