"""The synthetic world: bytes, ground truth, balance, independence of the modalities, and what hints
give away."""

from __future__ import annotations

import filecmp
import hashlib
import json
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from avatar_rl.common.errors import DataError
from avatar_rl.prompts.record import ProblemType, Prompt, resolve_uri
from avatar_rl.prompts.synthetic.config import Category, WorldConfig
from avatar_rl.prompts.synthetic.questions import Draft, draft
from avatar_rl.prompts.synthetic.scene import COLOURS, FRAMES, HEIGHT, PITCHES, SLOTS, WIDTH
from avatar_rl.prompts.synthetic.world import apportion, synthesize

SMALL = WorldConfig(seed=7, n_train=20, n_heldout=20, n_sft=30)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("world") / "a", SMALL).out


def prompts_of(world: Path, split: str) -> list[Prompt]:
    return [
        Prompt.model_validate_json(line)
        for line in (world / f"{split}.jsonl").read_text().splitlines()
    ]


def all_prompts(world: Path) -> list[Prompt]:
    return [prompt for split in ("train", "heldout", "sft") for prompt in prompts_of(world, split)]


@cache
def one_draft(category: Category, i: int) -> Draft:
    return draft(category, np.random.default_rng([99, i]), i)


def drafts(category: Category, n: int = 360) -> list[Draft]:
    return [one_draft(category, i) for i in range(n)]


def meaning(question: Draft) -> str:
    """The answer itself: a letter is replaced by its option's text."""
    if question.problem_type is not ProblemType.MULTIPLE_CHOICE:
        return question.answer
    return {option[0]: option[3:] for option in question.options}[question.answer]


