"""The learner without a buffer, and the frozen steps that it and its rivals are timed on."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.batch.microbatch import Row, collate, padded
from avatar_rl.learner.batch.plan import StepWork, plan_step
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from avatar_rl.learner.engine import TrainEngine, init_distributed
from avatar_rl.learner.model.load import load_model, recompute_activations
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.model.reference import ReferencePolicy
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state import StateReplicator
from avatar_rl.learner.step import StepTrainer
from avatar_rl.prompts.config import DataConfig, MediaConfig, TemplateConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.rope import PositionRule
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from benchmarks.packed_side import END, IMAGE, START, VIDEO, VOCABULARY, build_vision_model

GROUP = 8
LONGEST = 128  # tokens of a completion
#: Builds a prompt of a frozen step.
PromptMaker = Callable[[np.random.Generator], EncodedPrompt]
ORDINARY = IMAGE  # token ids below it are text
LR = 1e-7  # so small that a frozen batch stays what it is


class FrozenPrompts:
    """Prompts that are tokens already, in the place of a dataset and its encoder."""

    def __init__(self, encoded: Mapping[str, EncodedPrompt]) -> None:
        self.encoded = encoded

    def __getitem__(self, prompt_id: str) -> str:
        return prompt_id

    def encode(self, prompt_id: str, hinted: bool = False) -> EncodedPrompt:
        return self.encoded[prompt_id]


class BenchLearner:
    """The learner's engine and step trainer, which are handed their steps: no buffer, no
    publishing. ``frozen`` stands in for the dataset of ``spec``."""

    def __init__(self, spec: LearnerSpec, frozen: FrozenPrompts | None = None) -> None:
        join_alone()
        optimizer = spec.learner.optimizer
        model = load_model(spec.model, dtype=optimizer.dtype)
        adapter = None if spec.lora is None else Adapter.attach(model, spec.lora, seed=spec.seed)
        if spec.learner.gradient_checkpointing:
            recompute_activations(model)
        policy = Policy(model)
        self.engine = TrainEngine(
            policy, optimizer, world_size=1, dtype=optimizer.dtype, adapter=adapter
        )
        self.prompts: Any = frozen or PromptIndex.read(spec.datasets, spec.data)
        self.encoder: Any = frozen or PromptEncoder(
            spec.model, MediaLoader(spec.media, base=Path(".")), spec.template
        )
        self.trainer = StepTrainer(
            spec,
            0,
            1,
            self.engine,
            self.prompts,
            self.encoder,
            StateReplicator(self.engine, 0, None, max_bytes=0),
            reference=ReferencePolicy(
                spec.reference,
                dtype=optimizer.dtype,
                device=self.engine.device,
                cached=10**6,
            ),
        )

    def update(self, work: StepWork, *, exact: bool = False) -> tuple[float, float]:
        """Plan, train and update as ``train_step`` does, without publishing; loss and gradient
        norm, ``exact`` where it shall be compared."""
        found = StepMetrics()
        self.trainer.forward_backward(self.trainer.plan(work), found)
        metrics = found.metrics()
        norm = exact_norm(self.engine.policy.parameters()) if exact else 0.0
        reported = self.engine.step(LR)
        return metrics["loss/policy"] + metrics["loss/kl"], norm or reported

    def seconds(self, works: Sequence[StepWork]) -> list[float]:
        """Wall seconds of an update on each of ``works``."""
        found = []
        for work in works:
            start = time.perf_counter()
            self.update(work)
            found.append(time.perf_counter() - start)
        return found


def exact_norm(parameters: Iterable[Tensor]) -> float:
    """Norm of the gradients, summed in float64. On a CPU torch's own norm of a float32 tensor is 50
    to 200 ppm too small where few entries are large, and how much depends on the layout."""
    squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def join_alone(*, on_gpu: bool = False) -> None:
    """This process is the only rank of its group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_distributed(on_gpu=on_gpu, timeout=timedelta(minutes=5))


def make_spec(model: Path, reference: Path, learner: LearnerConfig, **changes: Any) -> LearnerSpec:
    values: dict[str, Any] = {
        "run_id": "bench",
        "seed": 0,
        "model": model,
        "reference": reference,
        "datasets": (),
        "data": DataConfig(),
        "media": MediaConfig(),
        "template": TemplateConfig(),
        "learner": learner,
        "sft": None,
        "buffer": BufferConfig(),
        "redis_url": "",
        "steps": 1,
        "replayed": 0,
        "max_tokens": LONGEST,
        "step_timeout_s": 1.0,
    }
    return LearnerSpec(**(values | changes))


