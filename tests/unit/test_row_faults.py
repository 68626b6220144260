"""Rows as people have them: what is read, and what is refused with the column and the remedy."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from avatar_rl.common.errors import DataError
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import load_prompts
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.validate import render, validate

FREE = {"problem": "What does he do?", "solution": "run", "problem_type": "free-form"}
COUNT = {"problem": "How many dogs?", "solution": "2", "problem_type": "numerical"}
CHOICE = {"problem": "Which?", "problem_type": "multiple choice"}


def read(*rows: dict[str, Any], folder: Path, **config: Any) -> list[Prompt]:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(path, DataConfig.model_validate(config))


def refused(row: dict[str, Any], folder: Path, **config: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(row, folder=folder, **config)
    assert "d.jsonl:1: " in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"video": [{"path": "f0.jpg"}, {"path": "f1.jpg"}]},
        {"video": {"video": "f0.PNG"}},
        {"media": {"items": [{"kind": "video", "uri": "f0.webp"}]}},
    ],
)
def test_pictures_are_no_video_however_they_are_named(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    row = {"question": "Which?", "answer": "run", "problem_type": "free-form"}
    assert "ffmpeg" in refused(row | fields, tmp_path)


@pytest.mark.parametrize(
    "column",
    [
        {"vid": "xk12"},
        {"youtube_id": "dQw4w9WgXcQ"},
        {"url": "https://www.youtube.com/watch?v=dQw4w9WgXcQ"},
        {"image_bytes": "abc"},
        {"recording": "a.m4b"},
        {"poster": "x.heic"},
        {"source": "x.ts"},
    ],
)
def test_media_in_columns_of_any_name_are_not_left_out(
    tmp_path: Path, column: dict[str, str]
) -> None:
    assert f"column {next(iter(column))!r} names media" in refused(FREE | column, tmp_path)


# -- truths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solution",
    [
        *("<answer> <answer>run</answer> </answer>", "<answer>run", "<Answer>run</Answer>", "run"),
        *("run<|im_end|>", "<answer>run</answer><|im_end|>", "run</s>", "run<end_of_turn>"),
        *("<think>why</think> <answer>run</answer>", "<THINK>why</THINK>run", "\\boxed{run}"),
        *("<answer >run</answer>", "&lt;answer&gt;run&lt;/answer&gt;", "<s>run</s>", "run[/INST]"),
        *("<final_answer>run</final_answer>", "<|channel|>final<|message|>run", "run<im_end>"),
        *("The answer is \\boxed{run}", "<answer>Run.</answer> <answer>run</answer>", "run<pad>"),
    ],
)
def test_what_is_left_of_tags_is_no_part_of_a_truth(tmp_path: Path, solution: str) -> None:
    assert read(FREE | {"solution": solution}, folder=tmp_path)[0].answer == "run"


@pytest.mark.parametrize(
    "solution",
    [
        *("<think>why run", "why</think>", "<answer></answer>", "<ans>run</ans>", "nan", "<NA>"),
        *("<output>run</output>", "<answer>run</answer><answer>walk</answer>"),
    ],
)
def test_a_truth_without_an_end_is_refused(tmp_path: Path, solution: str) -> None:
    assert "the answer" in refused(FREE | {"solution": solution}, tmp_path)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        *((["A. red", "B. green"], a) for a in ("b", "(b)", "Option B", "\\boxed{B}", "green.")),
        *((["red", "green"], a) for a in ("The answer is B.", "B", "B. green", "<answer>b")),
        *((["a. red", "b. green"], a) for a in ("b", "(b) green", "B")),
        *((["(a) red", "(b) green"], a) for a in ("(b) green", "b")),
        *((["A、red", "B、green"], a) for a in ("B", "B、green", "选B")),
    ],
)
def test_a_letter_counts_in_every_dress(tmp_path: Path, options: list[str], answer: str) -> None:
    [prompt] = read(CHOICE | {"options": options, "solution": answer}, folder=tmp_path)
    assert prompt.answer == "B"
    assert prompt.options[1].upper().count("B") == 1 and "green" in prompt.options[1]


@pytest.mark.parametrize("answer", ["A or B", "A, B", "not B", "blue", "C"])
def test_an_ambiguous_letter_is_refused(tmp_path: Path, answer: str) -> None:
    row = CHOICE | {"options": ["red", "green"], "solution": answer}
    assert "is none of the options" in refused(row, tmp_path)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("2 + 8 = 10\n#### 10", "10"),
        ("so $x = \\boxed{10}$ holds", "10"),
        ("first \\boxed{10}, again \\boxed{10}", "10"),
        (10, "10"),
        (2.5, "2.5"),
    ],
)
def test_a_worked_solution_counts_by_its_result(tmp_path: Path, solution: Any, answer: str) -> None:
    assert read(COUNT | {"solution": solution}, folder=tmp_path)[0].answer == answer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["red", ""], "option 2 of 2 has no text; give every option"),
        (["red", math.nan], "option 2 of 2 has no text; give every option"),
        (["red"], "one option 'A. red'; give all options"),
        ([f"o{n}" for n in range(27)], "27 options, more than there are letters; keep"),
    ],
)
def test_options_that_are_no_choice_are_refused(
    tmp_path: Path, options: list[Any], words: str
) -> None:
    assert words in refused(CHOICE | {"options": options, "solution": "A"}, tmp_path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    row = '{"problem": "a", "problem": "b", "solution": "x", "problem_type": "ocr"}'
    (tmp_path / name).write_text(row if name == "d.jsonl" else f"[{row}]")
    with pytest.raises(DataError, match=rf"{name}:1: .*key 'problem' is there twice.*mend"):
        load_prompts(tmp_path / name, DataConfig())


def test_several_boxed_results_are_refused(tmp_path: Path) -> None:
    assert "boxes several" in refused(COUNT | {"solution": "\\boxed{1} \\boxed{2}"}, tmp_path)


# -- absent values -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["options", "id", "hint", "process", "video", "system"])
def test_nan_is_absent(tmp_path: Path, key: str) -> None:
    [prompt] = read(COUNT | {key: math.nan}, folder=tmp_path)
    assert prompt.id != "nan" and not prompt.media.items and prompt.hint is None


@pytest.mark.parametrize("change", [{"solution": math.nan}, {"problem": math.nan}])
def test_an_absent_answer_or_question_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    assert "no answer" in (said := refused(COUNT | change, tmp_path)) or "no question" in said


def test_an_infinite_answer_is_refused(tmp_path: Path) -> None:
    assert "the answer is inf" in refused(COUNT | {"solution": math.inf}, tmp_path)


# -- media -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [["f0.jpg", "f1.jpg"], [["f0.png", "f1.png"]], "f0.webp"])
def test_a_list_of_frames_is_no_list_of_videos(tmp_path: Path, value: Any) -> None:
    said = refused(FREE | {"video": value}, tmp_path)
    assert "frames" in said and "ffmpeg" in said


@pytest.mark.parametrize(
    "column",
    [
        *({"videoID": "xk12"}, {"video_id": 17}, {"clip_name": "xk12"}, {"my_video": "a.mp4"}),
        *({"audio_file": "a.wav"}, {"picture": "a.png"}, {"attachments": ["a.mp4"]}),
        *({"file": {"path": "x/a.webm"}}, {"images_url": "http://x/a.jpg?w=2"}),
    ],
)
def test_a_column_that_names_media_is_never_left_out_silently(
    tmp_path: Path, column: dict[str, Any]
) -> None:
    said = refused(FREE | column, tmp_path)
    assert repr(next(iter(column))) in said and "ignore_columns" in said
    assert read(FREE | column, folder=tmp_path, ignore_columns=tuple(column))[0].extra == {}


def test_a_sound_beside_a_video_is_not_left_out_and_a_thumbnail_is(tmp_path: Path) -> None:
    assert "'audio_file'" in refused(FREE | {"video": "a.mp4", "audio_file": "a.wav"}, tmp_path)
    plain = FREE | {"video": "a.mp4", "thumbnail": "a.jpg", "video_description": "two dogs run"}
    assert len(read(plain, folder=tmp_path)[0].media.items) == 1


@pytest.mark.parametrize("first", [0, 1])
def test_rows_with_and_without_media_stand_in_one_file(tmp_path: Path, first: int) -> None:
    text = {"question": "What is 2 + 2?", "answer": "4", "problem_type": "numerical"}
    rows = [text, text | {"question": "How many?", "video": "a.mp4"}]
    prompts = read(*(rows if first == 0 else rows[::-1]), folder=tmp_path)
    assert sorted(len(prompt.media.items) for prompt in prompts) == [0, 1]


def test_data_urls_are_read_where_they_can_be_written(tmp_path: Path) -> None:
    payload = bytes(range(256)) * 400
    url = "data:video/mp4;base64," + base64.b64encode(payload).decode()
    said = refused(FREE | {"video": url}, tmp_path)
    assert "embedded in the row as a data URL (136558 characters)" in said and "extract_to" in said
    [prompt] = read(FREE | {"video": url}, folder=tmp_path, extract_to=tmp_path / "out")
    assert Path(prompt.media.items[0].uri).read_bytes() == payload
    broken = refused(FREE | {"video": url[:-3] + "!"}, tmp_path, extract_to=tmp_path / "out")
    assert "broken base64" in broken
    assert "base64 text" in refused(FREE | {"video": url.partition(",")[2]}, tmp_path)


def test_a_report_of_embedded_media_stays_short(tmp_path: Path) -> None:
    url = "data:video/mp4;base64," + "A" * 100_000
    (tmp_path / "d.jsonl").write_text(json.dumps(FREE | {"video": url}) + "\n")
    out = io.StringIO()
    render(validate(tmp_path / "d.jsonl", DataConfig(), decode=True), Console(file=out, width=100))
    assert len(out.getvalue()) < 2_000 and max(map(len, out.getvalue().splitlines())) <= 500


def test_nested_media_of_parquet_rows_are_read(tmp_path: Path) -> None:
    content = {"type": "image", "image": {"bytes": b"\x89PNG....", "path": None}}
    row = {"messages": [{"role": "user", "content": [content, {"type": "text", "text": "Which?"}]}]}
    path = tmp_path / "d.parquet"
    table = pyarrow.Table.from_pylist([row | {"solution": "a", "problem_type": "free-form"}])
    pyarrow.parquet.write_table(table, path)
    [prompt] = load_prompts(path, DataConfig(extract_to=tmp_path / "out"))
    assert Path(prompt.media.items[0].uri).read_bytes() == b"\x89PNG...."


@pytest.mark.parametrize(
    "content",
    [
        "Before: <image> After: <image> What changed?",
        [
            {"type": "text", "text": "Before:"},
            {"type": "image"},
            {"type": "text", "text": "After:"},
            {"type": "image"},
            {"type": "text", "text": "What changed?"},
        ],
    ],
)
def test_places_between_words_are_kept(tmp_path: Path, content: Any) -> None:
    row = {"messages": [{"role": "user", "content": content}], "images": ["a.png", "b.png"]}
    [prompt] = read(row | {"solution": "hat", "problem_type": "free-form"}, folder=tmp_path)
    assert prompt.media.in_text and [item.uri for item in prompt.media.items] == ["a.png", "b.png"]
    words = prompt.question.split()
    assert words == ["Before:", "<image>", "After:", "<image>", "What", "changed?"]


@pytest.mark.parametrize("text", ["<image>Which?", "Which?\n<image>", "Which?"])
def test_places_at_one_end_stand_in_front(tmp_path: Path, text: str) -> None:
    row = {"messages": [{"role": "user", "content": text}], "images": ["a.png"], "solution": "hat"}
    [prompt] = read(row | {"problem_type": "free-form"}, folder=tmp_path)
    assert not prompt.media.in_text and prompt.question == "Which?"


def test_a_grounding_row_is_refused(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>Where is <ref-object>?"}],
        "images": ["a.png"],
        "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]},
        "solution": "left",
        "problem_type": "free-form",
    }
    assert "`objects`" in refused(row, tmp_path)


# -- layouts and other columns -----------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 2 + 2?", "answer": "4"},
        {"query": "What is 2 + 2?", "response": "<think>easy</think><answer>4</answer>"},
        {"prompt": "What is 2 + 2?", "completion": "4"},
        {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "ground_truth": 4},
    ],
)
def test_questions_as_trl_and_swift_write_them(tmp_path: Path, row: dict[str, Any]) -> None:
    [prompt] = read(row | {"problem_type": "numerical"}, folder=tmp_path)
    assert (prompt.question, prompt.answer) == ("What is 2 + 2?", "4")


def test_other_columns_reach_rewards_as_they_are(tmp_path: Path) -> None:
    others = {
        "difficulty": 3,
        "hard": True,
        "test_cases": [{"in": "3 1 2", "out": "1 2 3"}],
        "keywords": ["sort", "list"],
        "limits": {"ms": 50},
    }
    [plain] = read(FREE | others, folder=tmp_path)
    assert plain.extra == others
    verl = {
        "data_source": "mine",
        "prompt": [{"role": "user", "content": "Write a list"}],
        "reward_model": {"style": "rule", "ground_truth": "1 2 3"},
        "extra_info": {"index": 0, "problem_type": "free-form", **others},
    }
    [prompt] = read(verl, folder=tmp_path)
    assert prompt.extra == {"index": 0, "data_source": "mine", **others}


@pytest.mark.parametrize("column", ["problem_type", "solution", "video", "options", "id", "role"])
def test_no_message_is_as_long_as_its_input(tmp_path: Path, column: str) -> None:
    long = "no such thing " * 5_000
    row = FREE | {column: long, "options": ["a"] if column == "options" else None}
    if column == "role":
        row = {"messages": [{"role": long, "content": "x"}], "solution": "a"}
    if column == "options":
        row |= {"options": [long, 3, long], "solution": long, "problem_type": "multiple choice"}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    problems = validate(path, DataConfig(), decode=False).problems
    assert problems
    for problem in problems:
        assert len(problem.what) + len(problem.remedy) + len(problem.id) < 900


# -- files and rows that say something else than they seem to ------------------------------------

TWO = {"options": ["red", "green"]}
IMAGE = {"image": "a.png"}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def asked(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), "solution": "hat", "problem_type": "free-form", **more}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        # Two things in one: which is meant?
        (FREE | {"question": "Where?"}, "'problem' and 'question' say different things; keep the"),
        (FREE | {"answer": "walk"}, "'solution' and 'answer' say different things"),
        (CHOICE | {"options": ["A. red", "A. green"], "solution": "A"}, "have the letter A"),
        (CHOICE | {"options": ["A. red", "B. red"], "solution": "B"}, "is both the option B and A"),
        (CHOICE | {"options": ["A. B", "B. A"], "solution": "B"}, "is both the option B and A"),
        (
            FREE | {"solution": [said("assistant", "a"), said("assistant", "b")]},
            "2 completions; keep the one",
        ),
        (FREE | {"solution": ["dog", "cat"]}, "the answer is a list; give the answer as text (se"),
        (
            CHOICE | TWO | {"problem_type": "multi-label", "solution": "A, F"},
            "the label 'F' is none of the options",
        ),
        (FREE | {"image": {"image": "a.png", "fps": 2}}, "image entry has 'fps', which no image"),
        (FREE | {"audio": {"audio": "a.wav", "max_pixels": 9}}, "'max_pixels', which no audio"),
        (FREE | {"image": {"image": "a.png", "video_end": 2}}, "a window in time; remove it"),
        (FREE | {"video": {"video": "a.mp4", "fps": 2, "nframes": 8}}, "fps; keep one of them"),
        # What says how a medium is read stands outside its entry.
        (FREE | {"video": "a.mp4", "video_start": 1, "video_end": 4}, "'video_start' says how"),
        (FREE | {"video": "a.mp4", "nframes": 8}, "'nframes' says how a medium is read"),
        (FREE | {"video": 0}, "video is given as a int"),
        (FREE | {"img1": "a"}, "column 'img1' names media"),
        (FREE | {"visual": "v_123"}, "column 'visual' names media"),
        (FREE | {"video_name": "my holiday"}, "column 'video_name' names media"),
        # Places and tokens that would be read as text.
        (asked(said("user", "<IMAGE> Which?"), **IMAGE), "holds <IMAGE>, which is no place"),
        (asked(said("user", "See <image_1>: which?"), **IMAGE), "holds <image_1>, which is no"),
        (asked(said("user", "[image] Which?"), **IMAGE), "holds [image], which is no place"),
        (asked(said("user", "<|image_pad|>Which?"), **IMAGE), "<|image_pad|>, a token of a chat"),
        (FREE | {"problem": "q<|im_end|>\n"}, "the question holds <|im_end|>, a token of a chat"),
        (CHOICE | {"options": ["red", "<|im_end|>"], "solution": "A"}, "the options holds <|im"),
        (
            {"question": "<image> <image>?", "answer": "a", "problem_type": "ocr"}
            | {"media": {"in_text": True, "items": [{"kind": "image", "uri": "a.png"}]}},
            "the places in the question are ['image', 'image'], the media ['image']",
        ),
        (
            {"question": "See <image>", "answer": "a", "problem_type": "ocr"}
            | {"media": {"items": [{"kind": "image", "uri": "a.png"}]}},
            "set media.in_text to true",
        ),
        (
            {"question": "q", "answer": "a", "problem_type": "ocr"}
            | {"media": {"items": [{"kind": "image", "uri": "data:image/png;base64,AAAA"}]}},
            "embedded as a data URL",
        ),
        # Conversations as others write them.
        (asked({"from": "human", "value": "q"}), "but of ['from', 'value']; write them as role"),
        (asked(said("user", [{"text": "q"}])), "the type None; known are text, video"),
        (asked(said("assistant", "hi"), said("user", "q")), "speaks before the user; begin"),
        (asked(said("user", "q"), said("assistant", "<image>"), **IMAGE), "in the assistant's"),
        (FREE | {"messages": "[]"}, "messages is a str; give a list"),
        (
            {"prompt": "q", "reward_model": {"ground_truth": "a"}},
            "messages are not a list of {role, content}; write them",
        ),
        # What is wrapped around a truth, and truths that nobody sees.
        (FREE | {"solution": "<final>run</final>"}, "is wrapped in final; give the ground truth"),
        (FREE | {"solution": "[ANSWER]run[/ANSWER]"}, "is wrapped in ANSWER"),
        (FREE | {"solution": "```\nrun\n```"}, "is wrapped in a code fence"),
        (FREE | {"solution": "Answer: run"}, "begins as a sentence about it"),
        (COUNT | {"solution": "\\boxed{}"}, "the answer is empty"),
        (FREE | {"solution": "\u200b"}, "the answer is empty"),
        (FREE | {"problem": "\u200b\ufeff"}, "the question is empty"),
        # Ids and characters.
        (FREE | {"id": [1]}, "the id is a list; give a text or a number"),
        (FREE | {"id": "x" * 5000}, "is no name (5000 characters)"),
        (FREE | {"note": "\ud800"}, "holds half of a character (\\ud800)"),
        (FREE | {"video": "\ud800.mp4"}, "holds half of a character"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    assert words in refused(row, tmp_path)


@pytest.mark.parametrize("field", ["hint", "system", "caption", "category"])
@pytest.mark.parametrize("value", ["", " ", "nan", "<NA>"])
def test_an_optional_text_that_says_nothing_is_absent(
    tmp_path: Path, field: str, value: str
) -> None:
    [prompt] = read(FREE | {field: value}, folder=tmp_path)
    assert not getattr(prompt, field)


@pytest.mark.parametrize("answer", ["AC", "A, C", "A and C", "dog|bird", "A和C", "dog, bird", "c"])
def test_labels_among_the_options_are_read_however_they_are_joined(
    tmp_path: Path, answer: str
) -> None:
    row = COUNT | {"problem_type": "multi-label", "options": ["dog", "cat", "bird"]}
    assert read(row | {"solution": answer}, folder=tmp_path)[0].answer == answer


def test_options_that_differ_in_dress_alone_have_letters(tmp_path: Path) -> None:
    row = CHOICE | {"options": ["Stop!", "STOP", "Stop."], "solution": "B"}
    assert read(row, folder=tmp_path)[0].answer == "B"


def test_columns_that_agree_or_are_left_out_are_read(tmp_path: Path) -> None:
    rows = [
        COUNT | {"solution": "2 + 0 = 2\n#### 2", "answer": "2"},
        COUNT | {"solution": "so \\boxed{2}", "answer": 2, "problem": "And cats?"},
    ]
    assert [prompt.answer for prompt in read(*rows, folder=tmp_path)] == ["2", "2"]
    row = FREE | {"answer": "walk", "video": "a.mp4", "fps": 30}
    [prompt] = read(row, folder=tmp_path, ignore_columns=["answer", "fps"])
    assert prompt.answer == "run" and prompt.extra == {}
    nested = COUNT | {"solution": "\\boxed{\\frac{1}{\\sqrt{2}}}"}
    assert read(nested, folder=tmp_path)[0].answer == "\\frac{1}{\\sqrt{2}}"


def test_a_nul_in_a_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(FREE | {"video": "a\0.mp4"}))
    [problem] = validate(tmp_path / "d.jsonl", DataConfig(), decode=True).problems
    assert "NUL" in problem.what and problem.remedy == "correct the media path"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet", "d.jsonl.gz"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "is a pointer of Git LFS, not the file itself; fetch it (git lfs pull)"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page, not the file itself; download"),
        (b"\x1f\x8b\x08\x00", "is packed (gzip); unpack it"),
    ],
)
def test_what_lies_in_the_place_of_a_dataset_is_named(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(tmp_path / name, DataConfig())
    assert words in str(caught.value)


def write_parquet(folder: Path, name: str, damage: bool = False) -> None:
    rows = [FREE | {"problem": f"{n * 7919 % 10007}?"} for n in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    if damage:
        data = bytearray((folder / name).read_bytes())
        data[2000:9000] = bytes(7000)
        (folder / name).write_bytes(bytes(data))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path, "damaged.parquet", damage=True)
    columns = [pyarrow.array(["a"])] * 2
    twice = pyarrow.Table.from_arrays(columns, names=["problem", "problem"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    (tmp_path / "more.json").write_text(f"[{json.dumps(FREE)}] {{}}")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    for name, words in {
        "damaged.parquet": "not a readable parquet file",
        "twice.parquet": "has the column 'problem' twice; rename or drop",
        "more.json": "more text follows behind the JSON array",
        "saved": "is no whole folder of `datasets`",
    }.items():
        with pytest.raises(DataError) as caught:
            load_prompts(tmp_path / name, DataConfig())
        assert words in str(caught.value), name


def test_a_folder_is_read_without_what_tools_leave_in_it(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints/train.jsonl", ".cache/x.jsonl", "train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(FREE))
    (tmp_path / "odd.jsonl").mkdir()
    assert len(load_prompts(tmp_path, DataConfig())) == 1
