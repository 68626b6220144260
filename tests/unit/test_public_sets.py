"""Public benchmarks: read as published, marked as published, refused where they are not whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import save_file

from avatar_rl.cluster.benchmarks.answers import AnswerStore, read_answers
from avatar_rl.cluster.benchmarks.convert import lacking, read_questions, to_prompt, write_prompts
from avatar_rl.cluster.benchmarks.intervals import Groups, bootstrap, paired, wilson
from avatar_rl.cluster.benchmarks.marks import (
    final_part,
    gold_fault,
    letter_in,
    mark,
    relative_accuracy,
)
from avatar_rl.cluster.benchmarks.metrics import accuracy, change, interval_of
from avatar_rl.cluster.benchmarks.record import Kind, Marked, Question
from avatar_rl.cluster.benchmarks.result import Asking, SetToAsk, by_length, finish
from avatar_rl.cluster.benchmarks.sets import benchmark_set, benchmark_sets
from avatar_rl.cluster.benchmarks.table import DAGGER, comparison
from avatar_rl.cluster.commands import doctor_inputs
from avatar_rl.cluster.commands.public_sets import asked_with
from avatar_rl.cluster.config import EvaluationConfig, RunConfig
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.public_sets import (
    PublicQuestions,
    PublicSetRounds,
    evenly,
    public_questions,
)
from avatar_rl.common.errors import ConfigError, DataError, InputError
from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.config import DataConfig, MediaConfig
from avatar_rl.prompts.datasets import load_prompts
from avatar_rl.prompts.media.loader import DecodedVideo, MediaLoader
from avatar_rl.prompts.record import MediaItem
from tests.published_round_trip import faults
from tests.unit.published_sets import ABCD, PUBLISHED, write_json


def test_all_22_sets_of_the_papers_are_there() -> None:
    assert benchmark_sets().keys() == PUBLISHED.keys() and len(PUBLISHED) == 22
    for one in benchmark_sets().values():
        assert one.paper.startswith("https://arxiv.org/abs/") and one.layout.startswith("https://")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_set_is_read_and_scored_as_published(name: str, tmp_path: Path) -> None:
    assert faults(benchmark_set(name), PUBLISHED[name], tmp_path) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"answers": "DA"}, "gold answers"),
        ({"figures": {"accuracy": 0.6}}, r"figure accuracy: 0\.5 for 0\.6"),
        ({"unread": ()}, "fields: {'content_parent_category'}"),
        ({"says": "Select two"}, "the authors' words"),
        ({"options": [4, 5]}, "options"),
        ({"media": ["v1_video.mp4", "v2.mp4"]}, "media"),
    ],
)
def test_a_set_that_is_not_as_published_is_not_ready(
    change: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    published = replace(PUBLISHED["dailyomni"], **change)
    [found] = faults(benchmark_set("dailyomni"), published, tmp_path)
    assert re.match(fault, found)


def test_a_set_without_an_address_or_with_another_metric_is_not_ready(tmp_path: Path) -> None:
    one = replace(benchmark_set("mvbench"), layout="", means=accuracy)
    found = faults(one, PUBLISHED["mvbench"], tmp_path)
    assert found[0].startswith("an address") and found[1].startswith("figure accuracy: 0.75")


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("wording", ["recipe", "official"])
def test_questions_become_rows_that_our_reader_takes(
    name: str, wording: str, tmp_path: Path
) -> None:
    one = benchmark_set(name)
    PUBLISHED[name].write(root := tmp_path / name)
    questions, _ = read_questions(one, root, tmp_path / "media")
    prompts = [to_prompt(one, q, wording, hears=False) for q in questions]  # type: ignore[arg-type]
    assert write_prompts(tmp_path / "q.jsonl", iter(prompts)) == len(questions)
    assert load_prompts(tmp_path / "q.jsonl", DataConfig()) == prompts
    assert all(p.options == () or wording == "recipe" for p in prompts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_without_the_file_says_which_it_wanted(name: str, tmp_path: Path) -> None:
    (tmp_path / "readme.txt").touch()
    with pytest.raises(InputError, match=r"holds no .*(json|parquet).*readme\.txt.*download"):
        read_questions(benchmark_set(name), tmp_path, tmp_path / "media")


#: The pictures of the others are stored in their rows.
WITH_FILES = [name for name, one in PUBLISHED.items() if any(one.media)]


@pytest.mark.parametrize("name", WITH_FILES)
def test_missing_media_are_named_before_anything_is_asked(name: str, tmp_path: Path) -> None:
    PUBLISHED[name].write(root := tmp_path / name)
    media = {b"stand-in", *([p.read_bytes() for p in root.rglob("*.jpg")])}
    files = [p for p in root.rglob("*") if p.is_file() and p.read_bytes() in media]
    for path in files:
        path.unlink()
    with pytest.raises(InputError, match=r"media files of .*\.(mp4|mp3|png|wav).*--skip-missing"):
        read_questions(benchmark_set(name), root, tmp_path / "media")
    with pytest.raises(InputError, match="no question is left"):
        read_questions(benchmark_set(name), root, tmp_path / "media", skip=True)


def test_a_row_of_another_layout_names_what_it_lacks(tmp_path: Path) -> None:
    write_json(tmp_path / "qa.json", [{"question": "When?", "answer": "C"}])
    with pytest.raises(InputError, match=r"qa\.json:1.*no 'Choice' \(there is answer, question\)"):
        read_questions(benchmark_set("dailyomni"), tmp_path, tmp_path / "media")


def test_gold_answers_that_nothing_can_reach_are_named_together(tmp_path: Path) -> None:
    PUBLISHED["dailyomni"].write(tmp_path)
    rows = json.loads((tmp_path / "qa.json").read_text())
    bad = [rows[0] | {"Answer": f"E{n}"} for n in range(12)]
    lines = ",\n".join(map(json.dumps, [rows[0], *bad]))
    (tmp_path / "qa.json").write_text(f"[{lines}]")
    with pytest.raises(InputError, match="12 gold answers that no completion can reach") as error:
        read_questions(benchmark_set("dailyomni"), tmp_path, tmp_path / "media")
    said = str(error.value)
    assert "qa.json:2, question v1-1: the gold answer 'E0' is none of the options ['A. red'" in said
    assert "'E9'" in said and "'E10'" not in said and "and 2 more" in said
    assert "correct these rows" in said


@pytest.mark.parametrize(
    ("name", "row", "field", "change", "fault"),
    [
        ("av_counting", 0, "answer", "many", "'many' is no number"),
        ("av_counting", 0, "answer", "nan", "'nan' is no number"),
        ("vsibench", 0, "ground_truth", "far", "'far' is no number"),
        ("omnibench", 0, "answer", "purple", "'purple' is none of the options"),
        ("intentbench", 1, "solution", "<answer>A,Z</answer>", "'A,Z' is none of the options"),
        (
            "intentbench",
            2,
            "solution",
            "<answer>Perhaps</answer>",
            "'Perhaps' is neither yes nor no",
        ),
    ],
)
def test_a_gold_answer_is_checked_by_its_kind(
    name: str, row: int, field: str, change: str, fault: str, tmp_path: Path
) -> None:
    PUBLISHED[name].write(tmp_path)
    [path] = tmp_path.rglob("*.json*")
    lines = path.suffix == ".jsonl"
    text = path.read_text()
    rows = [json.loads(x) for x in text.splitlines()] if lines else json.loads(text)
    rows[row][field] = change
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=0))
    with pytest.raises(InputError, match=rf"1 gold answers .*question \w+: .*{fault}"):
        read_questions(benchmark_set(name), tmp_path, tmp_path / "media")


@pytest.mark.parametrize(
    ("answer", "kind", "decimals", "reachable"),
    [
        ("1.2", "number", 1, True),
        ("1.25", "number", 1, False),  # every number is rounded to one decimal before
        ("14", "number", 0, True),
        ("x + 1", "number", None, True),  # compared as words
        ("[1, 2]", "text", None, True),
        ("...", "text", None, False),  # nothing is left of it in normal form
        ("0", "relative", None, True),
        ("inf", "relative", None, False),
        ("1000000", "count", None, True),
    ],
)
def test_what_a_completion_can_reach(
    answer: str, kind: Kind, decimals: int | None, reachable: bool
) -> None:
    asked = Question("1", "?", answer, kind, decimals=decimals)
    assert (gold_fault(asked) is None) == reachable


def test_questions_without_their_media_can_be_left_out(tmp_path: Path) -> None:
    PUBLISHED["omnibench"].write(tmp_path)
    (tmp_path / "mm_data/image/b.png").unlink()
    questions, left_out = read_questions(
        benchmark_set("omnibench"), tmp_path, tmp_path / "media", skip=True
    )
    assert [q.id for q in questions] == ["0"] and left_out == 1


def test_a_folder_of_frames_is_seen_as_it_is(tmp_path: Path) -> None:
    """MVBench's episodic_reasoning, 3 frames a second from 00001.jpg on, 1.5 s to 3 s."""
    PUBLISHED["mvbench"].write(tmp_path)
    read = partial(read_questions, benchmark_set("mvbench"), tmp_path, tmp_path / "media")
    [item] = [q.media[0] for q in read()[0] if q.parts["task"] == "episodic_reasoning"]
    loader = MediaLoader(MediaConfig(), tmp_path)
    whole = loader.load(item.model_copy(update={"clip": None, "frames": 14}))
    assert isinstance(whole, DecodedVideo) and whole.duration == pytest.approx(5.0)
    cut = loader.load(item.model_copy(update={"frames": 4}))
    assert isinstance(cut, DecodedVideo)
    # Frame n is on the screen from (n - 1) / 3 s on, and its grey is 10 n.
    times = 1.5 + (np.arange(4) + 0.5) * 1.5 / 4
    greys = cut.frames.mean(axis=(1, 2, 3))
    assert greys == pytest.approx(10 * (np.floor(times * 3) + 1), abs=1)
    before = Path(item.uri).stat().st_mtime_ns
    assert read()[0] and Path(item.uri).stat().st_mtime_ns == before  # written once
    shutil.rmtree(tmp_path / "video/tvqa")
    with pytest.raises(InputError, match=r"1 media files .*tvqa/.*castle_s01_clip_07"):
        read()


