"""B2: an Omni engine. Tokens a second, adoptions that leave nothing stale, chunked prefill with
sound between the frames. B3: how far bfloat16 moves log-probabilities from the learner's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatar_rl.actors.config import EngineConfig, RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest, RolloutEngine
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.model.policy import Policy
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.record import Prompt
from benchmarks.gpu_blocks.models import OMNI_3B, DecoderSize, dtype_on, random_omni
from benchmarks.gpu_blocks.report import Report
from tests.tiny_models import ArrayLoader, audio, image, make_prompt, video

ADOPTIONS = 3
GSPO_RANGE = (-3e-4, 4e-4)  # docs/method.md 2.3
GREEDY = RequestSampling(temperature=0, max_tokens=64, ignore_eos=True)


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured."""

    model: DecoderSize | None = OMNI_3B
    sequences: tuple[int, ...] = (64, 256)
    tokens: int = 256  # of a completion
    frames: int = 24
    side: tuple[int, int] = (336, 448)
    longest: int = 8192
    chunk: int = 2048  # tokens of a step: less than a prompt, so that it comes in chunks
    share: float = 0.5  # of the GPU; the learner's model lies beside the engine


TINY = Sizes(None, (8,), 8, 4, (56, 84), 512, 512)


def prompts(loader: ArrayLoader, sizes: Sizes, count: int) -> list[Prompt]:
    """Text, a picture, a video, a video with its sound between its frames, in turn."""
    found = []
    for number in range(count):
        clip = video(number, sizes.frames, sizes.frames / 3.9, *sizes.side)
        kinds: list[tuple[list[Any], bool]] = [
            ([], False),
            ([image(number)], False),
            ([clip], False),
            ([clip, audio(number, 3.9)], True),
        ]
        media, together = kinds[number % len(kinds)]
        found.append(make_prompt(loader, f"p{number}", media, audio_in_video=together))
    return found


def run(
    engine: RolloutEngine,
    encoder: PromptEncoder,
    asked: Sequence[Prompt],
    sampling: RequestSampling,
) -> dict[str, FinishedRequest]:
    """All prompts at once."""
    for seed, prompt in enumerate(asked):
        engine.submit(prompt.id, encoder.engine_input(prompt, False), sampling, seed=seed)
    done: dict[str, FinishedRequest] = {}
    while engine.in_flight:
        done |= {one.request_id: one for one in engine.step()}
    return done


