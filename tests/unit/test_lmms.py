"""Tasks of lmms-eval by name, on a small package in its layout."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avatar_rl.cluster.benchmarks import lmms
from avatar_rl.cluster.benchmarks.answers import AnswerStore
from avatar_rl.cluster.benchmarks.convert import check_kinds, read_questions, to_prompt
from avatar_rl.cluster.benchmarks.sets import benchmark_set
from avatar_rl.common.errors import ConfigError, InputError
from tests.unit.published_sets import PNG

UTILS = """
import os
import lmms_eval.tasks._task_utils.letters as letters
HOME = os.path.join(os.environ["HF_HOME"], "clips")

def visual(doc):
    return [doc["image"].convert("RGB")] if doc.get("image") else [os.path.join(HOME, doc["clip"])]

def text(doc, lmms_eval_specific_kwargs=None):
    return lmms_eval_specific_kwargs["pre"] + doc["question"]

def only(dataset):
    return dataset.filter(lambda row: row["question"] != "skip me")

def score(doc, results):
    right = float(letters.first(results[0]) == doc["answer"])
    return {"toy_acc": {"question_id": doc["question"], "score": right}, "exact": right}

def percent(results):
    return 100 * sum(one["score"] for one in results) / len(results)

def bare(doc, results):
    return {"toy_acc": {"text": results[0]}}
"""
DEFAULT = """
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.score
metric_list:
  - {metric: toy_acc, aggregation: !function utils.percent, higher_is_better: true}
  - {metric: exact, aggregation: mean, higher_is_better: true}
lmms_eval_specific_kwargs:
  default: {pre: "Look. "}
"""
TASKS = {
    "toy.yaml": "dataset_path: some/toy\ntask: toy\ntest_split: test\ninclude: _default_yaml\n"
    "process_docs: !function utils.only\n",
    "toy_ll.yaml": "task: toy_ll\ntest_split: test\noutput_type: loglikelihood\n"
    "include: _default_yaml\n",
    "toy_bare.yaml": "task: toy_bare\ntest_split: test\ninclude: _default_yaml\n"
    "process_results: !function utils.bare\n",
    "toy_needs.yaml": "task: toy_needs\ntest_split: test\ninclude: _default_yaml\n"
    "doc_to_text: !function wants.text\n",
    "toy_group.yaml": "group: toys\ntask: [toy, toy_bare]\n",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package lmms_eval with a few tasks."""
    package = tmp_path / "site" / "lmms_eval"
    (package / "tasks/toy").mkdir(parents=True)
    (package / "tasks/_task_utils").mkdir()
    for folder in (package, package / "tasks", package / "tasks/_task_utils"):
        (folder / "__init__.py").touch()
    (package / "tasks/_task_utils/letters.py").write_text("def first(t): return t.strip()[:1]\n")
    (package / "tasks/toy/utils.py").write_text(UTILS)
    (package / "tasks/toy/wants.py").write_text("import a_package_nobody_has\n")
    (package / "tasks/toy/_default_yaml").write_text(DEFAULT)
    for name, content in TASKS.items():
        (package / "tasks/toy" / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    lmms._task_files.cache_clear()
    yield package
    lmms._task_files.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
        del sys.modules[name]


def write_rows(root: Path) -> None:
    root.mkdir(parents=True)
    rows = [
        {"question": "Which? A or B", "answer": "B", "image": {"bytes": PNG, "path": "x.png"}},
        {"question": "skip me", "answer": "A", "image": {"bytes": PNG, "path": "y.png"}},
        {"question": "And this?", "answer": "A", "image": {"bytes": PNG, "path": "z.png"}},
    ]
    table = pa.Table.from_pylist(rows)
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    for name in ("question", "answer"):
        features["info"]["features"][name] = {"dtype": "string", "_type": "Value"}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, root / "test-00000-of-00001.parquet")


def test_a_task_is_read_asked_and_scored_by_its_own_functions(
    installed: Path, tmp_path: Path
) -> None:
    one = benchmark_set("lmms:toy")
    write_rows(tmp_path / "sets" / one.name)
    questions, left_out = read_questions(one, tmp_path / "sets" / one.name, tmp_path / "media")
    assert [q.text for q in questions] == ["Look. Which? A or B", "Look. And this?"]
    assert left_out == 0 and [q.answer for q in questions] == ["B", "A"]
    assert all(Path(q.media[0].uri).suffix == ".png" for q in questions)
    prompt = to_prompt(one, questions[0], "official", hears=False)
    assert prompt.id == "lmms_toy/0" and prompt.question == "Look. Which? A or B"
    check_kinds(one, questions, {"image"}, tmp_path)
    with pytest.raises(ConfigError, match=r"question 0, holds image, and .* takes no image"):
        check_kinds(one, questions, {"audio"}, tmp_path)
    store = AnswerStore(tmp_path / "out", {"model": "m"})
    store.add("0", "<think>A?</think><answer>B</answer>", 5)
    store.add("1", "B", 1)
    assert one.marked_by is not None
    marked = store.marked(questions, one.marked_by)
    assert [(m.given, m.score) for m in marked] == [("B", 1.0), ("B", 0.0)]
    assert one.metric(marked) == {"accuracy": 0.5, "toy_acc": 50.0, "exact": 0.5}
    store.finish(marked, {})


def test_videos_of_a_task_lie_below_the_sets_folder(installed: Path, tmp_path: Path) -> None:
    one = benchmark_set("lmms:toy")
    root = tmp_path / "sets" / one.name
    root.mkdir(parents=True)
    (root / "test.jsonl").write_text('{"question": "Q", "answer": "A", "clip": "a.mp4"}\n')
    with pytest.raises(InputError, match=r"1 media files .*clips/a\.mp4"):
        read_questions(one, root, tmp_path / "media")
    (root / "clips").mkdir()
    (root / "clips/a.mp4").touch()
    one = benchmark_set("lmms:toy")  # HF_HOME is read when the task's file is run
    [question], _ = read_questions(one, root, tmp_path / "media")
    assert question.media[0].kind == "video" and "HF_HOME" not in lmms.os.environ


def test_tasks_that_cannot_be_read_are_refused_by_name(installed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no task 'tou': there are toy.* 4 tasks"):
        benchmark_set("lmms:tou")
    with pytest.raises(ConfigError, match="scores toy_ll by loglikelihood"):
        benchmark_set("lmms:toy_ll")
    with pytest.raises(ConfigError, match="has no task 'toys'"):
        benchmark_set("lmms:toys")
    write_rows(tmp_path / "rows")
    with pytest.raises(ConfigError, match="toy_needs needs the package a_package_nobody_has"):
        read_questions(benchmark_set("lmms:toy_needs"), tmp_path / "rows", tmp_path / "media")
    bare = benchmark_set("lmms:toy_bare")
    questions, _ = read_questions(bare, tmp_path / "rows", tmp_path / "media")
    assert bare.marked_by is not None
    with pytest.raises(ConfigError, match=r"toy_bare gives no score of a single question \(toy"):
        bare.marked_by(questions[0], "A")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/test.jsonl").write_text('{"ask": "Q"}\n')
    with pytest.raises(InputError, match=r"task toy_bare: text failed \(KeyError: 'question'\)"):
        read_questions(benchmark_set("lmms:toy_bare"), tmp_path / "other", tmp_path / "media")


def test_without_lmms_eval_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lmms._task_files.cache_clear()
    monkeypatch.setattr(lmms.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lmms-eval is not installed.*pip install --no-deps"):
        benchmark_set("lmms:mmstar")