def files_of(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_same_config_gives_the_same_bytes_also_split_by_split(world: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    seen: list[str] = []
    for name, splits in (("asked", ("train", "heldout")), ("taught", ("sft",))):
        out = tmp_path / name
        synthesize(out, SMALL, splits=splits, on_clip=lambda *at: told.append(at))
        names = files_of(out)
        _, different, failed = filecmp.cmpfiles(world, out, names, shallow=False)
        assert different == failed == []
        seen += names
    assert sorted(seen) == sorted(files_of(world)) and len(seen) == 3 + 2 * 70
    assert told == [(done + 1, total) for total in (40, 30) for done in range(total)]


def test_another_seed_gives_other_scenes(world: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "c", SMALL.model_copy(update={"seed": 8, "n_sft": 0})).out
    mine = {item.digest for prompt in prompts_of(world, "train") for item in prompt.media.items}
    theirs = {item.digest for prompt in prompts_of(other, "train") for item in prompt.media.items}
    assert not mine & theirs
    assert prompts_of(other, "sft") == []


def test_splits_share_no_scene(world: Path) -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for split in ("train", "heldout", "sft"):
        for prompt in prompts_of(world, split):
            seen[split] |= {str(item.digest) for item in prompt.media.items}
    assert len(seen["train"]) == 40 and len(seen["heldout"]) == 40 and len(seen["sft"]) == 60
    assert len(seen["train"] | seen["heldout"] | seen["sft"]) == 140


def test_media_are_what_the_prompt_says(world: Path) -> None:
    for prompt in prompts_of(world, "heldout"):
        video, audio = prompt.media.items
        for item in (video, audio):
            assert (
                hashlib.sha256(resolve_uri(item.uri, world).read_bytes()).hexdigest() == item.digest
            )
        assert (video.kind, video.frames, audio.kind, audio.sample_rate) == (
            "video",
            FRAMES,
            "audio",
            16_000,
        )
        assert video.min_pixels is not None and video.max_pixels is not None
        assert video.min_pixels <= WIDTH * HEIGHT <= video.max_pixels
        with av.open(str(world / video.uri)) as container:
            assert len(list(container.decode(video=0))) == FRAMES
        samples, rate = soundfile.read(world / audio.uri, dtype="int16")
        assert rate == 16_000 and samples.shape == (20_480,)  # 1.28 s
        assert soundfile.info(world / audio.uri).subtype == "PCM_16"


def scene_of(prompt: Prompt) -> dict[str, Any]:
    return json.loads(prompt.extra["scene"])


def test_decoded_picture_shows_colours_and_places(world: Path) -> None:
    """Nearest palette colour at each shape's place, after H.264 and chroma subsampling."""
    checked = 0
    for prompt in all_prompts(world):
        with av.open(str(world / prompt.media.items[0].uri)) as container:
            frames = np.stack(
                [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            )
        for sprite in scene_of(prompt)["sprites"]:
            if len(set(sprite["places"])) > 1 and not prompt.category.startswith("count"):
                continue  # it glides: between two places
            for slot in range(SLOTS):
                x = 14 + 28 * ("left", "center", "right").index(sprite["places"][slot])
                patch = frames[2 * slot : 2 * slot + 2, 8:20, x - 6 : x + 6].astype(float)
                if sprite["lit"][slot]:
                    assert patch[:, 4:8, 4:8].min(axis=-1).mean() > 200  # white core
                    patch = patch[:, :, :2]
                mean = patch.mean(axis=(0, 1, 2))
                nearest = min(
                    COLOURS, key=lambda name: float(np.sum((mean - np.array(COLOURS[name])) ** 2))
                )
                assert nearest == sprite["colours"][slot], (prompt.id, slot)
                checked += 1
    assert checked > 200


def test_sound_holds_the_beeps(world: Path) -> None:
    """Loudness and strongest frequency of each slot."""
    for prompt in all_prompts(world):
        samples, rate = soundfile.read(world / prompt.media.items[1].uri)
        for slot, sound in enumerate(scene_of(prompt)["sounds"]):
            part = samples[slot * 5120 : (slot + 1) * 5120]
            loud = float(np.sqrt(np.mean(part**2))) > 0.04
            assert loud == (sound != "none"), prompt.id
            if loud:
                hertz = float(np.argmax(np.abs(np.fft.rfft(part))) * rate / len(part))
                nearest = min(PITCHES, key=lambda name: abs(np.log(hertz / PITCHES[name])))
                assert nearest == sound, prompt.id


def solve(prompt: Prompt) -> str:
    """The answer worked out afresh from the scene and the wording of the question."""
    scene = scene_of(prompt)
    sprites, sounds = scene["sprites"], scene["sounds"]
    words = re.findall(r"[a-z]+", prompt.question.lower())
    beeps = [sound for sound in sounds if sound != "none"]
    if prompt.category == "colour":
        return sprites[0]["colours"][0]
    if prompt.category == "pitch":
        return beeps[0]
    if prompt.category == "side":
        return next(s["places"][0] for s in sprites if s["colours"][0] in words)
    if prompt.category == "beeps":
        return str(len(beeps))
    if prompt.category == "order":
        return beeps[-1 if "last" in words else 0]
    if prompt.category == "direction":
        start, *_, end = (
            ("left", "center", "right").index(place) for place in sprites[0]["places"]
        )
        return "still" if start == end else "right" if end > start else "left"
    if prompt.category == "colour_at_beep":
        return sprites[0]["colours"][sounds.index(next(w for w in words if w in PITCHES))]
    if prompt.category == "count_on_side":
        side = words[-1]
        return str(
            sum(
                p == side and s != "none" for p, s in zip(sprites[0]["places"], sounds, strict=True)
            )
        )
    order = ["left", "center", "right"]
    if prompt.category == "count_left_of":
        first, second = (
            next(s for s in sprites if s["colours"][0] == colour)
            for colour in [w for w in words if w in COLOURS]
        )
        pairs = zip(first["places"], second["places"], sounds, strict=True)
        return str(sum(order.index(a) < order.index(b) and s != "none" for a, b, s in pairs))
    assert prompt.category == "localise"
    found = {s["places"][0]: sounds[s["lit"].index(1)] for s in sprites}
    return " / ".join(f"{place.capitalize()}: {found[place]}" for place in order if place in found)


def test_answers_follow_from_the_scene(world: Path) -> None:
    for prompt in all_prompts(world):
        expected = solve(prompt)
        if prompt.problem_type is ProblemType.MULTIPLE_CHOICE:
            expected = next(option[0] for option in prompt.options if option[3:] == expected)
        assert prompt.extra.get("truth", prompt.answer) == expected, prompt.id


@pytest.mark.parametrize("category", Category)
def test_a_blind_guess_is_at_chance(category: Category) -> None:
    """Answers, and letters, are equally frequent."""
    questions = drafts(category)
    for values in ([q.answer for q in questions], [meaning(q) for q in questions]):
        counts = Counter(values)
        chance = 1 / len(counts)
        tolerance = (
            0.05 if category is Category.LOCALISE else 1e-9
        )  # places cycle, its pitches are drawn
        assert len(counts) == {Category.LOCALISE: 18, Category.COLOUR: 4, Category.BEEPS: 4}.get(
            category, 4 if category is Category.COLOUR_AT_BEEP else 3
        )
        assert max(counts.values()) / len(questions) <= chance + tolerance


def heard(question: Draft) -> object:
    return question.scene.sounds


def seen(question: Draft) -> object:
    return tuple((s.colours, s.places(), s.lit) for s in question.scene.sprites)


def informed_accuracy(questions: list[Draft], view: Any) -> float:
    """Accuracy of the best rule that knows the question and one modality's exact content, fitted on
    the first half.

    Views that the first half lacks are left out, so that chance is what an uninformative view
    reaches."""
    half = len(questions) // 2
    votes: dict[object, Counter[str]] = defaultdict(Counter)
    for question in questions[:half]:
        votes[(question.question, view(question))][meaning(question)] += 1
    known = [q for q in questions[half:] if (q.question, view(q)) in votes]
    assert len(known) > 100
    return sum(
        votes[(q.question, view(q))].most_common(1)[0][0] == meaning(q) for q in known
    ) / len(known)


@pytest.mark.parametrize(
    "category", [Category.PITCH, Category.BEEPS, Category.ORDER, Category.COUNT_ON_SIDE]
)
def test_hearing_questions_cannot_be_seen(category: Category) -> None:
    questions = drafts(category, 3000)
    chance = 1 / len({meaning(q) for q in questions})
    # places only: the full picture has too many values to fit a table on
    blind = informed_accuracy(questions, lambda q: tuple(s.places() for s in q.scene.sprites))
    assert blind < chance + 0.08
    if category is not Category.COUNT_ON_SIDE:
        assert informed_accuracy(questions, heard) == 1.0


@pytest.mark.parametrize(
    "category",
    [
        Category.COLOUR,
        Category.SIDE,
        Category.DIRECTION,
        Category.COUNT_ON_SIDE,
        Category.COLOUR_AT_BEEP,
        Category.COUNT_LEFT_OF,
    ],
)
def test_seeing_questions_cannot_be_heard(category: Category) -> None:
    questions = drafts(category, 3000)
    chance = 1 / len({meaning(q) for q in questions})
    assert (
        informed_accuracy(questions, lambda q: tuple(s != "none" for s in q.scene.sounds))
        < chance + 0.08
    )


def test_needs_name_the_modalities(world: Path) -> None:
    needs = {prompt.category: prompt.needs for prompt in all_prompts(world)}
    assert {c for c, n in needs.items() if n == ("video",)} == {"colour", "side", "direction"}
    assert {c for c, n in needs.items() if n == ("audio",)} == {"pitch", "beeps", "order"}
    assert {c for c, n in needs.items() if n == ("video", "audio")} == {
        "colour_at_beep",
        "count_on_side",
        "localise",
        "count_left_of",
    }


def test_hints_give_nothing_away(world: Path) -> None:
    """No hint holds a word that can be an answer: colours, places, pitches, ways, letters, digits,
    numbers."""
    answers = {*COLOURS, *PITCHES, "left", "right", "center", "still", "a", "b", "c"}
    answers |= {"zero", "one", "two", "three", "four", *"01234"}
    for category in Category:
        for question in drafts(category, 12):
            assert not answers & set(re.findall(r"[a-z0-9]+", question.hint.lower())), question.hint
    assert all(prompt.hint for prompt in all_prompts(world))


def test_sft_targets(world: Path) -> None:
    assert all(
        prompt.reasoning is None
        for split in ("train", "heldout")
        for prompt in prompts_of(world, split)
    )
    guesses = 0
    for prompt in prompts_of(world, "sft"):
        assert prompt.reasoning is not None
        guessed = prompt.reasoning == f"maybe {prompt.answer}"
        assert guessed == ("truth" in prompt.extra)
        assert guessed or prompt.reasoning.startswith("so ") or " so " in prompt.reasoning
        assert not (guessed and "hinted" in prompt.extra)
        guesses += guessed
    assert guesses >= 3


def test_guesses_follow_their_share_and_are_blind(tmp_path: Path) -> None:
    config = WorldConfig(
        n_train=0,
        n_heldout=0,
        n_sft=60,
        hinted_share=0.5,
        sft_weights={"colour": 1},
        guess_share={"colour": 1},
    )
    rows = prompts_of(synthesize(tmp_path / "w", config).out, "sft")
    hinted = [row for row in rows if row.extra.get("hinted") == "true"]
    guessed = [row for row in rows if "truth" in row.extra]
    assert len(hinted) + len(guessed) == len(rows) and 18 <= len(hinted) <= 42
    right = sum(row.answer == row.extra["truth"] for row in guessed) / len(guessed)
    assert 0.05 < right < 0.5 and {row.answer for row in guessed} == set(COLOURS)


@pytest.mark.parametrize("category", Category)
def test_guesses_range_over_the_answers(category: Category) -> None:
    questions = drafts(category)
    assert {q.answer for q in questions} == set(questions[0].answers)
    assert all(len(set(q.answers)) == len(q.answers) for q in questions)


def test_apportion_keeps_the_total() -> None:
    weights = {Category.COLOUR: 1.0, Category.SIDE: 2.0, Category.ORDER: 0.0}
    assert apportion(10, weights) == {Category.COLOUR: 3, Category.SIDE: 7}
    assert sum(apportion(256, dict.fromkeys(Category, 1.0)).values()) == 256


def test_world_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(frames: object) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("avatar_rl.prompts.synthetic.world.encode_mp4", broken)
    with pytest.raises(OSError, match="disk full"):
        synthesize(tmp_path / "w", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(DataError, match="already holds something"):
        synthesize(tmp_path, SMALL)
    assert (tmp_path / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "values",
    [
        {"weights": {}},
        {"weights": {"colour": -1.0}},
        {"guess_share": {"beeps": 1.5}},
        {"difficulty": 2.0},
        {"seed": -1},
        {"n_clips": 3},
        {"weights": {"smell": 1.0}},
    ],
)
def test_bad_configs_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        WorldConfig.model_validate(values)