def test_the_first_release_of_mvbench_is_read_too(tmp_path: Path) -> None:
    PUBLISHED["mvbench"].write(tmp_path)
    star = tmp_path / "video/star"
    (star / "Charades_segment").rename(star / "Charades_v1_480")
    questions, _ = read_questions(benchmark_set("mvbench"), tmp_path, tmp_path / "media")
    assert any("Charades_v1_480" in q.media[0].uri for q in questions)


def test_frames_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    PUBLISHED["mvbench"].write(tmp_path)
    frames = tmp_path / "video/tvqa/frames_fps3_hq/castle_s01_clip_07"
    (frames / "00001.jpg").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"00001\.jpg.*is no picture.*copy it again"):
        read_questions(benchmark_set("mvbench"), tmp_path, tmp_path / "media")
    Image.new("RGB", (4, 4)).save(frames / "00002.png")
    with pytest.raises(InputError, match="both JPEG and PNG"):
        read_questions(benchmark_set("mvbench"), tmp_path, tmp_path / "media")


def test_a_set_is_not_for_a_model_without_its_sense() -> None:
    assert lacking(benchmark_set("worldsense"), {"video", "image"}) == ["audio"]
    assert lacking(benchmark_set("mvbench"), {"video", "image"}) == []


def run_config(sets: Path, cache: Path, **over: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"train": "train.jsonl", **over},
            "output": {"cache": str(cache)},
            "evaluation": {"benchmarks": {"names": ["dailyomni"], "sets": str(sets), "limit": 1}},
        }
    )


