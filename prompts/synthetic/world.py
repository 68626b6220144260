"""Writes a synthetic world to disk: three JSONL splits and their media, byte-identical for equal
configs.

    report = synthesize(Path("build/world"), WorldConfig(seed=0))

No split shares its random numbers with another, so that each can be written on its own.

``extra["scene"]`` is the ground truth of every time slot as JSON. ``sft.jsonl`` marks prompts that
are to be shown with their hint by ``extra["hinted"] == "true"``; where its target is a guess,
``answer`` is the guess and ``extra["truth"]`` the truth."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

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
#: The splits that RL asks, and those that the cold start learns from.
ASKED, TAUGHT = ("train", "heldout"), ("sft",)
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


def synthesize(
    out: Path,
    config: WorldConfig,
    *,
    splits: Sequence[str] = SPLITS,
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> WorldReport:
    """Write the world of ``config`` into the new folder ``out``, whole or not at all.

    Args:
        out: The folder.
        config: What is in it.
        splits: Those that are written; each has the same bytes with the others and without them.
        on_clip: Called after every clip with how many are done, and of how many.

    Raises:
        DataError: ``out`` exists and is not an empty folder.
    """
    out = Path(out)
    total, done = sum(size_of(split, config) for split in splits), 0

    def clip_done() -> None:
        nonlocal done
        done += 1
        on_clip(done, total)

    with new_folder(out) as work:
        (work / "media").mkdir()
        counts = {split: _write_split(work, split, config, clip_done) for split in splits}
        size = sum(file.stat().st_size for file in (work / "media").iterdir())
    return WorldReport(out, counts, size)


def size_of(split: str, config: WorldConfig) -> int:
    """Prompts of a split."""
    return {"train": config.n_train, "heldout": config.n_heldout, "sft": config.n_sft}[split]


def plan_of(split: str, config: WorldConfig) -> list[tuple[Category, int]]:
    """Question type and turn of each of the split's prompts, in the file's order."""
    counts = apportion(
        size_of(split, config), config.sft_weights if split == "sft" else config.weights
    )
    plan = [(category, turn) for category, count in counts.items() for turn in range(count)]
    order = np.random.default_rng([config.seed, SPLITS.index(split)]).permutation(len(plan))
    return [plan[at] for at in order]


def _write_split(
    work: Path, split: str, config: WorldConfig, clip_done: Callable[[], None]
) -> dict[Category, int]:
    plan, key = plan_of(split, config), SPLITS.index(split)
    with (work / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for index, (category, turn) in enumerate(plan):
            # one stream per prompt: no split or prompt shares its random numbers with another
            prompt = _prompt(
                work, f"{split}-{index:05d}", category, turn, config, [config.seed, key, index]
            )
            file.write(prompt.model_dump_json(exclude_defaults=True) + "\n")
            clip_done()
    counts = Counter(category for category, _ in plan)
    return {category: counts[category] for category in Category if counts[category]}


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


@dataclass(frozen=True)
class Row:
    """A prompt with its clip before it is encoded."""

    prompt: Prompt
    frames: NDArray[np.uint8]  # as ``render_frames``
    sound: NDArray[np.int16]  # as ``render_sound``


def first_taught(config: WorldConfig, count: int) -> list[Row]:
    """The first rows of sft.jsonl without the files: their media have no digest."""
    rows = []
    for index, (category, turn) in enumerate(plan_of("sft", config)[:count]):
        rng = np.random.default_rng([config.seed, SPLITS.index("sft"), index])
        question = draft(category, rng, turn)
        frames = render_frames(question.scene, rng, config.difficulty)
        sound = render_sound(question.scene, rng, config.difficulty)
        rows.append(Row(_asked(f"sft-{index:05d}", question, category, rng, config), frames, sound))
    return rows


def _prompt(
    work: Path, name: str, category: Category, turn: int, config: WorldConfig, seed: list[int]
) -> Prompt:
    rng = np.random.default_rng(seed)
    question = draft(category, rng, turn)
    video = encode_mp4(render_frames(question.scene, rng, config.difficulty))
    sound = encode_wav(render_sound(question.scene, rng, config.difficulty))
    (work / "media" / f"{name}.mp4").write_bytes(video)
    (work / "media" / f"{name}.wav").write_bytes(sound)
    digests = (hashlib.sha256(video).hexdigest(), hashlib.sha256(sound).hexdigest())
    return _asked(name, question, category, rng, config, digests)


def _asked(
    name: str,
    question: Draft,
    category: Category,
    rng: Generator,
    config: WorldConfig,
    digests: tuple[str | None, str | None] = (None, None),
) -> Prompt:
    items = (
        MediaItem(
            kind="video",
            uri=f"media/{name}.mp4",
            digest=digests[0],
            frames=FRAMES,
            min_pixels=MIN_PIXELS,
            max_pixels=MAX_PIXELS,
        ),
        MediaItem(
            kind="audio",
            uri=f"media/{name}.wav",
            digest=digests[1],
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