def speed(
    engine: RolloutEngine, encoder: PromptEncoder, asked: Sequence[Prompt], tokens: int
) -> float:
    """Completion tokens a second, four completions a prompt; media were preprocessed before."""
    for prompt in asked:
        engine.prepare(encoder.engine_input(prompt, False), prompt.id)
    sampling = RequestSampling(n=4, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    done = run(engine, encoder, asked, sampling)
    spent = time.perf_counter() - start
    return sum(len(part.token_ids) for one in done.values() for part in one.completions) / spent


def adoptions(
    engine: RolloutEngine,
    encoder: PromptEncoder,
    asked: Sequence[Prompt],
    weights: Sequence[Mapping[str, Tensor]],
) -> dict[str, float]:
    """To other weights and back, three times: back at the first, every greedy token and
    log-probability must be what it was."""
    first = run(engine, encoder, asked, GREEDY)
    same, moved, spent = True, False, []
    for _ in range(ADOPTIONS):
        for number in (1, 0):
            start = time.perf_counter()
            engine.adopt(engine.version + 1, weights[number].items())
            spent.append(time.perf_counter() - start)
            now = run(engine, encoder, asked, GREEDY)
            equal = all(_equal(first[name], now[name]) for name in first)
            same, moved = (same and equal, moved) if number == 0 else (same, moved or not equal)
    return {
        "adoptions_bit_equal": float(same),
        "adoptions_moved": float(moved),
        "adopt_ms": 1000 * float(np.median(spent)),
    }


def _equal(one: FinishedRequest, other: FinishedRequest) -> bool:
    [left], [right] = one.completions, other.completions
    return np.array_equal(left.token_ids, right.token_ids) and np.array_equal(
        left.logprobs, right.logprobs
    )


@torch.no_grad()
def differences(
    policy: Policy,
    encoder: PromptEncoder,
    asked: Sequence[Prompt],
    done: Mapping[str, FinishedRequest],
    device: torch.device,
) -> list[np.ndarray]:
    """Learner's minus engine's log-probabilities, an array for each completion; prompt tokens must
    be equal."""
    found = []
    for prompt in asked:
        encoded = encoder.encode(prompt, False)
        np.testing.assert_array_equal(done[prompt.id].prompt_token_ids, encoded.input_ids.numpy())
        parts = done[prompt.id].completions
        rows = [Row((prompt.id, False), encoded, part.token_ids) for part in parts]
        ours = policy(collate(rows).to(device)).logprobs.float().cpu().numpy()
        found += [ours[i, : len(part.logprobs)] - part.logprobs for i, part in enumerate(parts)]
    return found


def spread(gaps: Sequence[np.ndarray]) -> dict[str, float]:
    """Of all tokens, and of the sequences' means, which GSPO's range is for."""
    tokens = np.abs(np.concatenate(gaps))
    means = np.array([gap.mean() for gap in gaps])
    low, high = GSPO_RANGE
    return {
        "mismatch_mean": float(tokens.mean()),
        "mismatch_p99": float(np.quantile(tokens, 0.99)),
        "mismatch_max": float(tokens.max()),
        "mismatch_sequence_std": float(means.std()),
        "gspo_clip_share_behaviour": float(((means < low) | (means > high)).mean()),
    }


def policy_of(folder: Path, device: torch.device) -> Policy:
    """The learner's view of the checkpoint."""
    from avatar_rl.learner.model.load import load_model

    dtype = str(dtype_on(device)).removeprefix("torch.")
    return Policy(load_model(folder, dtype=dtype)).to(device)


def measure(report: Report, sizes: Sizes, *, only_mismatch: bool = False) -> None:
    """All of B2, or of B3."""
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name, report.part("engine"):
        folder = random_omni(Path(name) / "model", sizes.model, report.device)
        loader = ArrayLoader()
        encoder = PromptEncoder(folder, loader, TemplateConfig())
        asked = prompts(loader, sizes, max(sizes.sequences) // 4)
        config = EngineConfig(
            max_model_len=sizes.longest,
            max_num_seqs=max(sizes.sequences),
            max_num_batched_tokens=sizes.chunk,
            gpu_memory_utilization=sizes.share,
        )
        began = time.perf_counter()
        engine = RolloutEngine(folder, config)
        report.figures.add({"engine_start_s": time.perf_counter() - began})
        try:
            if not only_mismatch:
                _speed_and_adoptions(report, sizes, folder, engine, encoder, asked)
            with report.part("mismatch"):
                some = asked[:32] if only_mismatch else asked[:8]
                _mismatch(report, sizes, folder, engine, encoder, some, repeats=only_mismatch)
        finally:
            engine.close()


def _speed_and_adoptions(
    report: Report,
    sizes: Sizes,
    folder: Path,
    engine: RolloutEngine,
    encoder: PromptEncoder,
    asked: Sequence[Prompt],
) -> None:
    from safetensors.torch import load_file

    for count in sizes.sequences:
        with report.part(f"speed {count}"):
            found = speed(engine, encoder, asked[: count // 4], sizes.tokens)
            report.figures.add({f"tokens_per_s_{count}": found})
    with report.part("adoptions"):
        weights = load_file(folder / "model.safetensors")
        other = {n: w * 1.02 if w.ndim > 1 else w for n, w in weights.items()}
        report.figures.add(adoptions(engine, encoder, asked[:8], (weights, other)))


def _mismatch(
    report: Report,
    sizes: Sizes,
    folder: Path,
    engine: RolloutEngine,
    encoder: PromptEncoder,
    asked: Sequence[Prompt],
    *,
    repeats: bool,
) -> None:
    policy = policy_of(folder, report.device)
    sampling = RequestSampling(n=2, max_tokens=sizes.tokens, ignore_eos=True)
    done = run(engine, encoder, asked, sampling)
    gaps = differences(policy, encoder, asked, done, report.device)
    report.figures.add(spread(gaps))
    if repeats:
        again = differences(policy, encoder, asked[::-1], done, report.device)
        worst = max(
            float(np.abs(a - b).max()) for a, b in zip(gaps, _in_order(again, 2), strict=True)
        )
        report.figures.add({"trainer_repeat_max": worst})


def _in_order(gaps: Sequence[np.ndarray], each: int) -> list[np.ndarray]:
    """Completions of prompts that were asked in reverse."""
    groups = [gaps[i : i + each] for i in range(0, len(gaps), each)]
    return [gap for group in groups[::-1] for gap in group]
