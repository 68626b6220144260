"""`avatar hints generate` against a teacher on a local HTTP server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avatar_rl.cluster.annotation.asking import TeacherReport
from avatar_rl.cluster.annotation.hints import generate_hints, one_line
from avatar_rl.cluster.cli import main
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import ConfigError, ResourceError
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import load_prompts
from tests.unit.media_files import tone, write_video
from tests.unit.test_rewards_judge_server import Reply, Server, judge_server

USAGE = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [
        {
            "id": f"q{i}",
            "question": f"How many of {i}?",
            "answer": "42",
            "problem_type": "numerical",
        }
        for i in range(6)
    ]
    rows[5]["hint"] = "Count slowly."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def says(text: str) -> Reply:
    """A chat completion with usage."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
    }
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [choice],
        "usage": USAGE,
    }
    return Reply(raw=json.dumps(body))


def run(
    dataset: Path, out: Path, script: Callable[[int], Reply], **changes: Any
) -> tuple[TeacherReport, list[dict[str, Any]], list[tuple[int, int]]]:
    """Report, requests the teacher saw, progress."""
    progress: list[tuple[int, int]] = []
    with judge_server(script) as server:
        fast = {
            "backoff_s": 0.002,
            "attempts": 3,
            "concurrency": 2,
            "deadline_s": 60.0,
            "request_timeout_s": 20.0,
        }
        teacher = EndpointConfig.model_validate(
            {"base_url": server.url, "model": "judge", **fast, **changes}
        )
        report = generate_hints(
            dataset,
            out,
            teacher,
            DataConfig(),
            progress=lambda done, total: progress.append((done, total)),
        )
        return report, server.requests, progress


