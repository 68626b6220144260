"""Validation of whole datasets: every fault is reported with its line, none stops the rest."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from avatar_rl.prompts.config import DataConfig, TemplateConfig
from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.prompts.validate import hint_leaks, render, validate
from tests.unit.media_files import tone, write_video, write_wav

ROW: dict[str, Any] = {
    "question": "How many beeps?",
    "answer": "3",
    "problem_type": "numerical",
    "media": {
        "items": [
            {"kind": "video", "uri": "clip.mp4", "frames": 2},
            {"kind": "audio", "uri": "tone.wav"},
        ]
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.mp4", [(200, 30, 10)] * 4, sound=tone(440, 0.5, 48_000))
    write_wav(tmp_path / "tone.wav", tone(440, 0.5, 16_000), 16_000)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(2_000))
    (tmp_path / "empty.wav").touch()
    return tmp_path


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def items(*media: tuple[str, str]) -> dict[str, Any]:
    return {"items": [{"kind": kind, "uri": uri} for kind, uri in media]}


def faulty(folder: Path) -> Path:
    return write(
        folder,
        ROW | {"id": "good"},
        "{not json",
        ROW | {"id": "good"},
        ROW | {"id": "gone", "media": items(("video", "gone.mp4"), ("audio", "empty.wav"))},
        ROW | {"id": "noisy", "media": items(("video", "noise.mp4"))},
        ROW | {"id": "leaky", "hint": "Count to 3."},
        ROW | {"id": "deaf", "needs": ["audio"], "media": items(("video", "clip.mp4"))},
    )


def test_a_sound_dataset_has_no_problems(folder: Path) -> None:
    image = {"id": "t", "question": "2 + 2?", "answer": "four", "problem_type": "free-form"}
    seen: list[int] = []
    report = validate(
        write(folder, ROW | {"id": "a"}, image | {"media": None}),
        DataConfig(),
        decode=True,
        progress=seen.append,
    )
    assert report.ok and report.problems == [] and seen == [1, 2]
    assert (report.rows, report.layout, report.files) == (2, "native", 2)
    assert dict(report.types) == {"numerical": 1, "free_form": 1}
    assert dict(report.modalities) == {"video+audio": 1, "text": 1}


def test_every_fault_is_reported_with_its_line(folder: Path) -> None:
    path = faulty(folder)
    report = validate(path, DataConfig(), decode=True)
    found = [(int(p.where.rsplit(":", 1)[1]), p.id, p.what, p.remedy) for p in report.problems]
    assert [(line, prompt) for line, prompt, _, _ in found] == [
        (2, ""),
        (3, ""),
        (4, "gone"),
        (4, "gone"),
        (5, "noisy"),
        (6, "leaky"),
        (7, "deaf"),
    ]
    words = [
        "malformed JSON",
        "'good'",
        "gone.mp4: no such file",
        "empty.wav: is empty",
        "noise.mp4: cannot be decoded",
        "gives the answer away",
        "needs audio",
    ]
    for (_, _, what, remedy), word in zip(found, words, strict=True):
        assert word in what and remedy
    assert report.rows == 7 and sum(report.types.values()) == 5


def test_without_decoding_only_presence_is_checked(folder: Path) -> None:
    report = validate(faulty(folder), DataConfig(), decode=False)
    assert "noisy" not in {problem.id for problem in report.problems}
    assert sum(problem.id == "gone" for problem in report.problems) == 2


def test_a_dataset_that_cannot_be_opened_is_one_problem(tmp_path: Path) -> None:
    report = validate(tmp_path / "absent.jsonl", DataConfig(), decode=True)
    assert [problem.what for problem in report.problems] == ["no such dataset"]
    (tmp_path / "empty.jsonl").touch()
    assert not validate(tmp_path / "empty.jsonl", DataConfig(), decode=True).ok


def test_the_table_shows_where_what_and_remedy(folder: Path) -> None:
    report = validate(faulty(folder), DataConfig(), decode=True)
    console = Console(file=io.StringIO(), width=300)
    render(report, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert (
        "7 problems" in text
        and "data.jsonl:6" in text
        and "drop the hint" in text
        and "numerical 5" in text
    )


@pytest.mark.parametrize(
    ("kind", "answer", "options", "hint", "leaks"),
    [
        ("numerical", "3", (), "Count the beeps, then compare with 3.", True),
        ("numerical", "3", (), "Watch from 13 s on.", False),
        ("free_form", "a red disc", (), "Look for A RED DISC first.", True),
        ("free_form", "disc", (), "discover what moves", False),
        ("multiple_choice", "A", ("A. red", "B. green"), "Find a moving shape.", False),
        ("multiple_choice", "A", ("A. red", "B. green"), "The answer is A.", True),
        ("multiple_choice", "B", ("A. red", "B. green"), "Compare (B) with the rest.", True),
        ("multiple_choice", "B", ("(A) red", "(B) green"), "Watch the green shape.", True),
        ("multiple_choice", "B", ("A. red", "B. green"), "Decide between red and green.", False),
    ],
)
def test_hints_that_give_the_answer_away(
    kind: str, answer: str, options: tuple[str, ...], hint: str, leaks: bool
) -> None:
    prompt = Prompt(
        id="p",
        question="?",
        answer=answer,
        problem_type=ProblemType(kind),
        options=options,
        hint=hint,
    )
    assert hint_leaks(prompt) is leaks


def text_model(folder: Path) -> Path:
    """A model folder whose tokenizer counts characters (ASCII bytes)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Qwen2Config, Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    wrapped = Qwen2Tokenizer(tokenizer_object=tokenizer)
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
    wrapped.save_pretrained(folder)
    Qwen2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    return folder


def test_prompts_longer_than_the_context_are_found(tmp_path: Path) -> None:
    row = {"answer": "x", "problem_type": "free_form"}
    path = write(
        tmp_path,
        row | {"id": "short", "question": "x" * 15},  # 20 tokens with "user:"
        row | {"id": "hinted", "question": "x" * 15, "hint": "look"},  # the hint counts, too
        row | {"id": "long", "question": "x" * 40},
    )
    report = validate(
        path,
        DataConfig(),
        decode=False,
        processor_path=text_model(tmp_path / "model"),
        template=TemplateConfig(max_prompt_tokens=20),
    )
    assert [problem.id for problem in report.problems] == ["hinted", "long"]
    assert "45 tokens" in report.problems[1].what and report.longest == 20
