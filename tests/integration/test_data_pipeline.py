"""`avatar data score | classify | filter | balance` (docs/method.md 2.4), with a rule for a scorer
and known truth."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from avatar_rl.cluster.annotation.categories import CATEGORIES, classify_dataset, read_categories
from avatar_rl.cluster.annotation.funnel import (
    Thresholds,
    balance_dataset,
    filter_dataset,
    report_of,
)
from avatar_rl.cluster.annotation.scores import KEYS, score_dataset, scores_of
from avatar_rl.cluster.cli import main
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.prompts.config import DataConfig
from tests.unit.test_hint_generation import says
from tests.unit.test_rewards_judge_server import Reply, judge_server

NAMES = list(CATEGORIES)[:5]
BAD = ("I would rather not.", '{"video_dependency": 11}', "", '{"video_dependency": "high"}')


def truth(number: int) -> dict[str, int]:
    """Scores of a sample, by its number."""
    return {
        "video_dependency": 10 if number % 3 else 5,
        "audio_dependency": 10 if number % 4 else 2,
        "question_logic": 7 + number % 4,
        "answer_accuracy": 10 if number % 5 else 9,
        "composite": 6 + number % 5,
    }


def category(number: int) -> str:
    """Half of all in one category, one in 100 in none, five in a small one."""
    if number % 100 == 7:
        return "none"
    if number < 5:
        return NAMES[4]
    return NAMES[0] if number % 2 else NAMES[1 + number % 3]


def dataset(folder: Path, samples: int) -> Path:
    file = folder / "samples.jsonl"
    row = {"problem_type": "free_form", "answer": "yes"}
    rows = [row | {"id": f"s{i}", "question": f"Question {i}?"} for i in range(samples)]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


class Rule:
    """A scorer and classifier that knows the truth, and replies badly in ``bad`` of all cases."""

    def __init__(self, bad: float) -> None:
        self.bad, self.random = bad, random.Random(1)

    def serve(self) -> Any:
        rule = self

        def script(n: int) -> Reply:
            request = server_of[0].requests[n]
            question = json.dumps(request["messages"])
            number = int(question.split("Question ")[1].split("?")[0])
            if rule.random.random() < rule.bad:
                return says(rule.random.choice(BAD))
            if "The categories are" in question:
                return says(category(number))
            return says(f"<think>hm</think>{json.dumps(truth(number))}")

        server_of: list[Any] = []
        context = judge_server(script)

        class Serving:
            def __enter__(self) -> EndpointConfig:
                server_of.append(context.__enter__())
                return EndpointConfig.model_validate(
                    {"base_url": server_of[0].url, "model": "judge", "concurrency": 4}
                    | {"attempts": 2}
                )

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)

        return Serving()


def all_of(step: Any, file: Path, out: Path, endpoint: EndpointConfig) -> int:
    """Run a step until nothing is left open; how often it was run."""
    for runs in range(1, 12):
        report = step(file, out, endpoint, DataConfig(), progress=lambda done, total: None)
        if not report.counts["failed"]:
            return runs
    raise AssertionError("samples stay open")


def test_the_funnel_of_a_thousand_samples_with_bad_replies(tmp_path: Path) -> None:
    """None is lost and none is scored twice; every count is that of the known truth."""
    samples = 1000
    file = dataset(tmp_path, samples)
    scored, classified = tmp_path / "scored.jsonl", tmp_path / "classified.jsonl"
    with Rule(0.3).serve() as endpoint:
        assert all_of(score_dataset, file, scored, endpoint) > 1
        filter_dataset(scored, tmp_path / "kept.jsonl", Thresholds())
        assert all_of(classify_dataset, tmp_path / "kept.jsonl", classified, endpoint) >= 1
    rows = [json.loads(line) for line in scored.read_text().splitlines()]
    assert Counter(row["id"] for row in rows) == Counter(f"s{i}" for i in range(samples))
    for row in rows:
        expected = truth(int(row["id"][1:]))
        assert row["extra"]["scores"] == {KEYS[key]: value for key, value in expected.items()}

    good = [
        i
        for i in range(samples)
        if truth(i)["answer_accuracy"] == 10
        and truth(i)["question_logic"] >= 8
        and truth(i)["composite"] >= 7
    ]
    kept = [json.loads(line) for line in classified.read_text().splitlines()]
    assert sorted(int(row["id"][1:]) for row in kept) == good
    assert all(row["extra"]["taxonomy"] == category(int(row["id"][1:])) for row in kept)

    balance_dataset(classified, tmp_path / "balanced.jsonl", smallest=10, cap=1.5)
    balanced = [json.loads(line) for line in (tmp_path / "balanced.jsonl").read_text().splitlines()]
    sizes = Counter(row["extra"]["taxonomy"] for row in balanced)
    before = Counter(category(i) for i in good)
    (_, largest), (_, second) = sizes.most_common(2)
    assert "none" not in sizes and NAMES[4] not in sizes and largest == int(1.5 * second)
    others = [name for name in sizes if name != NAMES[0]]
    assert all(sizes[name] == before[name] for name in others)
    cut = [row for row in balanced if row["extra"]["taxonomy"] == NAMES[0]]
    both = [i for i in good if category(i) == NAMES[0] and i % 3 and i % 4]
    full = sum(r["extra"]["scores"]["video"] == r["extra"]["scores"]["audio"] == 10 for r in cut)
    assert full == min(len(both), len(cut))

    steps = json.loads(report_of(tmp_path / "balanced.jsonl").read_text())
    assert [step["step"] for step in steps] == ["score", "filter", "classify", "balance"]
    assert steps[0]["left"] == samples and steps[1]["left"] == len(good) == steps[2]["left"]
    assert steps[1]["dropped"]["answer below 10"] == samples // 5
    assert steps[3]["left"] == len(balanced)


def test_the_fusion_subset_needs_picture_and_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dataset(tmp_path, 60)
    with Rule(0.0).serve() as endpoint:
        all_of(score_dataset, file, tmp_path / "scored.jsonl", endpoint)
    out = tmp_path / "fusion.jsonl"
    words = ["data", "filter", str(tmp_path / "scored.jsonl"), "--out", str(out), "--fusion"]
    assert main(words) == 0
    rows = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert rows and all(int(name[1:]) % 3 and int(name[1:]) % 4 for name in rows)
    assert "12 video below 7" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "funnel", str(out)]) == 0 and "score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("fine", "no video_dependency"),
        (json.dumps(truth(1) | {"composite": 11}), "composite is 11"),
        (json.dumps(truth(1) | {"composite": 7.5}), r"composite is 7\.5"),
        (json.dumps(truth(1) | {"composite": True}), "composite is True"),
        (json.dumps(truth(1) | {"composite": "8"}), "composite is '8'"),
    ],
)
def test_a_reply_without_five_whole_scores_is_none(reply: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scores_of(reply)
    assert scores_of(f"Sure: {json.dumps(truth(1))} done")["composite"] == 7


def test_steps_out_of_order_are_named(tmp_path: Path) -> None:
    file, out = dataset(tmp_path, 3), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"'s0' has no scores: run `avatar data score` first"):
        filter_dataset(file, out, Thresholds())
    with pytest.raises(DataError, match=r"'s0' has no category: run `avatar data classify`"):
        balance_dataset(file, out)
    with pytest.raises(ConfigError, match="is the dataset itself"):
        filter_dataset(file, file, Thresholds())
    assert main(["data", "funnel", str(file)]) == 1


def test_a_taxonomy_of_ones_own(tmp_path: Path) -> None:
    assert len(read_categories(None)) == 15
    file = tmp_path / "mine.txt"
    file.write_text("# ours\ncooking: food\nsports: balls\n")
    assert read_categories(file) == {"cooking": "food", "sports": "balls"}
    for text, message in (
        ("cooking food\n", r"mine\.txt:1"),
        ("a: b\na: c\n", r"mine\.txt:2"),
        ("none: b\nb: c\n", r"mine\.txt:1"),
        ("a: b\n", "at least two"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_categories(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_categories(tmp_path / "absent.txt")


def test_a_balance_that_keeps_nothing_says_why(tmp_path: Path) -> None:
    file = dataset(tmp_path, 8)
    with Rule(0.0).serve() as endpoint:
        all_of(classify_dataset, file, tmp_path / "c.jsonl", endpoint)
    with pytest.raises(ConfigError, match="no category has 10 samples"):
        balance_dataset(tmp_path / "c.jsonl", tmp_path / "b.jsonl")