def test_every_prompt_gets_a_hint_and_the_result_is_a_dataset(
    dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hinted.jsonl"
    report, requests, progress = run(dataset, out, lambda n: says("Look closely before you count."))
    assert report.counts["written"] == 5 and report.counts["kept"] == 1
    assert (report.requests, report.prompt_tokens, report.completion_tokens) == (5, 500, 35)
    assert report.cost(2.0, 10.0) == pytest.approx((500 * 2 + 35 * 10) / 1e6)
    assert progress[-1] == (6, 6)
    prompts = {prompt.id: prompt for prompt in load_prompts(out, DataConfig())}
    assert len(prompts) == 6 and prompts["q5"].hint == "Count slowly."
    assert prompts["q0"].hint == "Look closely before you count." and prompts["q0"].answer == "42"
    material = json.loads(requests[0]["messages"][1]["content"])
    assert material["true_answer"] == "42"


def test_a_rerun_asks_only_for_what_is_missing_and_drops_a_torn_line(
    dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hinted.jsonl"
    with pytest.raises(ResourceError):
        run(
            dataset,
            tmp_path / "none.jsonl",
            lambda n: Reply(status=400),
            breaker_failures=100,
            attempts=1,
        )
    report, _, _ = run(
        dataset,
        out,
        lambda n: says("Listen first.") if n < 2 else Reply(status=400),
        concurrency=1,
        breaker_failures=100,
    )
    assert report.counts["written"] == 2 and report.counts["failed"] == 3
    with out.open("a") as file:
        file.write('{"id": "q4", "quest')
    again, requests, _ = run(dataset, out, lambda n: says("Listen first."))
    assert again.counts["written"] == 3 and again.counts["done_before"] == 3 and len(requests) == 3
    assert {prompt.id for prompt in load_prompts(out, DataConfig())} == {f"q{i}" for i in range(6)}


def test_a_leak_is_asked_for_once_more_and_then_refused(dataset: Path, tmp_path: Path) -> None:
    def script(n: int) -> Reply:
        return says("Forty-two? Say 42.") if n != 1 else says("Watch the whole clip.")

    report, requests, _ = run(dataset, tmp_path / "out.jsonl", script, concurrency=1)
    assert (
        report.counts["retried_leaks"] == 5
        and report.counts["refused"] == 4
        and report.counts["written"] == 1
    )
    assert "gave the answer away" in requests[1]["messages"][1]["content"]
    marked = [
        p for p in load_prompts(tmp_path / "out.jsonl", DataConfig()) if p.extra.get("hint_refused")
    ]
    assert len(marked) == 4 and all(prompt.hint is None for prompt in marked)


def test_a_teacher_under_fire_is_asked_again(dataset: Path, tmp_path: Path) -> None:
    trouble = [
        Reply(status=500),
        Reply(cut=True),
        says("a\nb"),
        Reply(status=429, headers={"Retry-After": "0.01"}),
    ]
    report, _, _ = run(
        dataset,
        tmp_path / "out.jsonl",
        lambda n: trouble[n] if n < 4 else says("Look twice."),
        attempts=6,
    )
    assert report.counts["written"] == 5 and report.counts["failed"] == 0


def test_bad_input_is_named(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = ["--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--deadline", "5"]
    assert (
        main(["hints", "generate", str(dataset), "--out", str(tmp_path / "o.jsonl"), *teacher]) == 1
    )
    assert "hint teacher at http://127.0.0.1:9/v1 does not answer" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is the dataset itself"):
        run(dataset, dataset, lambda n: Reply())
    with pytest.raises(ConfigError, match=r"written as \.jsonl"):
        run(dataset, tmp_path / "o.json", lambda n: Reply())


@pytest.mark.parametrize("reply", ["", "one\ntwo", "x" * 301])
def test_replies_that_are_no_sentence(reply: str) -> None:
    with pytest.raises(ValueError):
        one_line(reply)


def test_a_sentence_is_unwrapped() -> None:
    assert one_line('<think>hm</think>\n "Hint: Look up." ') == "Look up."


def write_clips(folder: Path) -> Path:
    """A video with sound, one without, and a question about each."""
    colours = [(30 * n, 0, 0) for n in range(8)]
    write_video(folder / "loud.mp4", colours, sound=tone(440, 1.0, 48_000))
    write_video(folder / "mute.mp4", colours)
    rows = [
        {
            "id": name,
            "question": f"What rings in {name}?",
            "answer": "phone",
            "video": f"{name}.mp4",
        }
        | {"problem_type": "free_form"}
        for name in ("loud", "mute")
    ]
    file = folder / "clips.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def kinds_of(request: dict[str, Any]) -> list[str]:
    return [part["type"] for part in request["messages"][-1]["content"]]


def hinted_clips(dataset: Path, deaf: bool, *options: str) -> list[dict[str, Any]]:
    """What a teacher was asked by `avatar hints generate`; a deaf one refuses sound."""
    servers: list[Server] = []

    def script(n: int) -> Reply:
        heard = "input_audio" in json.dumps(servers[0].requests[n])
        return Reply(status=400) if deaf and heard else says("Listen for what rings.")

    with judge_server(script) as server:
        servers.append(server)
        told = ["hints", "generate", str(dataset), "--base-url", server.url, "--model", "judge"]
        out = dataset.with_name(f"hinted-{deaf}.jsonl")
        assert (
            main([*told, "--out", str(out), "--concurrency", "1", "--frames", "2", *options]) == 0
        )
        hints = [prompt.hint for prompt in load_prompts(out, DataConfig())]
        assert hints == ["Listen for what rings."] * 2
        return server.requests


def test_the_teacher_hears_what_the_rows_have_if_it_takes_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole clip, frames and sound, by default (docs/method.md 1.4)."""
    asked = hinted_clips(write_clips(tmp_path), deaf=False)
    assert kinds_of(asked[0]) == ["input_audio", "text"]  # whether it hears
    seen = ["image_url", "image_url"]
    assert kinds_of(asked[1]) == [*seen, "input_audio", "text"]
    assert kinds_of(asked[2]) == [*seen, "text"] and len(asked) == 3
    assert "takes no sound" not in capsys.readouterr().err


def test_a_deaf_teacher_is_asked_once_and_shown_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = hinted_clips(write_clips(tmp_path), deaf=True)
    seen = ["image_url", "image_url", "text"]
    assert [kinds_of(one) for one in asked] == [["input_audio", "text"], seen, seen]
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "takes no sound: it is shown video and image only (--attach video --attach audio insists)"
        in said
    )


def test_what_is_attached_by_hand_is_what_is_shown(tmp_path: Path) -> None:
    asked = hinted_clips(write_clips(tmp_path), True, "--attach", "video")
    assert [kinds_of(one) for one in asked] == [["image_url", "image_url", "text"]] * 2
