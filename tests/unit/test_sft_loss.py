"""Where the cold start's loss is summed over ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import avatar_rl.learner.sft
from avatar_rl.learner.config import SftConfig
from avatar_rl.learner.sft import ColdStart
from avatar_rl.prompts.encoding.template import EncodedPrompt
from tests.tiny_models import ArrayLoader, make_prompt


def test_ranks_add_their_losses_on_the_engines_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group over nccl takes no CPU tensor; "meta" stands for the GPU here."""

    class Encoder:
        def tokenizer(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, 3]}

        tokenizer.eos_token_id = 0  # type: ignore[attr-defined]

        def text(self, *_: Any) -> str:
            return ""

        def encode(self, *_: Any) -> EncodedPrompt:
            return EncodedPrompt(torch.arange(4), torch.arange(4)[None], 4)

    class Met(Exception):
        pass

    def meet(tensor: torch.Tensor) -> None:
        assert tensor.device.type == "meta"
        raise Met

    nothing = lambda *_: None  # noqa: E731
    engine = SimpleNamespace(
        world_size=2,
        device=torch.device("meta"),
        accumulate=nothing,
        step=nothing,
    )
    monkeypatch.setattr(avatar_rl.learner.sft.dist, "all_reduce", meet)
    prompts = [make_prompt(ArrayLoader(), f"p{i}", [], reasoning="so") for i in np.arange(2)]
    start = ColdStart(engine, Encoder(), prompts, SftConfig(steps=1, batch_size=2), rank=0)  # type: ignore[arg-type]
    with pytest.raises(Met):
        start.run(0, 1)