def settings(threads: int, **changes: Any) -> LearnerConfig:
    """GRPO as TRL has it: no TAS, a reference, clipping of ratio and gradient."""
    objective = ObjectiveConfig(beta=0.1, tas_shape="uniform", tas_lambda=0)
    optimizer = OptimizerConfig(lr=LR, dtype="float32", **changes.pop("optimizer", {}))
    return LearnerConfig(
        objective=objective,
        optimizer=optimizer,
        threads=threads,
        gradient_checkpointing=True,
        **changes,
    )


def build_text_models(folder: Path) -> tuple[Path, Path]:
    """A Qwen2 of 2.4M parameters and, as reference, the same a little elsewhere."""
    import transformers as hf

    config = hf.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return _with_reference(hf.Qwen2ForCausalLM(config), folder)


def build_image_models(folder: Path) -> tuple[Path, Path]:
    """The same for a Qwen2.5-VL of 2M parameters."""
    import transformers as hf

    model = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        build_vision_model(folder / "start")
    )
    return _with_reference(model, folder)


def _with_reference(model: Any, folder: Path) -> tuple[Path, Path]:
    model.save_pretrained(folder / "policy")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.002 * torch.randn_like(parameter)
    model.save_pretrained(folder / "reference")
    return folder / "policy", folder / "reference"


def make_trajectory(
    group: str, index: int, prompt_id: str, prompt: EncodedPrompt, tokens: np.ndarray, reward: float
) -> Trajectory:
    return Trajectory(
        id=f"{group}.{index}",
        group_id=group,
        prompt_id=prompt_id,
        index=index,
        hinted=False,
        prompt_tokens=len(prompt.input_ids),
        prompt_digest=prompt.digest,
        token_ids=tokens.astype(np.int32),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        versions=((0, len(tokens)),),
        finish_reason="stop",
        temperature=1.0,
        reward=reward,
        components={},
        step=0,
    )


def make_step(
    number: int,
    prompts: Mapping[str, EncodedPrompt],
    rng: np.random.Generator,
    *,
    shortest: int,
    longest: int,
    tokens: tuple[int, int],
) -> StepWork:
    """A fresh group of eight for each prompt; lengths are log-uniform, so most are short and a few
    are long."""
    groups = []
    for place, (prompt_id, prompt) in enumerate(prompts.items()):
        seq = 1000 * number + place
        lengths = np.exp(rng.uniform(np.log(shortest), np.log(longest + 1), GROUP)).astype(int)
        members = tuple(
            make_trajectory(
                f"{seq:08d}",
                i,
                prompt_id,
                prompt,
                rng.integers(*tokens, length),
                float(rng.random() < 0.5),
            )
            for i, length in enumerate(lengths)
        )
        groups.append(
            Group(
                id=f"{seq:08d}",
                prompt_id=prompt_id,
                seq=seq,
                step=0,
                hinted=False,
                trajectories=members,
            )
        )
    return StepWork(step=0, version=0, groups=tuple(groups), replays=(), baselines=())


def with_behaviour(work: StepWork, logprobs: Sequence[np.ndarray]) -> StepWork:
    """The step with its stored log-probabilities replaced, in order of its completions."""
    values = iter(logprobs)
    groups = []
    for group in work.groups:
        members = tuple(
            msgspec.structs.replace(t, logprobs=next(values)) for t in group.trajectories
        )
        groups.append(msgspec.structs.replace(group, trajectories=members))
    return StepWork(work.step, work.version, tuple(groups), work.replays, work.baselines)


@torch.no_grad()
def score(policy: Policy, work: StepWork, prompts: Mapping[str, EncodedPrompt]) -> list[np.ndarray]:
    """Log-probabilities of every completion, group by group."""
    found = []
    for group in work.groups:
        rows = [
            Row((t.prompt_id, False), prompts[t.prompt_id], t.token_ids) for t in group.trajectories
        ]
        scores = policy(collate(rows)).logprobs.numpy()
        found += [
            values[: len(row.token_ids)].copy() for values, row in zip(scores, rows, strict=True)
        ]
    return found


