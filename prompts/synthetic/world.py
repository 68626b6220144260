"""Writes a synthetic world to disk: three JSONL splits and their media, byte-identical for equal
configs.

    report = synthesize(Path("build/world"), WorldConfig(seed=0))

``extra["scene"]`` is the ground truth of every time slot as JSON. ``sft.jsonl`` marks prompts that
are to be shown with their hint by ``extra["hinted"] == "true"``; where its target is a guess,
``answer`` is the guess and ``extra["truth"]`` the truth."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator

from avatar_rl.common.files import new_folder
from avatar_rl.prompts.record import MediaItem, MediaPlan, Prompt
from avatar_rl.prompts.synthetic.config import Category, WorldConfig
from avatar_rl.prompts.synthetic.questions import Draft, draft
from avatar_rl.prompts.synthetic.render import (
    SAMPLE_RATE,
    encode_mp4,
    encode_wav,
    render_frames,
    render_sound,
)
from avatar_rl.prompts.synthetic.scene import FRAMES, HEIGHT, WIDTH

SPLITS = ("train", "heldout", "sft")
MIN_PIXELS = WIDTH * HEIGHT
MAX_PIXELS = 64 * 28 * 28


@dataclass(frozen=True)
class WorldReport:
    """What was written."""

    out: Path
    counts: dict[str, dict[Category, int]]  # split -> question type -> prompts
    media_bytes: int

    @property
    def train(self) -> Path:
        return self.out / "train.jsonl"

    @property
    def heldout(self) -> Path:
        return self.out / "heldout.jsonl"

    @property
    def sft(self) -> Path:
        return self.out / "sft.jsonl"


def synthesize(out: Path, config: WorldConfig) -> WorldReport:
    """Write the world of ``config`` into the new folder ``out``, whole or not at all.

    Raises DataError when ``out`` exists and is not an empty folder.
    """
    out = Path(out)
    with new_folder(out) as work:
        (work / "media").mkdir()
        counts = {split: _write_split(work, split, config) for split in SPLITS}
        size = sum(file.stat().st_size for file in (work / "media").iterdir())
    return WorldReport(out, counts, size)


def _write_split(work: Path, split: str, config: WorldConfig) -> dict[Category, int]:
    total = {"train": config.n_train, "heldout": config.n_heldout, "sft": config.n_sft}[split]
    counts = apportion(total, config.sft_weights if split == "sft" else config.weights)
    key = SPLITS.index(split)
    plan = [(category, turn) for category, count in counts.items() for turn in range(count)]
    order = np.random.default_rng([config.seed, key]).permutation(len(plan))
    with (work / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for index, at in enumerate(order):
            category, turn = plan[at]
            # one stream per prompt: no split or prompt shares its random numbers with another
            prompt = _prompt(
                work, f"{split}-{index:05d}", category, turn, config, [config.seed, key, index]
            )
            file.write(prompt.model_dump_json(exclude_defaults=True) + "\n")
    return counts


def apportion(total: int, weights: dict[Category, float]) -> dict[Category, int]:
    """``total`` prompts over the question types, by largest remainder; earlier types win ties."""
    present = {category: weights[category] for category in Category if weights.get(category, 0) > 0}
    shares = {
        category: total * weight / sum(present.values()) for category, weight in present.items()
    }
    counts = {category: int(share) for category, share in shares.items()}
    by_remainder = sorted(shares, key=lambda category: counts[category] - shares[category])
    for category in by_remainder[: total - sum(counts.values())]:
        counts[category] += 1
    return counts


def _prompt(
    work: Path, name: str, category: Category, turn: int, config: WorldConfig, seed: list[int]
) -> Prompt:
    rng = np.random.default_rng(seed)
    question = draft(category, rng, turn)
    video = encode_mp4(render_frames(question.scene, rng, config.difficulty))
    sound = encode_wav(render_sound(question.scene, rng, config.difficulty))
    (work / "media" / f"{name}.mp4").write_bytes(video)
    (work / "media" / f"{name}.wav").write_bytes(sound)
    items = (
        MediaItem(
            kind="video",
            uri=f"media/{name}.mp4",
            digest=hashlib.sha256(video).hexdigest(),
            frames=FRAMES,
            min_pixels=MIN_PIXELS,
            max_pixels=MAX_PIXELS,
        ),
        MediaItem(
            kind="audio",
            uri=f"media/{name}.wav",
            digest=hashlib.sha256(sound).hexdigest(),
            sample_rate=SAMPLE_RATE,
        ),
    )
    extra = {"scene": question.scene.truth()}
    answer, reasoning = question.answer, None
    if name.startswith("sft"):
        answer, reasoning, marks = _target(question, category, rng, config)
        extra |= marks
    return Prompt(
        id=name,
        question=question.question,
        answer=answer,
        problem_type=question.problem_type,
        options=question.options,
        media=MediaPlan(items=items, audio_in_video=config.audio_in_video),
        reasoning=reasoning,
        hint=question.hint,
        caption=question.scene.caption(),
        audio_caption=question.scene.audio_caption(),
        category=category,
        needs=question.needs,
        extra=extra,
    )


def _target(
    question: Draft, category: Category, rng: Generator, config: WorldConfig
) -> tuple[str, str, dict[str, str]]:
    """Answer and reasoning that an SFT prompt teaches, and what ``extra`` says about them."""
    if rng.random() < config.hinted_share:
        return question.answer, question.reasoning(), {"hinted": "true"}
    if rng.random() < config.guess_share.get(category, 0.0):
        guess = question.answers[rng.integers(len(question.answers))]
        return guess, f"maybe {guess}", {"truth": question.answer}
    return question.answer, question.reasoning(), {}