def test_the_sets_of_a_run_are_read_before_it_starts(tmp_path: Path) -> None:
    PUBLISHED["dailyomni"].write(tmp_path / "sets/dailyomni")
    model = tmp_path / "model"
    model.mkdir()
    senses = {"vision_config": {}, "audio_config": {}}
    (model / "config.json").write_text(json.dumps(senses))
    config = run_config(tmp_path / "sets", tmp_path / "cache")
    public = public_questions(config, model)
    assert public is not None and public.ids[0].startswith("dailyomni/") and len(public.ids) == 1
    [prompt] = load_prompts(public.path, config.data.reader)
    assert prompt.id == public.ids[0]
    assert public_questions(config, model) == public  # a resumed run finds the same file
    (model / "config.json").write_text(json.dumps({"vision_config": {}}))
    with pytest.raises(ConfigError, match=r"dailyomni is about .* takes no audio.*leave it out"):
        public_questions(config, model)
    limited = run_config(tmp_path / "sets", tmp_path / "cache", reader={"limit": 5})
    with pytest.raises(ConfigError, match=r"needs data\.reader\.format auto and no"):
        public_questions(limited, model)
    with pytest.raises(ValidationError, match="names needs `sets: FOLDER`"):
        RunConfig.model_validate(
            {"data": {"train": "x"}, "evaluation": {"benchmarks": {"names": ["mlvu"]}}}
        )


