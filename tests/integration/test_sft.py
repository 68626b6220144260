"""The cold start: hand-computed cross entropy, a loss that falls, and the same training however it
is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from avatar_rl.common.errors import DataError
from avatar_rl.learner.config import SftConfig, SftOptimizerConfig
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.sft import ColdStart, target_text
from avatar_rl.learner.state import capture, restore
from avatar_rl.learner.state_replica import Files, write_files
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import ArrayLoader, audio, load_reference, make_prompt, video

#: All ranks' work is done in one fixture; on a busy machine that takes minutes.
pytestmark = pytest.mark.timeout(600)
WORDS = ("red", "blue", "green", "two", "left")
RATES = (5e-3, 1e-2, 1e-2)  # lr 1e-2: two updates of warm-up, then the only one of the decay


def optimizer() -> SftOptimizerConfig:
    return SftOptimizerConfig(lr=1e-2, eps=1e-5, dtype="float32")


SHORT = SftConfig(steps=3, batch_size=4, warmup=2, lr_floor=0.1, seed=9, optimizer=optimizer())


def make_prompts(loader: ArrayLoader) -> list[Prompt]:
    """Ten prompts, half of them with sight and sound, targets of unequal length."""
    return [
        make_prompt(
            loader,
            f"p{i}",
            [video(i, 4, 2.0), audio(i, 1.0)] if i % 2 else [],
            question=f"what is number {i}",
            answer=WORDS[i % 5],
            reasoning="it is " * (i % 4) + WORDS[i % 5],
            hint="look",
            extra={"hinted": "true"} if i == 3 else {},
        )
        for i in range(10)
    ]


def cold_start(model: Path, config: SftConfig, *, rank: int = 0, ranks: int = 1) -> ColdStart:
    loader = ArrayLoader()
    prompts = make_prompts(loader)
    encoder = PromptEncoder(model, loader, TemplateConfig())
    policy = Policy(load_model(model)).eval()
    engine = TrainEngine(policy, config.optimizer, world_size=ranks, dtype="float32")
    return ColdStart(engine, encoder, prompts, config, rank=rank)


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Three updates by token budget; on one rank also a longer run."""
    found: dict[str, Any] = {}
    budgets = (16_384, 150) if ranks == 1 else (16_384,)
    for budget in budgets:
        config = SHORT.model_copy(update={"micro_batch_tokens": budget})
        start = cold_start(folder / "model", config, rank=rank, ranks=ranks)
        reports = [start.run(update, 1) for update in range(3)]
        found[f"{budget}"] = {"reports": reports, "weights": start.engine.state_dict()}
    if ranks == 1:
        config = SftConfig(steps=20, batch_size=5, warmup=2, optimizer=optimizer())
        start = cold_start(folder / "model", config)
        found["long"] = [start.run(first, 5) for first in range(0, 20, 5)]
    # As many updates in two lives, through the files of a checkpoint.
    write_files(
        capture_after(cold_start(folder / "model", SHORT, rank=rank, ranks=ranks), 2, rank),
        folder / f"{ranks}",
    )
    dist.barrier()
    later = cold_start(folder / "model", SHORT, rank=rank, ranks=ranks)
    restore(later.engine, rank, folder / f"{ranks}")
    found["resumed"] = {"reports": [later.run(2, 1)], "weights": later.engine.state_dict()}
    return {"sft": found}


def capture_after(start: ColdStart, updates: int, rank: int) -> Files:
    start.run(0, updates)
    return capture(start.engine, rank)


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    build_tiny_omni(folder / "model")
    for ranks in (1, 2):
        run_ranks("tests.integration.test_sft", folder, ranks)
    return folder


