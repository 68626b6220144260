"""The rows of docs/papers.md are read as they stand."""

from __future__ import annotations

from pathlib import Path

from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import load_prompts
from avatar_rl.prompts.record import ProblemType, Prompt

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"


def read(folder: Path, row: str, config: DataConfig) -> Prompt:
    file = folder / "rows.jsonl"
    file.write_text(row + "\n")
    [prompt] = load_prompts(file, config)
    return prompt


def test_the_rows_of_each_dataset_become_prompts(tmp_path: Path) -> None:
    block = PAGE.read_text().partition("<!-- rows:")[2].split("```")[1]
    avatar, intent, avqa, omnivideo, maths = block.strip().splitlines()
    prompt = read(tmp_path, avatar, DataConfig())
    assert (prompt.answer, prompt.problem_type) == ("Left: phone", ProblemType.LOCALISATION)
    assert prompt.audio_caption == "A phone rings twice." and "audio_cues" not in prompt.extra
    assert prompt.hint == "Find what rings first."
    prompt = read(tmp_path, intent, DataConfig())
    assert (prompt.answer, prompt.media.items[0].kind) == ("A", "video")
    prompt = read(tmp_path, avqa, DataConfig())
    assert prompt.answer == "A" and [i.kind for i in prompt.media.items] == ["video", "audio"]
    choice = DataConfig(problem_type=ProblemType.MULTIPLE_CHOICE)
    prompt = read(tmp_path, omnivideo, choice)
    assert prompt.answer.startswith("A") and prompt.system == "Watch and listen."
    assert [item.kind for item in prompt.media.items] == ["video", "audio"]
    prompt = read(tmp_path, maths, DataConfig(problem_type=ProblemType.NUMERICAL))
    assert prompt.answer == "12" and prompt.media.items[0].kind == "image"