def test_the_doctor_names_sets_that_are_not_there(tmp_path: Path) -> None:
    def found(names: list[str]) -> list[tuple[str, str, str]]:
        sets = {"names": names, "sets": str(tmp_path)}
        config = RunConfig.model_validate(
            {"data": {"synthetic": {}}, "evaluation": {"benchmarks": sets}}
        )
        return [(one.subject, one.level, one.found) for one in doctor_inputs.files(config)]

    (tmp_path / "mlvu").mkdir()
    assert found(["mlvu"]) == []
    missing, unknown = found(["mvbench", "mvbnch"])
    assert missing == ("evaluation.benchmarks.sets", "fail", f"{tmp_path}/mvbench is missing")
    assert unknown[:2] == ("evaluation.benchmarks.names", "fail") and "mvbnch" in unknown[2]


def test_a_limit_takes_questions_from_the_whole_set() -> None:
    asked = [Question(str(n), "?", "A", "choice") for n in range(10)]
    assert [q.id for q in evenly(asked, 3)] == ["0", "3", "6"]
    assert evenly(asked, None) == asked and evenly(asked, 99) == asked


def test_an_unknown_set_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'omnibench'.*worldsense"):
        benchmark_set("Omni-Bench")


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("<think>B or C?</think><answer>C</answer>", "C"),
        ("<think>it is A</think>\n\nThe correct option is (B).", "B"),
        ("Looking at it, I first thought A. The final answer is: **D**", "D"),
        ("Therefore the result is $\\boxed{B}$", "B"),
        ("\\boxed{\\text{C}}", "C"),
        ("It shows something green.", "B"),
        ("A cat sits on B", "B"),
        ("It could be A or B.", None),
        ("red or green", None),
        ("", None),
        ("I do not know", None),
    ],
)
def test_the_choice_is_taken_out_of_a_completion(completion: str, letter: str | None) -> None:
    assert letter_in(final_part(completion), ABCD) == letter


def test_relative_accuracy_by_hand() -> None:
    assert relative_accuracy(2.0, 2.0) == 1.0
    assert relative_accuracy(3.0, 2.0) == 0.1  # off by half: within 0.5 alone
    assert relative_accuracy(2.1, 2.0) == 1.0  # off by 0.05
    assert relative_accuracy(None, 2.0) == relative_accuracy(9.0, 2.0) == 0.0
    assert relative_accuracy(0.0, 0.0) == 1.0 and relative_accuracy(1.0, 0.0) == 0.0


