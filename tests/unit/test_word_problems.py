"""Word problems of `make bench NAME=real_text`: worked ones are right, guesses are wrong, no sum is
in two files."""

from __future__ import annotations

import re
from pathlib import Path

from avatar_rl.common.files import read_jsonl
from benchmarks.word_problems import write_problems

COUNTS = {"heldout": 60, "sft": 400}


def test_worked_problems_are_right_and_guesses_miss(tmp_path: Path) -> None:
    files = write_problems(tmp_path, COUNTS, guessed={"sft": 0.65})
    rows = {name: list(read_jsonl(Path(file))) for name, file in files.items()}
    guesses = [row for row in rows["sft"] if row["reasoning"] == "I guess."]
    assert 0.58 < len(guesses) / COUNTS["sft"] < 0.72
    assert all(row["reasoning"] != "I guess." for row in rows["heldout"])
    plain = {row["id"]: row for row in read_jsonl(Path(write_problems(tmp_path, COUNTS)["sft"]))}
    for row in rows["sft"]:
        truth = plain[row["id"]]
        assert row["question"] == truth["question"]
        assert (row["answer"] != truth["answer"]) == (row["reasoning"] == "I guess.")
        last = re.search(r"= (-?\d+)\.$", truth["reasoning"])
        assert last is not None and last[1] == truth["answer"]


def test_no_sum_is_in_two_files(tmp_path: Path) -> None:
    files = write_problems(tmp_path, COUNTS)
    sums = [row["reasoning"] for file in files.values() for row in read_jsonl(Path(file))]
    assert len(sums) == len(set(sums)) == sum(COUNTS.values())
