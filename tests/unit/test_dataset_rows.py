"""Rows that would lose their media or stop a check of the whole dataset, and media paths every
process agrees on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from avatar_rl.common.errors import DataError, InputError
from avatar_rl.prompts.config import DataConfig, DatasetFormat, MediaConfig
from avatar_rl.prompts.datasets import PromptIndex, iter_rows, load_prompts
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.validate import validate

COUNT = {"problem": "How many?", "solution": "2", "problem_type": "numerical"}
VERL = {
    "prompt": [{"role": "user", "content": "<image>What is x?"}],
    "images": ["i.png"],
    "reward_model": {"ground_truth": "12"},
    "extra_info": {"index": 3},
    "problem_type": "numerical",
}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, row: dict[str, Any], layout: DatasetFormat = "auto") -> Prompt:
    (prompt,) = load_prompts(write(folder, row), DataConfig(format=layout))
    return prompt


def media(prompt: Prompt) -> list[tuple[str, str]]:
    return [(item.kind, item.uri) for item in prompt.media.items]


@pytest.mark.parametrize("spelling", ["video", "Video", " VIDEO "])
def test_the_case_of_data_type_does_not_lose_the_video(tmp_path: Path, spelling: str) -> None:
    assert media(read(tmp_path, COUNT | {"path": "a.mp4", "data_type": spelling})) == [
        ("video", "a.mp4")
    ]


@pytest.mark.parametrize(
    "update", [{}, {"data_type": "video+audio"}, {"data_type": None}, {"data_type": "text"}]
)
def test_a_path_that_no_data_type_claims_is_refused(tmp_path: Path, update: dict[str, Any]) -> None:
    with pytest.raises(
        InputError,
        match=r"data\.jsonl:1: path with the data_type .*; set data_type to one of video,",
    ):
        read(tmp_path, COUNT | {"path": "a.mp4"} | update)


def test_a_path_beside_other_media_is_any_column(tmp_path: Path) -> None:
    turn = {
        "role": "user",
        "content": [{"type": "audio", "audio": "x.wav"}, {"type": "text", "text": "?"}],
    }
    rows: list[tuple[dict[str, Any], str]] = [
        (COUNT | {"videos": ["a.mp4"]}, "video"),
        (VERL, "image"),
        ({"messages": [turn], "solution": "2", "problem_type": "numerical"}, "audio"),
    ]
    for row, kind in rows:
        assert [found for found, _ in media(read(tmp_path, row | {"path": "/data/shard/1"}))] == [
            kind
        ]


def test_an_empty_path_needs_no_data_type(tmp_path: Path) -> None:
    assert media(read(tmp_path, COUNT | {"path": "", "data_type": "text"})) == []


def test_tags_in_a_question_are_places_of_its_media(tmp_path: Path) -> None:
    prompt = read(tmp_path, COUNT | {"problem": "<image>Find x.", "images": ["x.png"]})
    assert prompt.question == "Find x." and media(prompt) == [("image", "x.png")]
    mixed = COUNT | {
        "problem": "<image><video>Find x.",
        "images": ["x.png"],
        "path": "a.mp4",
        "data_type": "video",
    }
    assert media(read(tmp_path, mixed)) == [("image", "x.png"), ("video", "a.mp4")]
    with pytest.raises(
        InputError, match=r"data\.jsonl:1: a image place in the text without a file; add it"
    ):
        read(tmp_path, COUNT | {"problem": "<image>Find x."})
    with pytest.raises(
        InputError, match=r"data\.jsonl:1: 1 more images than <image> places in the text"
    ):
        read(tmp_path, COUNT | {"problem": "<image>Find x.", "images": ["x.png", "y.png"]})
    with pytest.raises(InputError, match=r"data\.jsonl:1: the question is empty"):
        read(tmp_path, COUNT | {"problem": "<image>", "images": ["x.png"]})


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("auto", COUNT | {"reasoning": 5}, r":1: field 'reasoning': .*; correct or remove"),
        ("auto", COUNT | {"process": ["<think>x</think>"]}, r":1: field 'reasoning': "),
        (
            "auto",
            VERL | {"extra_info": "index 3"},
            r":1: extra_info is a str; give extra_info as an object",
        ),
        (
            "verl",
            VERL | {"reward_model": "12"},
            r":1: reward_model is a str; give reward_model as an object",
        ),
        (
            "verl",
            {key: value for key, value in VERL.items() if key != "prompt"},
            r":1: messages are not a list",
        ),
        (
            "verl",
            VERL | {"prompt": [{"role": ["user"], "content": "x"}]},
            r":1: message of the role \['user'\]",
        ),
        (
            "auto",
            VERL | {"images": [{"bytes": "abc"}]},
            r":1: image has its bytes as a str; give a path",
        ),
    ],
)
def test_values_of_a_wrong_kind_name_line_and_remedy(
    tmp_path: Path, layout: DatasetFormat, row: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, row)
    config = DataConfig(format=layout, extract_to=tmp_path / "media")
    with pytest.raises(InputError, match=message):
        load_prompts(path, config)
    assert [problem.where for problem in validate(path, config, decode=False).problems] == [
        f"{path}:1"
    ]


def test_a_number_with_too_many_digits_names_its_line_in_an_array(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"a": 1},\n{"a": ' + "9" * 5_000 + "}]")
    with pytest.raises(InputError, match=r"data\.json:2: malformed JSON \(.*digits.*\); "):
        list(iter_rows(tmp_path / "data.json", DataConfig()))


KEYS = st.sampled_from(["role", "content", "type", "bytes", "path", "index", "x"])
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=6) | st.sampled_from(["user", "image", "<image>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(key=st.sampled_from([*VERL, "reasoning", "path", "data_type", "system"]), value=JSON)
def test_any_value_in_a_verl_row_gives_a_prompt_or_a_data_error(
    tmp_path: Path, key: str, value: Any
) -> None:
    path = write(tmp_path, VERL | {key: value})
    try:
        load_prompts(path, DataConfig(format="verl", extract_to=tmp_path / "media"))
    except DataError as error:
        assert str(path) in str(error)


def test_a_file_url_means_the_same_file_in_a_check_and_in_training(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "my 100%25 picture.png")
    url = f"file://{tmp_path}/my%20100%2525%20picture.png"
    row = {"id": "n", "question": "?", "answer": "2", "problem_type": "numerical"}
    path = write(tmp_path, row | {"media": {"items": [{"kind": "image", "uri": url}]}})
    assert validate(path, DataConfig(), decode=True).ok
    prompt = PromptIndex.read([path], DataConfig())["n"]
    assert media(prompt) == [("image", f"{tmp_path}/my 100%25 picture.png")]
    assert MediaLoader(MediaConfig(), tmp_path).load_plan(prompt.media).images[0].pixels.shape == (
        56,
        56,
        3,
    )


@pytest.mark.parametrize("uri", ["s3://bucket/x.mp4", "https://host/x.mp4"])
def test_training_refuses_remote_media_as_a_check_does(tmp_path: Path, uri: str) -> None:
    path = write(tmp_path, COUNT | {"video": "a.mp4"}, COUNT | {"video": uri})
    with pytest.raises(
        InputError,
        match=rf"data\.jsonl:2: {uri}: media are opened by path only; download them first",
    ):
        PromptIndex.read([path], DataConfig())