@dataclass(frozen=True)
class FrozenStep:
    """A step as both sides take it."""

    prompts: dict[str, EncodedPrompt]
    work: StepWork
    trl: dict[str, Any]
    tokens: int  # of completions

    @classmethod
    def make(
        cls, number: int, prompts: int, policy: Policy, reference: Policy, make_prompt: PromptMaker
    ) -> FrozenStep:
        """``prompts`` groups of eight, completions of 16 to 128 tokens."""
        rng = np.random.default_rng(number)
        encoded = {f"{number}-{place}": make_prompt(rng) for place in range(prompts)}
        work = make_step(number, encoded, rng, shortest=16, longest=LONGEST, tokens=(2, ORDINARY))
        current = score(policy, work, encoded)
        # As after a few updates and in another engine: most ratios inside the clip range, some
        # beyond it.
        behaviour = [(v + rng.normal(0, 0.1, len(v))).astype(np.float32) for v in current]
        work = with_behaviour(work, behaviour)
        return cls(
            encoded,
            work,
            _for_trl(work, encoded, score(reference, work, encoded)),
            sum(map(len, current)),
        )


def text_prompt(rng: np.random.Generator) -> EncodedPrompt:
    """128 to 256 tokens."""
    length = int(rng.integers(128, 257))
    ids = torch.from_numpy(rng.integers(2, ORDINARY, length))
    return EncodedPrompt(ids, torch.arange(length)[None], length)


def image_prompt(rng: np.random.Generator) -> EncodedPrompt:
    """An image of 300 tokens and 20 to 60 of text around it, for the model of packed_side.py."""
    before, behind = (int(n) for n in rng.integers(10, 31, 2))
    height, width = 40, 30  # patches; four of them are a token
    ids = torch.from_numpy(
        np.concatenate(
            [
                rng.integers(2, ORDINARY, before),
                [START, *[IMAGE] * (height * width // 4), END],
                rng.integers(2, ORDINARY, behind),
            ]
        )
    )
    pixels = torch.from_numpy(rng.normal(size=(height * width, 3 * 2 * 14 * 14)))
    features = {
        "pixel_values": pixels.float(),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
    config: Any = SimpleNamespace(
        model_type="qwen2_5_vl",
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_config=SimpleNamespace(spatial_merge_size=2),
    )
    positions = PositionRule(config)(ids, features)
    return EncodedPrompt(ids, positions.ids, positions.next, features)


def _images_for_trl(
    prompts: Sequence[EncodedPrompt], padded_ids: Tensor, longest: int
) -> dict[str, Any]:
    """The images of each row, a copy per completion, as TRL's processors leave them."""
    if not prompts[0].features:
        return {}
    kinds = (padded_ids == IMAGE).long()
    return {
        "pixel_values": torch.cat([prompt.features["pixel_values"] for prompt in prompts]),
        "image_grid_thw": torch.cat([prompt.features["image_grid_thw"] for prompt in prompts]),
        "num_images": [1] * len(prompts),
        "mm_token_type_ids": torch.nn.functional.pad(kinds, (0, longest)),
    }


def _for_trl(
    work: StepWork, prompts: Mapping[str, EncodedPrompt], reference: list[np.ndarray]
) -> dict[str, Any]:
    """The same in TRL's layout: a copy of the prompt per completion, prompts padded left,
    completions right."""
    trajectories = [t for group in work.groups for t in group.trajectories]
    plan = plan_step(work, settings(1), ranks=1, max_tokens=LONGEST)
    asked = [prompts[t.prompt_id] for t in trajectories]
    ids = [prompt.input_ids.flip(0) for prompt in asked]
    completions = [torch.from_numpy(t.token_ids.astype(np.int64)) for t in trajectories]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(c) for c in completions], batch_first=True)
    prompt_ids = pad(ids, batch_first=True).flip(1)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": pad([torch.ones_like(i) for i in ids], batch_first=True).flip(1),
        "completion_ids": pad(completions, batch_first=True),
        "completion_mask": mask,
        "advantages": plan.advantages.values.float(),
        "old_per_token_logps": padded([t.logprobs for t in trajectories]),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": mask.sum(),
        **_images_for_trl(asked, prompt_ids, mask.shape[1]),
    }


def load_policy(path: Path) -> Policy:
    return Policy(load_model(path)).eval()