def test_the_interval_covers_the_truth() -> None:
    """Independent questions, graded scores and questions about a shared clip."""
    rng = np.random.default_rng(5)
    hits = []
    for seed in range(120):
        shared = rng.beta(3, 2, 30).repeat(4)
        for scores, truth, of in (
            ((rng.random(100) < 0.85).astype(float), 0.85, None),
            (rng.choice([0, 0.3, 0.7, 1], 80, p=[0.5, 0.2, 0.2, 0.1]), 0.3, None),
            ((rng.random(120) < shared).astype(float), 0.6, [str(i // 4) for i in range(120)]),
        ):
            found = bootstrap(scores, clusters=of, seed=seed, resamples=300)
            hits.append(found.low <= truth <= found.high)
    assert np.mean(hits) >= 0.92  # 360 of them: 0.95 less three standard errors


def test_intervals_of_equal_scores_and_of_none() -> None:
    assert bootstrap([1.0] * 50) == wilson(1.0, 50) and 0.92 < wilson(1.0, 50).low < 0.94
    assert (bootstrap([]).low, bootstrap([]).high) == (0.0, 1.0)
    assert bootstrap([0.0, 1.0] * 40, seed=3) == bootstrap([0.0, 1.0] * 40, seed=3)


def test_a_task_of_one_question_is_as_unsure_as_can_be() -> None:
    scores = np.r_[np.ones(1), np.tile([0.0, 1.0], 50)]
    groups = Groups(np.r_[0, np.ones(100, int)], np.full(2, 0.5))
    found = bootstrap(scores, groups=groups)
    assert found.low < 0.4 and found.high == 1.0  # the mean of 1 and 0.5 is 0.75


def test_two_checkpoints_differ_or_do_not() -> None:
    rng = np.random.default_rng(0)
    a = (rng.random(300) < 0.5).astype(float)
    better = np.where(rng.random(300) < 0.3, 1.0, a)
    assert paired(a, better).significant and paired(a, better).value > 0.1
    assert not paired(a, a).significant and paired(a, a).p_value == 1.0
    flips = [paired(a, (rng.random(300) < 0.5).astype(float)).significant for _ in range(30)]
    assert np.mean(flips) < 0.2
    with pytest.raises(ValueError, match="same"):
        paired([1.0], [1.0, 0.0])


def question(name: str) -> Question:
    return Question(id=name, text="?", answer="A", kind="choice", options=tuple(ABCD))


def test_answers_survive_a_kill_and_are_asked_once(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, {"model": "m"})
    store.add("1", "A", 3)
    store.add("1", "B", 4)
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"id": "2", "te')  # killed half way
    store = AnswerStore(tmp_path, {"model": "m"})
    assert store.texts == {"1": ("A", 3)}
    store.add("2", "C", 5)
    assert AnswerStore(tmp_path, {"model": "m"}).texts == {"1": ("A", 3), "2": ("C", 5)}
    marked = store.marked([question("1"), question("2"), question("3")])
    assert [one.score for one in marked] == [1.0, 0.0]
    store.finish(marked, {"figures": {"accuracy": 0.5}})
    found = read_answers(tmp_path)
    assert {one.question.id: one.score for one in found} == {"1": 1.0, "2": 0.0}
    with pytest.raises(ConfigError, match=r"asked otherwise.*model 'm', now 'n'"):
        AnswerStore(tmp_path, {"model": "n"})


def model_folder(path: Path, value: float = 1.0) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    save_file({"weight": np.full(64, value, np.float32)}, path / "model.safetensors")
    return path


#: What changes an answer, as a user would set it for the second start.
OTHERWISE: dict[str, dict[str, Any]] = {
    "data.reader.frames": {"data": {"reader": {"frames": 4}}},
    "data.reader.fps": {"data": {"reader": {"fps": 1.0}}},
    "data.media.fps": {"data": {"media": {"fps": 1.0}}},
    "data.media.max_frames": {"data": {"media": {"max_frames": 8}}},
    "data.media.missing_sound": {"data": {"media": {"missing_sound": "silence"}}},
    "data.template.max_pixels": {"data": {"template": {"max_pixels": 200_000}}},
    "rollout.engine.dtype": {"rollout": {"engine": {"dtype": "float16"}}},
    "rollout.engine.max_model_len": {"rollout": {"engine": {"max_model_len": 20_000}}},
    "rollout.engine.quantization": {
        "rollout": {"engine": {"quantization": "fp8"}},
        "probe": {"tolerance": 0.5},
    },
    "rollout.sampling.stop": {"rollout": {"sampling": {"stop": ["</answer>"]}}},
    "evaluation.max_tokens": {"evaluation": {"max_tokens": 9}},
}


def config_of(changes: dict[str, Any]) -> RunConfig:
    sections = {"data": {"train": "train.jsonl"} | changes.get("data", {})}
    return RunConfig.model_validate(changes | sections)


def answered_once(folder: Path, asked: Any, questions: Sequence[Question] = ()) -> None:
    AnswerStore(folder, asked, questions).add("1", "A", 1)


@pytest.mark.parametrize("key", OTHERWISE)
def test_answers_that_were_asked_otherwise_are_not_mixed(key: str, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    answered_once(tmp_path / "out", asked_with(config_of({}), model, "recipe"))
    now = asked_with(config_of(OTHERWISE[key]), model, "recipe")
    with pytest.raises(ConfigError, match=rf"otherwise \({key} .*choose another --out, or delete"):
        AnswerStore(tmp_path / "out", now)


def test_answers_of_another_model_are_not_mixed_and_a_moved_model_is_none(tmp_path: Path) -> None:
    asked = partial(asked_with, config_of({}), wording="recipe")
    model = model_folder(tmp_path / "model")
    answered_once(tmp_path / "out", asked(model))
    shutil.copytree(model, tmp_path / "moved")
    assert AnswerStore(tmp_path / "out", asked(tmp_path / "moved")).texts == {"1": ("A", 1)}
    shutil.rmtree(model)  # trained further and exported to the same place
    model_folder(model, 2.0)
    with pytest.raises(ConfigError, match=r"asked otherwise \(model\.weights '"):
        AnswerStore(tmp_path / "out", asked(model))
    (tmp_path / "moved/tokenizer_config.json").write_text('{"chat_template": "x"}')
    with pytest.raises(ConfigError, match=r"asked otherwise \(model\.files '"):
        AnswerStore(tmp_path / "out", asked(tmp_path / "moved"))


def test_what_changes_no_answer_may_differ_on_resume(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    answered_once(tmp_path / "out", asked_with(config_of({}), model, "recipe"))
    changes = {"data": {"media": {"threads": 4}}, "rollout": {"engine": {"max_num_seqs": 3}}}
    now = asked_with(config_of(changes), model, "recipe")
    assert AnswerStore(tmp_path / "out", now).texts == {"1": ("A", 1)}


def test_answers_to_other_questions_are_not_mixed(tmp_path: Path) -> None:
    asked = question("1")
    answered_once(tmp_path / "out", {}, [asked])
    more = [replace(asked, answer="B", parts={"task": "x"}), question("2")]
    assert AnswerStore(tmp_path / "out", {}, more).texts  # a corrected truth, a higher --limit
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"now another one")
    shown = MediaItem(kind="video", uri=str(clip))
    others = {"text": "Who?", "options": ("A. x", "B. y"), "media": (shown,)}
    for name, value in others.items():
        with pytest.raises(ConfigError, match=r"other questions: 1 were .* now \(1\).*--out"):
            AnswerStore(tmp_path / "out", {}, [replace(asked, **{name: value})])
    answered_once(tmp_path / "seen", {}, [replace(asked, media=(shown,))])
    clip.write_bytes(b"cut")
    with pytest.raises(ConfigError, match="holds answers to other questions"):
        AnswerStore(tmp_path / "seen", {}, [replace(asked, media=(shown,))])


def answered(task: str, right: int, of: int) -> list[Marked]:
    """``right`` right answers first."""
    return [
        Marked(
            Question(f"{task}-{n}", "?", "A", "choice", tuple(ABCD), parts={"task": task}),
            "A" if n < right else "B",
            float(n < right),
        )
        for n in range(of)
    ]


def finished(folder: Path, marked: list[Marked], name: str = "mvbench") -> Path:
    store = AnswerStore(folder / name, {})
    for one in marked:
        store.add(one.question.id, one.given or "", 1)
    store.finish(marked, {})
    return folder


def test_a_table_shows_changes_and_what_is_not_significant(tmp_path: Path) -> None:
    base = finished(tmp_path / "base", answered("count", 50, 100))
    same = finished(tmp_path / "grpo", answered("count", 51, 100))
    best = finished(tmp_path / "avatar", answered("count", 90, 100))
    lines = comparison([base, same, best]).splitlines()
    assert lines[0] == "| set | base | grpo | avatar |"
    assert lines[2].startswith("| MVBench | 50.0 [39.") and f"] +1.0{DAGGER} | 90.0 [8" in lines[2]
    assert lines[2].endswith("] +40.0 |")
    with pytest.raises(ConfigError, match="holds no results"):
        comparison([base, tmp_path])
    with pytest.raises(DataError, match="evaluate that checkpoint first"):
        read_answers(tmp_path)


#: 170 of 180 and 2 of 20 right, then 158 and 8: the mean over tasks rises, that over questions
#: falls.
BEFORE = [*answered("count", 170, 180), *answered("order", 2, 20)]
AFTER = [*answered("count", 158, 180), *answered("order", 8, 20)]


def test_interval_and_test_are_of_the_headline_that_is_printed(tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a", BEFORE), finished(tmp_path / "b", AFTER)]
    row = comparison(folders).splitlines()[2]
    figures = [float(x) for x in re.findall(r"[+-]?\d+\.\d", row)]
    before, low, high, after, low_after, high_after, changed = figures
    assert (before, after, changed) == (52.2, 63.9, 11.7) and DAGGER not in row
    assert low < before < high and low_after < after < high_after
    # By hand: the error of a mean over two tasks is half the root of the sum of their squares.
    error = 50 * np.sqrt(170 * 10 / 180**3 + 2 * 18 / 20**3)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_a_run_reports_the_interval_of_its_headline(tmp_path: Path) -> None:
    asked = tuple(one.question for one in BEFORE)
    public = PublicQuestions(((benchmark_set("mvbench"), asked),), tmp_path / "questions.jsonl")
    folder, nothing = RunFolder(tmp_path / "run"), cast(Any, None)
    screen = cast(Screen, SimpleNamespace(event=lambda text: None))
    rounds = PublicSetRounds(EvaluationConfig(), nothing, public, folder, screen)
    texts = {one.question.id: one.given for one in BEFORE}
    answers = [{"text": texts[q.id], "tokens": 1, "version": 0} for q in asked]
    rounds.report(3, 1, {n: json.dumps(one).encode() for n, one in enumerate(answers)})
    folder.close()
    [row] = read_jsonl(tmp_path / "run/metrics.jsonl")
    due = interval_of(benchmark_set("mvbench").means(BEFORE)["accuracy"])
    assert row["benchmark/accuracy/mvbench"] == pytest.approx(0.522, abs=1e-3)
    assert row["benchmark/low/mvbench"] == pytest.approx(due.low)
    assert row["benchmark/high/mvbench"] == pytest.approx(due.high)


@pytest.mark.parametrize("name", ["mvbench", "mlvu", "vsibench"])
def test_a_result_has_the_interval_of_its_mean_over_tasks(name: str, tmp_path: Path) -> None:
    one = benchmark_set(name)
    found = interval_of(one.means(BEFORE)["accuracy"])
    assert found.low < one.metric(BEFORE)["accuracy"] < found.high < 0.8
    questions = [each.question for each in BEFORE]
    store = AnswerStore(tmp_path, {})
    for each in BEFORE:
        store.add(each.question.id, each.given or "", 1)
    result = finish(SetToAsk(one, questions, 0, store), Asking({}, 0.0))
    assert result.intervals["accuracy"] == found
    kept = json.loads((tmp_path / "result.json").read_text())["intervals"]
    assert kept["accuracy"] == [found.low, found.high]
    assert kept["task/order"][0] < 0.1 < kept["task/order"][1]


def test_a_change_is_of_the_questions_that_both_answered(tmp_path: Path) -> None:
    base = finished(tmp_path / "a", answered("count", 50, 100))
    other = finished(tmp_path / "b", answered("count", 50, 60))  # none of those that a had wrong
    assert f" +0.0{DAGGER} |" in comparison([base, other]).splitlines()[2]


def test_questions_about_one_clip_are_tested_together() -> None:
    """All 40 differences lie in two clips: 40 coins say something, two do not."""
    a, b, clips = np.zeros(80), np.r_[np.ones(40), np.zeros(40)], [str(n // 20) for n in range(80)]
    assert paired(a, b).significant and not paired(a, b, clusters=clips).significant

    def of(scores: np.ndarray) -> list[tuple[float, list[Marked]]]:
        asked = [Question(str(n), "?", "A", "choice", about=clip) for n, clip in enumerate(clips)]
        return [(1.0, [Marked(q, None, float(x)) for q, x in zip(asked, scores, strict=True)])]

    assert not change(of(a), of(b)).significant


def test_parts_have_rows_and_intervals_in_the_table(tmp_path: Path) -> None:
    """WorldSense's Halluc, TP and AC are tasks."""
    marked = [*answered("Hallucination", 30, 40), *answered("Temporal Prediction", 5, 40)]
    folders = [finished(tmp_path / "a", marked, "worldsense"), tmp_path / "b"]
    finished(folders[1], [*answered("Hallucination", 39, 40), *marked[40:]], "worldsense")
    lines = comparison(folders).splitlines()
    assert lines[3].startswith("| - Hallucination | 75.0 [5") and lines[3].endswith("] +22.5 |")
    assert lines[4].startswith("| - Temporal Prediction | 12.5 [") and DAGGER in lines[4]


def test_answers_of_an_earlier_version_are_named(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a", answered("count", 1, 2))
    path = folder / "mvbench/answers.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["about"]), path)
    with pytest.raises(DataError, match=r"earlier version and lacks about: evaluate .* again"):
        comparison([folder])


def test_no_answer_to_a_count_is_zero_in_headline_and_score() -> None:
    """As CG-AV-Counting counts it; the interval is of the scores, so they must agree."""
    asked = [Question(str(n), "?", truth, "count") for n, truth in enumerate(("0", "3"))]
    marked = [mark(one, "I cannot say") for one in asked]
    assert [one.score for one in marked] == [1.0, 0.0]
    assert benchmark_set("av_counting").metric(marked)["accuracy"] == 0.5


def test_a_task_of_lmms_eval_has_a_row_where_it_is_not_installed(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a", answered("count", 1, 2), "lmms_mmstar")
    assert "| mmstar | 50.0 [" in comparison([folder])


def test_the_interval_covers_a_mean_over_tasks() -> None:
    rng, hits = np.random.default_rng(7), []
    for seed in range(300):
        sizes, rates = rng.integers(15, 120, 5), rng.uniform(0.2, 0.95, 5)
        of = np.repeat(np.arange(5), sizes)
        scores = (rng.random(len(of)) < rates[of]).astype(float)
        groups = Groups(of, np.full(5, 0.2))
        found = bootstrap(scores, groups=groups, seed=seed, resamples=300)
        hits.append(found.low <= rates.mean() <= found.high)
    assert np.mean(hits) >= 0.91  # 0.95 less three standard errors


def test_accuracy_by_length() -> None:
    marked = [mark(question(str(n)), "A" if n < 3 else "B", tokens=n) for n in range(6)]
    assert by_length(marked) == {"0-1 tokens": 1.0, "2-3 tokens": 0.5, "4-5 tokens": 0.0}
