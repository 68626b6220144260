"""A few rows of every public set in its published layout, made up by us; media are stand-ins."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "
PICTURE = {"bytes": PNG, "path": "x.png"}


@dataclass(frozen=True)
class Published:
    """A set on disk, what its questions must be, and completions with figures worked out by
    hand."""

    write: Callable[[Path], None]
    answers: Sequence[str]
    completions: Sequence[str]
    figures: dict[str, float]
    media: Sequence[str]  # last part of each question's first medium, "" for an embedded one
    says: str  # in the authors' wording of the first question
    options: Sequence[int] = field(default_factory=list)  # how many each question has
    unread: Sequence[str] = ()  # fields that are published and that nothing is made of here


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"stand-in")


def write_json(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_frames(folder: Path, count: int) -> None:
    """JPEG frames 00001.jpg, ..., each of one grey, brighter from frame to frame."""
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        picture = Image.new("RGB", (64, 48), (10 * number,) * 3)
        picture.save(folder / f"{number:05d}.jpg", quality=95)


ABCD = ["A. red", "B. green", "C. blue", "D. none"]
PLAIN = ["red", "green", "blue", "none"]


def _omnibench(root: Path) -> None:
    base = {"task type": "Action", "audio type": "speech", "question": "Which?", "options": PLAIN}
    base |= {"audio content": "hum", "image content": "cat", "audio_path": "a.mp3"}
    rows = [
        base | {"index": 0, "answer": "green", "image_path": "a.png"},
        base | {"index": 1, "answer": "red", "image_path": "b.png", "task type": "Count"},
    ]
    (root / "dataset").mkdir(parents=True)
    (root / "dataset/batch-5_1142.jsonl").write_text("\n".join(map(json.dumps, rows)))
    touch(root, "mm_data/audio/a.mp3", "mm_data/image/a.png", "mm_data/image/b.png")


def _dailyomni(root: Path) -> None:
    row = {"Question": "When?", "Choice": ABCD, "Answer": "C", "video_id": "v1", "Type": "AV Event"}
    row |= {"video_category": "Music", "video_duration": "30s", "content_parent_category": "x"}
    write_json(root / "qa.json", [row, row | {"Answer": "A", "video_duration": "60s"}])
    touch(root, "Videos/v1/v1_video.mp4")


def _worldsense(root: Path) -> None:
    row = {"index": 7, "video_path": "videos/a.mp4", "subtitle_path": "s/a.srt"}
    row |= {"question": "Who?", "candidates": ABCD, "answer": "B", "task_type": "Hallucination"}
    row |= {"task_domain": "Music", "duration": "1-2min", "audio_class": ["Speech", "Music"]}
    three = {"index": 8, "candidates": ABCD[:3], "answer": "C", "task_type": "Audio Change"}
    write_parquet(root / "data/test-0.parquet", [row, row | three | {"audio_class": ["Music"]}])
    touch(root, "videos/a.mp4")


def _av_odyssey(root: Path) -> None:
    row = {"question_id": "1_1", "data_type": "image", "subfield": "Timbre", "answer": "B"}
    row |= {"question": "Which sounds like [img1]?", "image_path": ["i/1.png"], "video_path": []}
    row |= {"options": [f"{x}. [audio{n}]" for n, x in enumerate("ABCD", 1)]}
    row |= {"audio_path": [f"a/{n}.wav" for n in range(1, 5)]}
    touch(root, "i/1.png", "v/1.mp4", *(f"a/{n}.wav" for n in range(1, 5)))
    seen = {"question_id": "1_2", "question": "Which fits [video1]?", "video_path": ["v/1.mp4"]}
    rows = [row, row | seen | {"image_path": [], "subfield": "Beat"}]
    (root / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _intentbench(root: Path) -> None:
    row = {"problem": "Why?", "video": "v.mp4", "data_type": "video", "Type": "social"}
    rows = [
        row
        | {"qid": "q1", "problem_type": "multiple choice", "options": ABCD}
        | {"solution": "<answer>D</answer>"},
        row
        | {"qid": "q2", "problem_type": "emer_ov_mc", "options": ABCD, "Type": "emotion"}
        | {"solution": "<answer>A,C</answer>"},
        row
        | {"qid": "q3", "problem_type": "judge", "Type": "deception"}
        | {"solution": "<answer>Yes</answer>"},
    ]
    write_json(root / "qa.json", rows)
    touch(root, "videos/v.mp4")


def _av_counting(root: Path) -> None:
    row = {"index": 1, "video": "v.mp4", "question": "How many?", "category": "event"}
    row |= {"type": "av", "query_interval": [0, 9], "clue": "[]"}
    rows = [row | {"answer": 4}, row | {"index": 2, "answer": 10}, row | {"index": 3, "answer": 2}]
    write_json(root / "cg-av-counting.json", rows)
    touch(root, "cg_videos_720p/v.mp4")


def _mvbench(root: Path) -> None:
    row = {"video": "a.mp4", "question": "What?", "candidates": PLAIN, "answer": "blue"}
    write_json(root / "json/action_count.json", [row, row | {"answer": "red"}])
    bounded = row | {"start": 1.5, "end": 3.0, "answer": "none"}
    write_json(root / "json/action_sequence.json", [bounded])
    touch(root, "video/perception/videos/a.mp4", "video/star/Charades_segment/a.mp4")
    write_json(
        root / "json/episodic_reasoning.json", [bounded | {"video": "castle_s01_clip_07", "fps": 3}]
    )
    write_frames(root / "video/tvqa/frames_fps3_hq/castle_s01_clip_07", 15)


def _videomme(root: Path) -> None:
    row = {"videoID": "y1", "question_id": "001-1", "duration": "short", "domain": "Sport"}
    row |= {"sub_category": "Ball", "task_type": "OCR", "question": "Who?", "options": ABCD}
    row |= {"video_id": "001", "url": "u", "answer": "A"}
    long = {"question_id": "001-2", "duration": "long", "answer": "B"}
    write_parquet(root / "videomme/test-0.parquet", [row, row | long])
    touch(root, "data/y1.mp4")


def _lvbench(root: Path) -> None:
    text = "What is it?\n(A) red\n(B) green\n(C) blue\n(D) none"
    row = {"key": "k", "uid": "5", "question": text, "answer": "B", "time_reference": "0:00-0:09"}
    row |= {"question_type": ["entity recognition", "reasoning"], "video_path": "a.mp4"}
    write_parquet(root / "data/train-0.parquet", [row, row | {"uid": "6", "answer": "D"}])
    touch(root, "all_videos/a.mp4")


def _video_holmes(root: Path) -> None:
    options = {x: text for x, text in zip("ABCDEF", [*PLAIN, "gold", "grey"], strict=True)}
    row = {"Question ID": 3, "video ID": "h1", "Question": "Who?", "Options": options}
    row |= {"Answer": "F", "Question Type": "SR", "Explanation": "x"}
    write_json(root / "test_Video-Holmes.json", [row, row | {"Question ID": 4, "Answer": "A"}])
    touch(root, "videos_cropped/h1.mkv")


def _mmvu(root: Path) -> None:
    row = {"id": "validation_1", "video_path": "Science/Biology/1.mp4", "question": "What?"}
    several = {"question_type": "multiple-choice", "answer": "E"}
    several |= {"choices": dict(zip("ABCDE", [*PLAIN, "gold"], strict=True))}
    empty = {"question_type": "open-ended", "answer": "12.5", "id": "validation_2"}
    empty |= {"choices": dict.fromkeys("ABCDE", "")}
    write_parquet(root / "data/validation-0.parquet", [row | several, row | empty])
    touch(root, "Science/Biology/1.mp4")


def _tomato(root: Path) -> None:
    row = {"id": "t1", "question": "How often?", "options": ["1", "2", "3"], "answer": 2}
    row |= {"video_path": "videos/a.mp4", "reason_type": "count", "demonstration_type": "human"}
    write_parquet(root / "data/test-0.parquet", [row, row | {"id": "t2", "answer": 0}])
    touch(root, "videos/a.mp4")


def _videommmu(root: Path) -> None:
    name = "dev_Computer_Science_1"
    row = {"id": name, "question": "What?", "options": PLAIN, "answer": "C", "image": None}
    row |= {"question_type": "multiple-choice", "link_selected": "u"}
    write_parquet(root / "Perception/test-0.parquet", [row])
    write_parquet(root / "Comprehension/test-0.parquet", [row | {"answer": "A"}])
    open_ = {"options": [], "question_type": "open", "answer": "3.5", "image": PICTURE}
    write_parquet(root / "Adaptation/test-0.parquet", [row | open_])
    touch(root, f"Engineering/{name}.mp4")


def _vsibench(root: Path) -> None:
    row = {"dataset": "scannet", "scene_name": "s1", "question": "How far?", "options": None}
    rows = [
        row | {"id": 1, "question_type": "object_abs_distance", "ground_truth": "2.0"},
        row
        | {"id": 2, "question_type": "route_planning", "options": ABCD[:3]}
        | {"ground_truth": "B"},
    ]
    rows += [
        row
        | {"id": 3 + n, "question_type": f"object_rel_direction_{level}"}
        | {"options": ABCD, "ground_truth": "A"}
        for n, level in enumerate(("easy", "medium", "hard"))
    ]
    touch(root, "scannet/s1.mp4")
    (root / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _scivideobench(root: Path) -> None:
    options = dict(zip("ABCDEFGHIJ", map(str, range(10)), strict=True))
    row = {"video_id": "9", "question": "At 01:05?", "options": options, "answer": "J"}
    row |= {"question_type": "Quantitative Reasoning", "category": "Physics", "video_duration": 90}
    write_json(root / "test.jsonl", row)
    touch(root, "jove_9.mp4")


def _video_tt(root: Path) -> None:
    prompt = "A. red\nB. green\nC. blue\nD. none\nPlease give the letter."
    row = {"video_id": "7", "qid": "7_1", "question": "What?", "question_prompt": prompt}
    row |= {"answer": "D", "capability": "Plot Attribute"}
    write_parquet(root / "data/test-0.parquet", [row])
    touch(root, "Benchmark-AllVideos-LQ/7.mp4")


def _mathverse(root: Path) -> None:
    text = "Find x.\nChoices:\nA:10\nB:20\nC:30\nD:40"
    row = {"sample_index": "1", "problem_index": "1", "problem_version": "Text Dominant"}
    row |= {"question": text, "question_for_eval": text, "query_wo": f"Answer.\n{text}"}
    row |= {"question_type": "multi-choice", "answer": "C", "image": PICTURE, "query_cot": "x"}
    row |= {"metadata": {"subject": "Plane Geometry", "split": "testmini"}}
    free = {"sample_index": "2", "question_type": "free-form", "answer": "2.5"}
    free |= {"question": "Find y.", "question_for_eval": "Find y.", "query_wo": "Answer. Find y."}
    write_parquet(root / "data/testmini-0.parquet", [row, row | free])


def _mathvista(root: Path) -> None:
    row = {"pid": "1", "question": "Which?", "query": "Hint: letter.\nQuestion: Which?"}
    row |= {"image": "images/1.jpg", "decoded_image": PICTURE, "unit": None, "precision": None}
    row |= {"metadata": {"task": "chart", "context": "bar", "skills": ["arithmetic", "logic"]}}
    several = {"choices": PLAIN, "question_type": "multi_choice", "answer_type": "text"}
    number = {"choices": None, "question_type": "free_form", "answer_type": "float"}
    number |= {"pid": "2", "precision": 1.0, "answer": "1.2"}
    rows = [row | several | {"answer": "blue"}, row | number]
    rows.append(rows[1] | {"pid": "3", "answer_type": "integer", "answer": "14", "precision": None})
    write_parquet(root / "data/testmini-0.parquet", rows)


def _mmk12(root: Path) -> None:
    text = "<image>Which is right?\nA. red\nB. green\nC. blue\nD. none"
    row = {"id": "m1", "question": text, "answer": "B", "subject": "physics", "image": PICTURE}
    write_parquet(root / "data/test-0.parquet", [row, row | {"id": "m2", "subject": "biology"}])


def _r1_onevision(root: Path) -> None:
    hint = "Hint: Please answer with the letter.\nQuestion: "
    picture = base64.b64encode(PNG).decode()
    rows = [
        (hint + "Which?\nChoices:\n(A) red\n(B) green", "(A) red\n(B) green", "B"),
        (hint + "How many?", "", "42"),
        (hint + "Whose?", "['red', 'green', 'blue']", "C"),
        (hint + "Where?", "A. left B. right", "A"),
        (hint + "Never answered", "", ""),
    ]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "r1-onevision.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "choices", "answer", "level", "category"])
        for index, (question, choices, answer) in enumerate(rows):
            level = "Senior High School"
            table.writerow([index, picture, question, choices, answer, level, "Math"])


def _omnivideobench(root: Path) -> None:
    question = {"question": "Who?", "options": ABCD, "correct_option": "A"}
    question |= {"question_type": "counting", "audio_type": "Speech"}
    other = question | {"correct_option": "D", "question_type": "causal"}
    row = {"video": "video_1", "duration": "04:30", "questions": [question, other]}
    write_json(root / "data.json", [row])
    touch(root, "videos/video_1.mp4")


def _mlvu(root: Path) -> None:
    text = "What?\n(A) red\n(B) green\n(C) blue\n(D) none"
    row = {"video_name": "ego_1.mp4", "question": text, "answer": "B", "task_type": "ego"}
    plots = [row | {"task_type": "plotQA", "answer": x} for x in "AB"]
    write_parquet(root / "data/test-0.parquet", [row, *plots])
    touch(root, "video/ego_1.mp4")


RIGHT_WRONG = {"accuracy": 0.5}
PUBLISHED: dict[str, Published] = {
    "omnibench": Published(
        _omnibench,
        "BA",
        ["<think>no: A</think><answer>B</answer>", "B"],
        {**RIGHT_WRONG, "task/Action": 1.0, "task/Count": 0.0},
        ["a.mp3", "a.mp3"],
        "Options:\nA. red",
        [4, 4],
        unread=("audio content", "image content"),
    ),
    "dailyomni": Published(
        _dailyomni,
        "CA",
        ["C", "The answer is (D)."],
        {**RIGHT_WRONG, "duration/30s": 1.0, "duration/60s": 0.0, "category/Music": 0.5},
        ["v1_video.mp4"] * 2,
        "Select the single most accurate answer",
        [4, 4],
        unread=("content_parent_category",),
    ),
    "worldsense": Published(
        _worldsense,
        "BC",
        ["B. green", "nothing"],
        {**RIGHT_WRONG, "task/Hallucination": 1.0, "audio/Speech": 1.0, "audio/Music": 0.5},
        ["a.mp4"] * 2,
        "Carefully watch this video",
        [4, 3],
        unread=("subtitle_path",),
    ),
    "av_odyssey": Published(
        _av_odyssey,
        "BB",
        ["(B)", "(C)"],
        {"accuracy": 0.5, "subfield/Timbre": 1.0, "subfield/Beat": 0.0},
        ["1.png", "1.mp4"],
        "sounds like <image>?\nA. <audio>",
        [4, 4],
        unread=("data_type",),
    ),
    "intentbench": Published(  # F1 of {A, B} against {A, C}: one hit of two and two
        _intentbench,
        ["D", "A,C", "Yes"],
        ["D", "<answer>A, B</answer>", "No, it is not."],
        {"accuracy": 0.5, "type/social": 1.0, "type/emotion": 0.5, "type/deception": 0.0},
        ["v.mp4"] * 3,
        "Why? Options:\nA. red",
        [4, 4, 0],
    ),
    "av_counting": Published(  # errors 0, 1 and 2 (no answer counts as 0)
        _av_counting,
        ["4", "10", "2"],
        ["four", "11", "I cannot say"],
        {"accuracy": 1 / 3, "off_by_one": 2 / 3, "mean_absolute_error": 1.0}
        | {"root_mean_square_error": (5 / 3) ** 0.5},
        ["v.mp4"] * 3,
        "Output only the number",
        [0, 0, 0],
        unread=("clue", "query_interval"),
    ),
    "mvbench": Published(  # tasks weigh alike: (1/2 + 1 + 1) / 3
        _mvbench,
        "CADD",
        ["(C) blue", "C", "D", "D"],
        {"accuracy": 5 / 6, "task/action_count": 0.5, "task/action_sequence": 1.0}
        | {"task/episodic_reasoning": 1.0},
        ["a.mp4", "a.mp4", "a.mp4", ""],
        "Question:What?\nOption:\n(A) red",
        [4, 4, 4, 4],
    ),
    "videomme": Published(
        _videomme,
        "AB",
        ["A", "A"],
        {**RIGHT_WRONG, "duration/short": 1.0, "duration/long": 0.0},
        ["y1.mp4"] * 2,
        "The best answer is:",
        [4, 4],
        unread=("url", "video_id"),
    ),
    "lvbench": Published(
        _lvbench,
        "BD",
        ["B", "A"],
        {**RIGHT_WRONG, "type/reasoning": 0.5},
        ["a.mp4"] * 2,
        "What is it?\n(A) red",
        [4, 4],
        unread=("key", "time_reference"),
    ),
    "video_holmes": Published(
        _video_holmes,
        "FA",
        ["F", "F"],
        {**RIGHT_WRONG, "type/SR": 0.5},
        ["h1.mkv"] * 2,
        "(A, B, C, D, E, or F)",
        [6, 6],
        unread=("Explanation",),
    ),
    "mmvu": Published(
        _mmvu,
        ["E", "12.5"],
        ["E: gold", "about 12.5"],
        {"accuracy": 1.0, "subject/Biology": 1.0, "kind/open-ended": 1.0},
        ["1.mp4"] * 2,
        "A: red\nB: green",
        [5, 0],
    ),
    "tomato": Published(
        _tomato,
        "CA",
        ["C", "C"],
        {**RIGHT_WRONG, "reason/count": 0.5},
        ["a.mp4"] * 2,
        "{'A': '1', 'B': '2', 'C': '3'}",
        [3, 3],
    ),
    "videommmu": Published(
        _videommmu,
        ["C", "A", "3.5"],
        ["C", "B", "\\boxed{3.5}"],
        {"accuracy": 2 / 3, "track/Perception": 1.0, "track/Adaptation": 1.0}
        | {"subject/Computer_Science": 2 / 3},
        ["dev_Computer_Science_1.mp4"] * 3,
        "Please ignore the Quiz question",
        [4, 4, 0],
        unread=("link_selected", "question_type"),
    ),
    "vsibench": Published(  # 2.5 for 2.0 is off by 0.25: within 0.5, 0.45, ... 0.25, six of ten
        _vsibench,
        ["2.0", "B", "A", "A", "A"],
        ["2.5", "B", "A", "B", "B"],
        {"accuracy": (0.6 + 1.0 + 1 / 3) / 3, "task/object_rel_direction": 1 / 3}
        | {"task/object_abs_distance": 0.6},
        ["s1.mp4"] * 5,
        "using a single word or phrase",
        [0, 3, 4, 4, 4],
    ),
    "scivideobench": Published(
        _scivideobench,
        "J",
        ["J. 9"],
        {"accuracy": 1.0, "category/Physics": 1.0},
        ["jove_9.mp4"],
        "At 01:05?",
        [10],
        unread=("video_duration",),
    ),
    "video_tt": Published(
        _video_tt,
        "D",
        ["D"],
        {"accuracy": 1.0, "capability/Plot Attribute": 1.0},
        ["7.mp4"],
        "Please give the letter.",
        [4],
    ),
    "mathverse": Published(
        _mathverse,
        ["C", "2.5"],
        ["C:30", "y = 2.5"],
        {"accuracy": 1.0, "version/Text Dominant": 1.0, "subject/Plane Geometry": 1.0},
        ["", ""],
        "Answer.\nFind x.",
        [4, 0],
        unread=("metadata.split", "problem_index", "query_cot"),
    ),
    "mathvista": Published(  # 1.24 rounds to 1.2; 14.4 rounds to 14
        _mathvista,
        ["C", "1.2", "14"],
        ["blue", "1.24", "15"],
        {"accuracy": 2 / 3, "skills/logic": 2 / 3, "task/chart": 2 / 3},
        ["", "", ""],
        "Hint: letter.",
        [4, 0, 0],
        unread=("image", "unit"),
    ),
    "mmk12": Published(
        _mmk12,
        "BB",
        ["B", "C"],
        {**RIGHT_WRONG, "subject/physics": 1.0, "subject/biology": 0.0},
        ["", ""],
        "Which is right?\nA. red",
        [4, 4],
    ),
    "r1_onevision_bench": Published(
        _r1_onevision,
        ["B", "42", "C", "A"],
        ["B", "41", "blue", "B"],
        {**RIGHT_WRONG, "category/Math": 0.5, "level/Senior High School": 0.5},
        ["", "", "", ""],
        "Hint: Please answer with the letter.\nQuestion: Which?\nChoices:\n(A) red",
        [2, 0, 3, 2],
    ),
    "omnivideobench": Published(
        _omnivideobench,
        "AD",
        ["A", "C"],
        {**RIGHT_WRONG, "duration/(1,5] min": 0.5, "type/counting": 1.0, "audio/Speech": 0.5},
        ["video_1.mp4"] * 2,
        "Who?\nA. red",
        [4, 4],
    ),
    "mlvu": Published(  # tasks weigh alike: (1 + 1/2) / 2
        _mlvu,
        "BAB",
        ["B", "A", "A"],
        {"accuracy": 0.75, "task/ego": 1.0, "task/plotQA": 0.5},
        ["ego_1.mp4"] * 3,
        "Best option: (",
        [4, 4, 4],
    ),
}