class ByHand:
    """The same training on one prompt at a time with torch's cross entropy, AdamW and clipping."""

    def __init__(self, model: Path) -> None:
        import numpy as np

        loader = ArrayLoader()
        self.prompts = make_prompts(loader)
        self.encoder = PromptEncoder(model, loader, TemplateConfig())
        self.model = load_reference(model)
        settings = optimizer()
        adam = torch.optim.AdamW(
            self.model.parameters(), lr=1.0, betas=settings.betas, eps=settings.eps, weight_decay=0
        )
        order = (
            np.random.default_rng((9, 0)).permutation(10).tolist()
        )  # two batches of 4, then the next epoch
        again = np.random.default_rng((9, 1)).permutation(10).tolist()
        self.batches = [order[:4], order[4:8], again[:4]]
        self.losses: list[float] = []
        self.tokens: list[int] = []
        for batch, rate in zip(self.batches, RATES, strict=True):
            pairs = [self._pair(self.prompts[i]) for i in batch]
            loss = torch.stack([p[0] for p in pairs]).sum() / sum(p[1] for p in pairs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
            for group in adam.param_groups:
                group["lr"] = rate
            adam.step()
            adam.zero_grad()
            self.losses.append(float(loss.detach()))
            self.tokens.append(sum(p[1] for p in pairs))

    def _pair(self, prompt: Prompt) -> tuple[Tensor, int]:
        """Summed cross entropy of the target in nats, and its tokens."""
        text = f"<think>{prompt.reasoning}</think><answer>{prompt.answer}</answer><|im_end|>"
        target = self.encoder.tokenizer(text, add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ][0]
        encoded = self.encoder.encode(prompt, hinted=prompt.extra.get("hinted") == "true")
        ids = torch.cat([encoded.input_ids, target])[None]
        self.model.rope_deltas = None
        timing = {"video_second_per_grid": torch.tensor([1.0])} if encoded.features else {}
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **encoded.features,
            **timing,
        }
        logits = self.model(**inputs).logits[0]
        scored = logits[len(encoded.input_ids) - 1 : -1]
        return torch.nn.functional.cross_entropy(scored, target, reduction="sum"), len(target)


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> ByHand:
    return ByHand(folder / "model")


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("budget", ["16384", "150"])
def test_loss_and_weights_are_those_computed_by_hand(
    folder: Path, by_hand: ByHand, budget: str
) -> None:
    found = rank_results(folder, "sft", 1)[budget]
    assert [report["loss"] for report in found["reports"]] == pytest.approx(
        by_hand.losses, rel=1e-5
    )
    assert [report["tokens"] for report in found["reports"]] == by_hand.tokens
    assert [report["update"] for report in found["reports"]] == [1, 2, 3]
    weights = dict(by_hand.model.named_parameters())
    assert difference(
        found["weights"], {name: p.detach() for name, p in weights.items()}
    ) < 2e-3 * max(RATES)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_cold_start_equals_an_uninterrupted_one_bit_for_bit(
    folder: Path, ranks: int
) -> None:
    whole, resumed = (rank_results(folder, "sft", ranks)[name] for name in ("16384", "resumed"))
    assert resumed["reports"] == whole["reports"][2:]
    assert difference(resumed["weights"], whole["weights"]) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_train_what_one_trains(folder: Path, rank: int) -> None:
    alone, together = (
        rank_results(folder, "sft", 1)["16384"],
        rank_results(folder, "sft", 2, rank)["16384"],
    )
    assert [report["tokens"] for report in together["reports"]] == [
        report["tokens"] for report in alone["reports"]
    ]
    losses = [report["loss"] for report in alone["reports"]]
    assert [report["loss"] for report in together["reports"]] == pytest.approx(losses, rel=1e-5)
    assert difference(together["weights"], alone["weights"]) < 2e-3 * max(RATES)


def test_the_loss_falls(folder: Path) -> None:
    losses = [report["loss"] for report in rank_results(folder, "sft", 1)["long"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


# -- refusals --------------------------------------------------------------------------------------


def make_prompt_of(**fields: Any) -> Prompt:
    return make_prompt(ArrayLoader(), "p", [], **fields)


def test_the_target_is_the_output_format() -> None:
    prompt = make_prompt_of(reasoning="It beeps.", answer="two")
    assert target_text(prompt) == "<think>It beeps.</think><answer>two</answer>"


@pytest.mark.parametrize("reasoning", [None, ""])
def test_a_prompt_without_reasoning_is_named(reasoning: str | None) -> None:
    with pytest.raises(DataError, match="cold-start prompt 'p' has no reasoning"):
        target_text(make_prompt_of(reasoning=reasoning))


def test_fewer_prompts_than_a_batch_are_refused() -> None:
    config = SftConfig(steps=1, batch_size=3)
    with pytest.raises(DataError, match="has 2 prompts, fewer than one batch of 3"):
        ColdStart(None, None, [make_prompt_of(reasoning="x")] * 2, config, rank=0)  # type: ignore[arg-type]


if __name__ == "__main__":
    rank_main(work)
