"""Every dataset layout becomes the same prompts, and every fault names its line and its remedy."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avatar_rl.common.errors import DataError, InputError
from avatar_rl.common.stand_in import stand_in
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import PromptIndex, iter_rows, load_prompts, media_base
from avatar_rl.prompts.record import (
    PROBLEM_TYPE_SPELLINGS,
    MediaItem,
    MediaPlan,
    ProblemType,
    Prompt,
)

NATIVE: dict[str, Any] = {
    "id": "n1",
    "question": "Which colour?",
    "answer": "B",
    "problem_type": "multiple_choice",
    "options": ["A. red", "B. green"],
    "media": {"items": [{"kind": "video", "uri": "media/a.mp4", "frames": 4}]},
}


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def load_one(path: Path, row: Any, **config: Any) -> Prompt:
    (prompt,) = load_prompts(
        write_jsonl(path / "data.jsonl", row), DataConfig.model_validate(config)
    )
    return prompt


def changed(**update: Any) -> dict[str, Any]:
    return {key: value for key, value in (NATIVE | update).items() if value is not None}


def test_a_native_row_survives_the_round_trip(tmp_path: Path) -> None:
    prompt = Prompt(
        id="p",
        question="How many beeps?",
        answer="3",
        problem_type=ProblemType.NUMERICAL,
        media=MediaPlan(
            items=(MediaItem(kind="audio", uri="a.wav", sample_rate=8_000, clip=(0.5, 2.0)),)
        ),
        hint="listen twice",
        needs=("audio",),
        extra={"level": "2"},
    )
    assert load_one(tmp_path, prompt.model_dump_json(exclude_defaults=True)) == prompt


def test_decode_settings_fill_only_what_a_row_leaves_open(tmp_path: Path) -> None:
    row = changed(
        media={
            "items": [
                {"kind": "video", "uri": "a.mp4", "frames": 4, "max_pixels": 900},
                {"kind": "video", "uri": "b.mp4"},
                {"kind": "audio", "uri": "c.wav"},
                {"kind": "audio", "uri": "d.wav", "sample_rate": 8_000},
            ]
        }
    )
    prompt = load_one(tmp_path, row, fps=1.5, min_pixels=100, max_pixels=500, sample_rate=24_000)
    first, second, third, fourth = prompt.media.items
    assert (first.frames, first.fps, first.min_pixels, first.max_pixels) == (4, None, 100, 900)
    assert (second.frames, second.fps, second.min_pixels, second.max_pixels) == (
        None,
        1.5,
        100,
        500,
    )
    assert (third.sample_rate, fourth.sample_rate) == (24_000, 8_000)
    assert third.max_pixels is None


def test_sound_tracks_of_videos_are_taken_on_request(tmp_path: Path) -> None:
    row = changed(media={"items": [{"kind": "video", "uri": "a.mp4", "clip": [1, 2]}]})
    plan = load_one(tmp_path, row, audio_in_video=True).media
    assert plan.audio_in_video
    assert [(item.kind, item.uri, item.clip) for item in plan.items] == [
        ("video", "a.mp4", (1, 2)),
        ("audio", "a.mp4", (1, 2)),
    ]
    assert not load_one(
        tmp_path, changed(media={"items": []}), audio_in_video=True
    ).media.audio_in_video


def test_video_r1_row(tmp_path: Path) -> None:
    row = {
        "problem_id": 7,
        "problem": "What happens first?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. It rains", "B. It snows"],
        "solution": "<answer>B</answer>",
        "path": "./STAR/x.mp4",
        "data_source": "STAR",
        "process": "<think>I look.</think>",
    }
    prompt = load_one(tmp_path, row, frames=16)
    assert prompt == Prompt(
        id="7",
        question="What happens first?",
        answer="B",
        problem_type=ProblemType.MULTIPLE_CHOICE,
        options=("A. It rains", "B. It snows"),
        media=MediaPlan(items=(MediaItem(kind="video", uri="./STAR/x.mp4", frames=16),)),
        reasoning="I look.",
        extra={"data_source": "STAR"},
    )


def test_conversational_row_with_typed_parts(tmp_path: Path) -> None:
    row = {
        "id": "c1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {
                        "type": "video",
                        "video": "a.mp4",
                        "fps": 2.0,
                        "video_start": 1.0,
                        "video_end": 3.0,
                    },
                    {"type": "audio", "text": "", "video": None},
                    {"type": "text", "text": "How many dogs?"},
                ],
            },
            {"role": "assistant", "content": "<think>one, two</think>\n<answer>2</answer>"},
        ],
        "audios": ["a.wav"],
        "problem_type": "numerical",
    }
    prompt = load_one(tmp_path, row)
    assert (prompt.system, prompt.question, prompt.answer, prompt.reasoning) == (
        "Be brief.",
        "How many dogs?",
        "2",
        "one, two",
    )
    assert prompt.media.items == (
        MediaItem(kind="video", uri="a.mp4", fps=2.0, clip=(1.0, 3.0)),
        MediaItem(kind="audio", uri="a.wav", sample_rate=16_000),
    )


def test_swift_row_keeps_the_order_of_its_tags(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "<audio><video>Who speaks?<image>"}],
        "videos": ["v.mp4"],
        "audios": ["a.wav"],
        "images": ["i.png"],
        "solution": "the girl",
    }
    prompt = load_one(tmp_path, row, problem_type="free_form")
    assert prompt.question == "Who speaks?" and prompt.problem_type is ProblemType.FREE_FORM
    assert [item.uri for item in prompt.media.items] == ["a.wav", "v.mp4", "i.png"]
    untagged = row | {"messages": [{"role": "user", "content": "Who speaks?"}]}
    assert {
        item.uri for item in load_one(tmp_path, untagged, problem_type="free_form").media.items
    } == {
        "a.wav",
        "v.mp4",
        "i.png",
    }


VERL = {
    "data_source": "geo",
    "prompt": [{"role": "user", "content": "<image>What is x?"}],
    "images": [{"path": "i.png"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "12"},
    "extra_info": {"split": "train", "index": 3, "level": "easy"},
}


def test_verl_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL]), tmp_path / "data.parquet")
    (prompt,) = load_prompts(
        tmp_path / "data.parquet", DataConfig(problem_type=ProblemType.NUMERICAL)
    )
    assert (prompt.id, prompt.question, prompt.answer, prompt.category) == (
        "geo/train/3",
        "What is x?",
        "12",
        "math",
    )
    assert prompt.media.items == (MediaItem(kind="image", uri="i.png"),)
    assert prompt.extra == {"split": "train", "index": 3, "level": "easy", "data_source": "geo"}


def test_embedded_media_are_refused_or_written_out(tmp_path: Path) -> None:
    content = b"\x89PNG not really"
    path = tmp_path / "data.parquet"
    row = VERL | {"images": [{"bytes": content, "path": None}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    with pytest.raises(InputError, match="extract_to"):
        load_prompts(path, DataConfig(problem_type=ProblemType.NUMERICAL))
    config = DataConfig(problem_type=ProblemType.NUMERICAL, extract_to=tmp_path / "media")
    ((item,),) = [prompt.media.items for prompt in load_prompts(path, config)]
    assert Path(item.uri).read_bytes() == content and item.uri.endswith(".png")


def test_native_rows_from_parquet_and_saved_datasets(tmp_path: Path) -> None:
    import datasets

    plain = write_jsonl(tmp_path / "data.jsonl", NATIVE, changed(id="n2", hint="look", media=None))
    expected = load_prompts(plain, DataConfig())
    # parquet and Arrow give every row every key, absent ones as None
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=_schema()), tmp_path / "data.parquet"
    )
    assert load_prompts(tmp_path / "data.parquet", DataConfig()) == expected
    saved = datasets.Dataset(pyarrow.Table.from_pylist(rows, schema=_schema()))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"))
    assert load_prompts(tmp_path / "saved", DataConfig()) == expected
    with pytest.raises(
        InputError, match=r"no split 'test'; set data\.reader\.split to one of \['train'\]"
    ):
        load_prompts(tmp_path / "saved", DataConfig(split="test"))


def _schema() -> pyarrow.Schema:
    text = pyarrow.string()
    item = pyarrow.struct(
        {"kind": text, "uri": text, "frames": pyarrow.int64(), "sample_rate": pyarrow.int64()}
    )
    media = pyarrow.struct({"items": pyarrow.list_(item)})
    names = {name: text for name in ("id", "question", "answer", "problem_type", "hint")}
    return pyarrow.schema(names | {"options": pyarrow.list_(text), "media": media})


def test_json_array_and_folder_of_shards(tmp_path: Path) -> None:
    rows = [changed(id=f"n{index}") for index in range(5)]
    (tmp_path / "data.json").write_text(json.dumps(rows, indent=2))
    assert [prompt.id for prompt in load_prompts(tmp_path / "data.json", DataConfig())] == [
        r["id"] for r in rows
    ]
    shards = tmp_path / "shards"
    shards.mkdir()
    write_jsonl(shards / "train-0.jsonl", *rows[:2])
    write_jsonl(shards / "train-1.jsonl", *rows[2:4])
    write_jsonl(shards / "test-0.jsonl", rows[4])
    assert [prompt.id for prompt in load_prompts(shards, DataConfig())] == ["n0", "n1", "n2", "n3"]
    assert [prompt.id for prompt in load_prompts(shards, DataConfig(split="test"))] == ["n4"]
    assert (
        media_base(shards, DataConfig()) == shards
        and media_base(tmp_path / "data.json", DataConfig()) == tmp_path
    )
    assert len(load_prompts(shards, DataConfig(limit=3))) == 3


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("multiple choice", "multiple_choice"),
        ("Multiple-Choice", "multiple_choice"),
        ("OCR", "ocr"),
        ("free-form", "free_form"),
        ("open-ended", "free_form"),
        ("Numerical", "numerical"),
        ("regression", "regression"),
        ("multi-label", "multi_label"),
        ("localization", "localisation"),
    ],
)
def test_spellings_of_problem_types(tmp_path: Path, spelling: str, expected: str) -> None:
    assert load_one(tmp_path, changed(problem_type=spelling)).problem_type == expected


def test_every_known_spelling_is_its_own_folded_form() -> None:
    for spelling in PROBLEM_TYPE_SPELLINGS:
        assert spelling == spelling.lower() and not set(spelling) & set(" -/")
    assert {kind.value for kind in ProblemType} <= set(PROBLEM_TYPE_SPELLINGS)


@pytest.mark.parametrize(
    ("options", "answer", "expected_options", "expected_answer"),
    [
        (["A. red", "B. green"], "<answer>B</answer>", ("A. red", "B. green"), "B"),
        (["(A) red", "(B) green"], "(B)", ("(A) red", "(B) green"), "B"),
        (["red", "green"], "green", ("A. red", "B. green"), "B"),
        (["red", "green"], "A. red", ("A. red", "B. green"), "A"),
        ({"A": "red", "B": "green", "C": None}, "B", ("A. red", "B. green"), "B"),
        (["A dog", "A cat"], "A cat", ("A. A dog", "B. A cat"), "B"),
        ([1, 2, 3], 2, ("A. 1", "B. 2", "C. 3"), "B"),
    ],
)
def test_options_get_letters_and_the_answer_becomes_one(
    tmp_path: Path,
    options: Any,
    answer: Any,
    expected_options: tuple[str, ...],
    expected_answer: str,
) -> None:
    prompt = load_one(tmp_path, changed(options=options, answer=answer))
    assert (prompt.options, prompt.answer) == (expected_options, expected_answer)


def test_options_repeated_in_the_question_are_asked_once(tmp_path: Path) -> None:
    prompt = load_one(tmp_path, changed(question="Which colour?\nOptions:\nA. red\nB. green"))
    assert prompt.question == "Which colour?" and prompt.options == ("A. red", "B. green")


def test_letters_in_the_question_will_do_instead_of_options(tmp_path: Path) -> None:
    prompt = load_one(tmp_path, changed(question="Which?\n(A) red\n(B) green", options=None))
    assert prompt.answer == "B" and prompt.options == ()


def test_rows_without_an_id_get_one_from_their_content(tmp_path: Path) -> None:
    first, again = (
        load_one(tmp_path, changed(id=None)),
        load_one(tmp_path, changed(id=None, hint="look")),
    )
    other = load_one(tmp_path, changed(id=None, answer="A"))
    elsewhere = load_one(
        tmp_path, changed(id=None, media={"items": [{"kind": "video", "uri": "b.mp4"}]})
    )
    assert first.id == again.id and len({first.id, other.id, elsewhere.id}) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"id": "x", "question" "y"}',
            r"data\.jsonl:2: malformed JSON at column 24: .*; each line",
        ),
        ("[1, 2]", r"data\.jsonl:2: holds list, not an object; each line must be one JSON object"),
        (
            changed(problem_type="riddle"),
            r"data\.jsonl:2: unknown problem type 'riddle'; use one of: .*mcq",
        ),
        (
            changed(problem_type=None, options=None, answer="7"),
            r":2: no problem type; .*data\.reader\.problem_type",
        ),
        (changed(answer=None), r":2: no answer; give the answer"),
        (changed(answer="<answer> </answer>"), r":2: the answer is empty"),
        (changed(answer=["B"]), r":2: the answer is a list"),
        (changed(question="  "), r":2: the question is empty"),
        (changed(options=None), r":2: multiple choice without options; add options"),
        (
            changed(options=None, question="(A) x (B) y", answer="C"),
            r":2: the answer 'C' is not one of the letters",
        ),
        (changed(answer="blue"), r":2: the answer 'blue' is none of the options"),
        (changed(options="A. red"), r":2: options are not a list of texts"),
        (
            changed(id="first"),
            r":2: the id 'first' is also that of .*data\.jsonl:1; make ids unique",
        ),
        (changed(hnt="x"), r":2: field 'hnt': Extra inputs are not permitted; correct or remove"),
        (
            changed(media={"items": [{"kind": "video", "uri": "a", "clip": [3, 1]}]}),
            r"'media\.items\.0': .*clip",
        ),
        (
            {"foo": 1},
            r":2: layout not recognised from the keys \['foo'\]; set data\.reader\.format",
        ),
        (
            {"messages": [{"role": "user", "content": "<video>?"}], "solution": "x"},
            r":2: a video place .*without",
        ),
        (
            {
                "messages": [{"role": "user", "content": "<video>?"}],
                "videos": ["a", "b"],
                "solution": "x",
            },
            r":2: 1 more videos than <video> places",
        ),
        (
            {"messages": [{"role": "user", "content": "?"}] * 2, "solution": "x"},
            r":2: 2 user turns",
        ),
        (
            {"messages": [{"role": "tool", "content": "?"}], "solution": "x"},
            r":2: message of the role 'tool'",
        ),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "video", "video": ["1.png"]}]}],
                "solution": "x",
            },
            r":2: video entry without a path; .*frame lists",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "video", "video": "a", "speed": 2}]}
                ],
                "solution": "x",
            },
            r":2: video entry has the unknown key 'speed'",
        ),
    ],
)
def test_faulty_rows_name_line_and_remedy(tmp_path: Path, row: Any, message: str) -> None:
    layout = "native" if isinstance(row, dict) and "question" in row else "auto"
    path = tmp_path / "data.jsonl"
    write_jsonl(
        path, changed(id="first") if layout == "native" or isinstance(row, str) else "", row
    )
    with pytest.raises(DataError, match=message):
        load_prompts(path, DataConfig(format=layout))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"b" 2}]', r"data\.json:2: malformed JSON at column 7"),
        ('{"a": 1}', r"data\.json:1: starts with '\{', not '\['"),
        ('[{"a": 1}\n', r"data\.json:1: the JSON array ends or breaks"),
        ("[]", r"data\.json: the dataset has no rows"),
        ("", r"data\.json: the dataset has no rows"),
    ],
)
def test_faulty_json_arrays(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        list(iter_rows(path, DataConfig()))


def test_missing_empty_and_unknown_datasets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl: no such dataset"):
        load_prompts(tmp_path / "absent.jsonl", DataConfig())
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty\.jsonl: the dataset has no rows"):
        load_prompts(tmp_path / "empty.jsonl", DataConfig())
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=r"unknown dataset type '\.csv'"):
        load_prompts(tmp_path / "data.csv", DataConfig())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match=r"not a readable parquet file"):
        load_prompts(tmp_path / "bad.parquet", DataConfig())
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="holds no dataset files"):
        load_prompts(tmp_path / "folder", DataConfig())


def test_a_malformed_line_does_not_hide_the_next(tmp_path: Path) -> None:
    rows = list(
        iter_rows(write_jsonl(tmp_path / "data.jsonl", NATIVE, "{", "", NATIVE), DataConfig())
    )
    assert [row.number for row in rows] == [1, 2, 4]
    assert rows[2].data == NATIVE
    with pytest.raises(InputError):
        _ = rows[1].data


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    line=(st.binary(max_size=200) | st.text(max_size=60).map(str.encode)).filter(
        lambda line: b"\n" not in line
    )
)
def test_any_bytes_give_a_row_or_a_data_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(NATIVE).encode() + b"\n")
    if stand_in(path) is not None:  # no row is looked for in a packed file
        with pytest.raises(DataError, match=r"not the file itself|packed"):
            list(iter_rows(path, DataConfig()))
        return
    for row in iter_rows(path, DataConfig()):
        try:
            assert isinstance(row.data, dict)
        except DataError as error:
            assert f"{path}:1" in str(error)
    assert row.number == 2 and row.data == NATIVE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    key=st.sampled_from([*NATIVE, "messages", "videos", "prompt", "reward_model", "solution"]),
    value=JSON,
)
@pytest.mark.parametrize("layout", ["auto", "native", "conversational", "swift"])
def test_any_json_value_gives_a_prompt_or_a_data_error(
    tmp_path: Path, layout: str, key: str, value: Any
) -> None:
    path = write_jsonl(tmp_path / "fuzz.jsonl", NATIVE | {key: value})
    try:
        (prompt,) = load_prompts(path, DataConfig.model_validate({"format": layout}))
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert Prompt.model_validate_json(prompt.model_dump_json()) == prompt


def test_index_finds_prompts_and_knows_what_it_holds(tmp_path: Path) -> None:
    prompts = load_prompts(
        write_jsonl(tmp_path / "a.jsonl", NATIVE, changed(id="n2")), DataConfig()
    )
    index = PromptIndex(prompts)
    assert index["n2"] is prompts[1] and "n1" in index and "x" not in index
    assert (len(index), index.ids, list(index)) == (2, ["n1", "n2"], prompts)
    assert index.fingerprint() == PromptIndex(list(prompts)).fingerprint()
    assert index.fingerprint() != PromptIndex(reversed(prompts)).fingerprint()
    with pytest.raises(DataError, match="no prompt with the id 'x' among 2"):
        index["x"]
    with pytest.raises(DataError, match="'n1' occurs twice"):
        PromptIndex([prompts[0], prompts[0]])


def test_input_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InputError("f:1", "no answer", "give it")))
    assert (
        isinstance(error, InputError)
        and str(error) == "f:1: no answer; give it"
        and error.remedy == "give it"
    )
