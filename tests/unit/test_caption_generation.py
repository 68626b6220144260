"""`avatar captions generate`, and what every question to a teacher shares: media and a bound on the
cost."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from avatar_rl.cluster.annotation.asking import Budget, TeacherReport
from avatar_rl.cluster.annotation.captions import INSTRUCTIONS, caption_of, generate_captions
from avatar_rl.cluster.annotation.hints import generate_hints
from avatar_rl.cluster.cli import main
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import ConfigError, ResourceError
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import load_prompts
from tests.unit.test_hint_generation import says
from tests.unit.test_rewards_judge_server import Reply, judge_server


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three prompts with sounds of their own, one without sound, one captioned already."""
    rows: list[dict[str, Any]] = []
    for i in range(5):
        row: dict[str, Any] = {"id": f"q{i}", "question": f"What? {i}", "answer": "a whistle"}
        row["problem_type"] = "free_form"
        if i != 3:
            wave = 0.5 * np.sin(np.arange(1600) * 0.1 * (i + 1))
            soundfile.write(tmp_path / f"{i}.wav", wave, 16_000)
            row["audio"] = f"{i}.wav"
        if i == 4:
            row["audio_cues"] = "A dog barks."  # AVATAR's name of the column
        rows.append(row)
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(
    generate: Any, dataset: Path, out: Path, text: str = "A short whistle.", **options: Any
) -> tuple[TeacherReport, list[dict[str, Any]]]:
    with judge_server(lambda n: says(text)) as server:
        endpoint = EndpointConfig.model_validate(
            {"base_url": server.url, "model": "judge", "concurrency": 1, "attempts": 2}
        )
        report = generate(
            dataset, out, endpoint, DataConfig(), progress=lambda done, total: None, **options
        )
        return report, server.requests


def test_captions_are_written_from_the_sound_alone(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "captioned.jsonl"
    report, requests = run(generate_captions, dataset, out)
    assert {name: report.counts[name] for name in ("written", "silent", "kept", "failed")} == {
        "written": 3,
        "silent": 1,
        "kept": 1,
        "failed": 0,
    }
    prompts = {prompt.id: prompt for prompt in load_prompts(out, DataConfig())}
    assert [prompts[f"q{i}"].audio_caption for i in range(5)] == [
        *["A short whistle."] * 3,
        None,
        "A dog barks.",
    ]
    for request in requests:
        system, user = request["messages"]
        assert system["content"] == INSTRUCTIONS
        assert [part["type"] for part in user["content"]] == ["input_audio", "text"]
        sound = base64.b64decode(user["content"][0]["input_audio"]["data"])
        assert soundfile.read(io.BytesIO(sound))[1] == 16_000
        # It knows neither question nor answer; what it says of the answer it heard.
        assert "What? " not in str(user["content"][1]) and "whistle" not in str(user["content"][1])
    assert report.counts["tells_answer"] == 3
    assert (
        prompts["q0"].extra["tells_answer"] == "true" and "tells_answer" not in prompts["q4"].extra
    )


def test_a_second_run_asks_nothing(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "captioned.jsonl"
    run(generate_captions, dataset, out)
    again, requests = run(generate_captions, dataset, out)
    assert again.counts["done_before"] == 5 and not requests


def test_asking_stops_at_the_cost_and_goes_on_with_the_next_run(
    dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captioned.jsonl"
    budget = Budget(per_million_in=1e4, most=1.5)  # a request has 100 prompt tokens: 1.0
    report, requests = run(generate_captions, dataset, out, budget=budget)
    assert len(requests) == 2 and report.counts["written"] == 2 and report.counts["unasked"] == 3
    rest, requests = run(generate_captions, dataset, out)
    assert len(requests) == 1 and rest.counts["done_before"] == 2 and rest.counts["written"] == 1
    assert len(list(load_prompts(out, DataConfig()))) == 5
    with pytest.raises(ConfigError, match="--price-in"):
        run(generate_captions, dataset, tmp_path / "x.jsonl", budget=Budget(most=1.0))


def test_the_hint_teacher_hears_and_sees_the_clip(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "hinted.jsonl"
    report, requests = run(
        generate_hints, dataset, out, "Listen to the pitch first.", attach=("video", "audio")
    )
    assert report.counts["written"] == 5
    kinds = [
        [part["type"] for part in content] if isinstance(content, list) else ["text"]
        for content in (request["messages"][1]["content"] for request in requests)
    ]
    assert sorted(kinds) == [*[["input_audio", "text"]] * 4, ["text"]]


def test_a_prompt_whose_media_are_gone_is_asked_again_later(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "1.wav").unlink()
    out = tmp_path / "captioned.jsonl"
    report, _ = run(generate_captions, dataset, out)
    assert report.counts["media_failed"] == report.counts["failed"] == 1
    assert {prompt.id for prompt in load_prompts(out, DataConfig())} == {"q0", "q2", "q3", "q4"}


def test_the_command_says_what_it_did(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "captioned.jsonl")
    with judge_server(lambda n: says("A short beep.")) as server:
        asked = ["--base-url", server.url, "--model", "judge", "--out", out]
        assert main(["captions", "generate", str(dataset), *asked]) == 0
    said = capsys.readouterr().out
    assert "3 captions written, 1 kept, 1 prompts without sound" in said


def test_an_endpoint_that_takes_no_sound_is_named_soon(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(160), 16_000)
    row = {"question": "What?", "answer": "a", "problem_type": "free_form", "audio": "a.wav"}
    rows = [row | {"id": f"q{i}", "audio_start": i} for i in range(60)]
    dataset = tmp_path / "many.jsonl"
    dataset.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with judge_server(lambda n: Reply(status=400)) as server:
        endpoint = EndpointConfig(base_url=server.url, model="judge", concurrency=1, cache_size=0)
        with pytest.raises(ResourceError, match="any of 16 prompts: see its log, and whether it"):
            generate_captions(
                dataset, tmp_path / "o.jsonl", endpoint, DataConfig(), progress=lambda a, b: None
            )
        assert len(server.requests) <= 16


@pytest.mark.parametrize("reply", ["", "<think>a</think>", "x" * 1001])
def test_replies_that_are_no_caption(reply: str) -> None:
    with pytest.raises(ValueError):
        caption_of(reply)
