"""Group B: dataset files and rows."""

from __future__ import annotations

import math

from avatar_rl.common.types import Json, JsonObject
from benchmarks.bad_inputs.entries import BadInput, Try, dataset, row

FREE: JsonObject = {"problem": "What does he do?", "solution": "run", "problem_type": "free-form"}
COUNT: JsonObject = {"problem": "How many?", "solution": "2", "problem_type": "numerical"}
CHOICE: JsonObject = {"problem": "Which?", "problem_type": "multiple choice", "solution": "B"}
GROUNDING: JsonObject = {
    "messages": [{"role": "user", "content": "<image>Where is <ref-object>?"}],
    "images": ["a.png"],
    "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]},
    "solution": "left",
    "problem_type": "free-form",
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
IN_TEXT: JsonObject = {
    "question": "<image> <image> Which?",
    "answer": "a",
    "problem_type": "ocr",
    "media": {"in_text": True, "items": [{"kind": "image", "uri": "a.png"}]},
}
URL = "data:video/mp4;base64," + "A" * 4000


def chat(content: Json, **more: Json) -> JsonObject:
    return {
        "messages": [{"role": "user", "content": content}],
        "solution": "hat",
        "problem_type": "free-form",
        **more,
    }


def said(*parts: str) -> JsonObject:
    """A conversation of these roles."""
    return {
        "messages": [{"role": role, "content": "hello"} for role in parts],
        "solution": "x",
        "problem_type": "free-form",
    }


WHERE = "d.jsonl:1"
TABLE: tuple[tuple[str, Try, tuple[str, ...]], ...] = (
    ("malformed", row('{"problem": "q", '), (WHERE, "malformed JSON", "mend or remove the line")),
    ("no_object", row("[1, 2]"), (WHERE, "holds list", "one JSON object")),
    ("latin_1", row('{"problem": "café"}'.encode("latin-1")), (WHERE, "not UTF-8", "as UTF-8")),
    ("deep", row("[" * 100_000), (WHERE, "JSON", "mend or remove the line")),
    ("no_file", dataset("absent.jsonl", None), ("absent.jsonl", "no such dataset", "correct")),
    ("empty_file", dataset("d.jsonl", b""), ("d.jsonl", "no rows", "another file or split")),
    ("csv", dataset("d.csv", b"a,b\n1,2\n"), ("d.csv", "unknown dataset type", ".jsonl")),
    ("no_array", dataset("d.json", b'{"a": 1}'), ("d.json:1", "not '['", "JSON Lines")),
    ("broken_array", dataset("d.json", b'[{"a": 1}, {'), ("d.json:1", "mend it")),
    ("no_parquet", dataset("d.parquet", b"PAR1nonsense"), ("d.parquet", "again")),
    ("layout", row({"foo": 1, "bar": 2}), (WHERE, "'bar', 'foo'", "data.reader.format")),
    ("no_answer", row({k: v for k, v in FREE.items() if k != "solution"}), (WHERE, "no answer")),
    ("nan_answer", row(COUNT | {"solution": math.nan}), (WHERE, "no answer", "drop the row")),
    ("nan_question", row(FREE | {"problem": math.nan}), (WHERE, "question", "drop the row")),
    ("infinite", row(COUNT | {"solution": math.inf}), (WHERE, "the answer is inf", "drop the row")),
    ("yes_or_no", row(FREE | {"solution": True}), (WHERE, "the answer is a bool", "as text")),
    ("blank", row(FREE | {"solution": "  "}), (WHERE, "answer is empty", "drop the row")),
    ("empty_tag", row(FREE | {"solution": "<answer></answer>"}), (WHERE, "answer is empty")),
    ("open_think", row(FREE | {"solution": "<think>so run"}), (WHERE, "think tag", "close")),
    ("no_type", row({"problem": "q", "solution": "a"}), (WHERE, "no problem type", "problem_type")),
    ("type", row(FREE | {"problem_type": "essay"}), (WHERE, "'essay'", "use one of")),
    ("two_boxes", row(COUNT | {"solution": "\\boxed{1} \\boxed{2}"}), (WHERE, "1, 2", "is meant")),
    ("no_result", row(COUNT | {"solution": "1 + 1 ####"}), (WHERE, "ends with ####", "number")),
    ("no_options", row(CHOICE), (WHERE, "without options", "add options")),
    (
        "hedged",
        row(CHOICE | {"options": ["red", "green"], "solution": "A or B"}),
        (WHERE, "'A or B' is none of the options", "correct either"),
    ),
    (
        "beyond_options",
        row(CHOICE | {"options": ["red", "green"], "solution": "D"}),
        (WHERE, "'D' is none of the options", "correct either"),
    ),
    ("options_text", row(CHOICE | {"options": 7}), (WHERE, "options", "['A. red', 'B. green']")),
    (
        "nan_option",
        row(CHOICE | {"options": ["red", math.nan]}),
        (WHERE, "option 2 of 2 has no text", "give every option its text"),
    ),
    ("one_option", row(CHOICE | {"options": ["red"]}), (WHERE, "one option", "give all options")),
    (
        "many_options",
        row(CHOICE | {"options": [f"o{n}" for n in range(27)]}),
        (WHERE, "27 options", "keep the likely ones"),
    ),
    (
        "key_twice",
        row('{"problem": "a", "problem": "b", "solution": "x", "problem_type": "ocr"}'),
        (WHERE, "'problem' is there twice", "mend or remove the line"),
    ),
    ("frames", row(FREE | {"video": ["f0.jpg", "f1.jpg"]}), (WHERE, "2 frames", "ffmpeg")),
    ("one_frame", row(FREE | {"video": "f0.webp"}), (WHERE, "1 frames", "ffmpeg")),
    ("video_id", row(FREE | {"videoID": "xk12"}), (WHERE, "'videoID'", "ignore_columns")),
    ("clip_name", row(FREE | {"clip_name": "xk12"}), (WHERE, "'clip_name'", "rename the column")),
    ("audio_file", row(FREE | {"audio_file": "a.wav"}), (WHERE, "'audio_file'", "ignore_columns")),
    ("attached", row(FREE | {"attachments": ["a.mp4"]}), (WHERE, "'attachments'", "rename")),
    ("nested_file", row(FREE | {"file": {"path": "x/a.webm"}}), (WHERE, "'file'", "rename")),
    ("data_url", row(FREE | {"video": URL}), (WHERE, "data URL (4022 characters)", "extract_to")),
    (
        "plain_data_url",
        row(FREE | {"video": "data:video/mp4,abc"}),
        (WHERE, "data URL", "give it as base64"),
    ),
    ("base64", row(FREE | {"video": "A" * 4000}), (WHERE, "4000 characters", "give a path")),
    ("number_as_path", row(FREE | {"video": 17}), (WHERE, "video is given as a int", "a path")),
    ("remote", row(FREE | {"video": "s3://b/a.mp4"}), ("s3://b/a.mp4", "by path only", "download")),
    ("missing_file", row(FREE | {"video": "a.mp4"}), ("a.mp4", "no such file", "fetch the media")),
    (
        "half_window",
        row(FREE | {"video": {"video": "a.mp4", "video_start": 1.0}}),
        (WHERE, "video_start without video_end", "give both"),
    ),
    (
        "unknown_media_key",
        row(FREE | {"video": {"video": "a.mp4", "speed": 2}}),
        (WHERE, "unknown key 'speed'", "remove it"),
    ),
    ("no_frames", row(FREE | {"video": {"video": "a.mp4", "nframes": 0}}), (WHERE, "frames")),
    ("grounding", row(GROUNDING), (WHERE, "`objects`, which is not read", "into the text")),
    ("two_users", row(said("user", "assistant", "user")), (WHERE, "2 user turns", "split or join")),
    ("no_user", row(said("system")), (WHERE, "0 user turns", "one question")),
    ("tool_turn", row(said("user", "tool")), (WHERE, "role 'tool'", "only system, user")),
    ("tag_without_file", row(chat("<image>Which?")), (WHERE, "image place", "drop the tag")),
    (
        "file_without_tag",
        row(chat("<image>Which?", images=["a.png", "b.png"])),
        (WHERE, "1 more images", "add the tag, or drop the file"),
    ),
    ("odd_part", row(chat([{"type": "tool_use"}])), (WHERE, "'tool_use'", "known are text")),
    ("no_content", row(chat(7)), (WHERE, "content is a int", "text or a list of parts")),
    ("data_type", row(FREE | {"path": "a.bin", "data_type": "3d"}), (WHERE, "'3d'", "data_type")),
    ("two_questions", row(FREE | {"question": "Where?"}), (WHERE, "'question'", "keep the one")),
    ("two_answers", row(FREE | {"answer": "walk"}), (WHERE, "'answer' say different", "keep the")),
    ("answers", row(FREE | {"solution": ["dog", "cat"]}), (WHERE, "is a list", "as text")),
    (
        "letter_twice",
        row(CHOICE | {"options": ["A. red", "A. green"], "solution": "A"}),
        (WHERE, "have the letter A", "a letter of its own"),
    ),
    (
        "option_twice",
        row(CHOICE | {"options": ["A. red", "B. red"]}),
        (WHERE, "both the option B and A", "options that differ"),
    ),
    (
        "label_beyond",
        row(COUNT | {"problem_type": "multi-label", "solution": "A, F", "options": ["x", "y"]}),
        (WHERE, "the label 'F' is none", "correct either"),
    ),
    (
        "window_beside",
        row(FREE | {"video": "a.mp4", "video_end": 4}),
        ("'video_end'", "ignore_co"),
    ),
    (
        "rate_twice",
        row(FREE | {"video": {"video": "a.mp4", "fps": 2, "nframes": 4}}),
        ("keep one",),
    ),
    ("video_0", row(FREE | {"video": 0}), (WHERE, "given as a int", "a path")),
    ("column_img1", row(FREE | {"img1": "a"}), (WHERE, "'img1'", "rename the column")),
    ("spaced_name", row(FREE | {"video_name": "my day"}), (WHERE, "'video_name'", "rename")),
    ("place_upper", row(chat("<IMAGE>Which?", images=["a.png"])), (WHERE, "<IMAGE>", "write <vid")),
    ("place_mmmu", row(chat("<image 1> Which?", images=["a.png"])), (WHERE, "<image 1>", "write")),
    ("place_square", row(chat("[image] Which?", images=["a.png"])), (WHERE, "[image]", "write")),
    ("place_token", row(chat("<|image_pad|>Which?")), (WHERE, "<|image_pad|>", "plain text")),
    ("turn_token", row(FREE | {"problem": "q<|im_end|>"}), (WHERE, "<|im_end|>", "plain text")),
    ("places", row(IN_TEXT), (WHERE, "['image', 'image']", "write one")),
    (
        "sharegpt",
        row({"conversations": [{"from": "human", "value": "q"}], "solution": "a"}),
        (WHERE, "['from', 'value']", "role (system, user, assistant) and content"),
    ),
    ("untyped_part", row(chat([{"text": "q"}])), (WHERE, "the type None", '{"type": "text"')),
    ("assistant_first", row(said("assistant", "user")), (WHERE, "before the user", "begin with")),
    ("verl_text", row({"prompt": "q", "reward_model": {}}), (WHERE, "not a list of", "write them")),
    ("wrapped", row(FREE | {"solution": "<final>x</final>"}), (WHERE, "wrapped in final", "alone")),
    ("prefixed", row(FREE | {"solution": "Answer: run"}), (WHERE, "as a sentence", "alone")),
    ("empty_box", row(COUNT | {"solution": "\\boxed{}"}), (WHERE, "answer is empty", "drop")),
    ("invisible", row(FREE | {"solution": "\u200b"}), (WHERE, "answer is empty", "drop")),
    ("half_character", row(FREE | {"note": "\ud800"}), (WHERE, "half of a character", "anew")),
    ("nul", row(FREE | {"video": "a\0.mp4"}), (WHERE, "NUL", "correct the media path")),
    ("id", row(FREE | {"id": [1]}), (WHERE, "the id is a list", "no id at all")),
    ("lfs", dataset("d.jsonl", LFS), ("d.jsonl", "pointer of Git LFS", "git lfs pull")),
    ("lfs_parquet", dataset("d.parquet", LFS), ("d.parquet", "pointer of Git LFS", "git lfs pull")),
    ("web_page", dataset("d.json", b"<html>404"), ("d.json", "is a web page", "download")),
    ("packed", dataset("d.jsonl.gz", b"\x1f\x8b\x08"), ("d.jsonl.gz", "gzip", "unpack it")),
    ("behind_array", dataset("d.json", b'[{"a": 1}] x'), ("d.json:1", "more text follows", "mend")),
    (
        "same_id",
        row('{"id": "a", "problem": "q", "solution": "r", "problem_type": "ocr"}\n' * 2),
        ("d.jsonl:2", "the id 'a' is also that of", "make ids unique"),
    ),
    (
        "leaking_hint",
        row(FREE | {"hint": "He will run, look."}),
        (WHERE, "the hint gives the answer away", "write a strategy"),
    ),
    ("needs", row(FREE | {"needs": ["audio"]}), (WHERE, "needs audio but has none", "`needs`")),
    (
        "sound_beside_video",
        row(FREE | {"video": "a.mp4", "audio": "a.wav"}, audio_in_video=True),
        (WHERE, "audio of its own beside its video", "audio_in_video: false"),
    ),
)
ENTRIES = [BadInput("B", name, act, words, True) for name, act, words in TABLE]
