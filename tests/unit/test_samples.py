"""Which completions a run keeps to be read, what their rows say, and the bound of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.samples import PER_TOKEN, rotate, sample_lines
from avatar_rl.learner.batch.plan import Standing, StepWork, plan_step
from avatar_rl.learner.config import LearnerConfig
from avatar_rl.learner.model.policy import PolicyOutput
from avatar_rl.learner.samples import SampleRecorder, informative, pieces
from avatar_rl.prompts.record import MediaItem, MediaPlan, ProblemType, Prompt

VERSION = 7


class Bytes:
    """A tokenizer with a token per byte: characters of several tokens, as byte-level BPE has."""

    def decode(
        self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        return bytes(ids).decode(errors="replace")


def trajectory(group: int, index: int, reward: float, text: str = "ab") -> Trajectory:
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Trajectory(
        id=f"{group:08d}.{index}",
        group_id=f"{group:08d}",
        prompt_id=f"p{group}",
        index=index,
        hinted=False,
        prompt_tokens=3,
        prompt_digest=0,
        token_ids=ids,
        logprobs=np.linspace(-2, -1, len(ids), dtype=np.float32),
        versions=((VERSION - group, len(ids)),),
        finish_reason="stop",
        temperature=1.0,
        reward=reward,
        components={"accuracy": reward, "judge": None},
        step=1,
    )


def group_of(number: int, rewards: list[float], texts: list[str] | None = None) -> Group:
    members = tuple(
        trajectory(number, i, reward, (texts or ["ab"] * len(rewards))[i])
        for i, reward in enumerate(rewards)
    )
    return Group(
        id=f"{number:08d}",
        prompt_id=f"p{number}",
        seq=number,
        step=1,
        hinted=False,
        trajectories=members,
        imputed=(1,),
    )


def work_of(groups: list[Group], replays: list[Trajectory]) -> StepWork:
    return StepWork(1, VERSION, tuple(groups), tuple(replays), (0.25,) * len(replays))


PROMPTS = {
    f"p{i}": Prompt(
        id=f"p{i}",
        question="How many?",
        answer="B",
        problem_type=ProblemType.MULTIPLE_CHOICE,
        options=("A. 1", "B. 2"),
        hint="Count them twice.",
        media=MediaPlan(items=(MediaItem(kind="video", uri="/clips/a.mp4", clip=(1, 2)),)),
    )
    for i in range(12)
}


def test_groups_with_different_rewards_are_kept_first() -> None:
    rewards = [[1.0, 1.0], [0.0, 0.2], [0.0, 0.0], [0.0, 1.0]]
    groups = [group_of(i, of) for i, of in enumerate(rewards)]
    assert informative(groups, 2) == [3, 1]
    assert informative(groups, 9) == [3, 1, 0, 2]
    assert informative([], 2) == []


def test_a_row_says_what_the_loss_saw_of_the_completion() -> None:
    config = LearnerConfig()
    texts = ["é!", "abcd"]
    groups = [group_of(0, [0.5, 0.5]), group_of(1, [0.0, 1.0], texts)]
    replay = trajectory(5, 0, 0.0, "xyz")
    work = work_of(groups, [replay, trajectory(6, 0, 1.0, "q")])
    plan = plan_step(work, config, ranks=1, max_tokens=8)
    recorder = SampleRecorder.of(work, 1)
    recorder.begin_update(plan)
    order = [5, 3, 2, 0, 1, 4]
    rng = np.random.default_rng(0)
    logprobs, entropy, weights = (
        torch.from_numpy(rng.normal(size=(6, 4)).astype(np.float32)).to(torch.bfloat16)
        for _ in range(3)
    )
    recorder.add(order, PolicyOutput(logprobs, entropy), weights)
    standing = {("p1", False): Standing("hard", 0.31), ("p5", False): Standing(None, 0.5)}
    rows = recorder.rows(work, standing, PROMPTS, Bytes())

    hosted = [i for i in (4, 5) if int(plan.groups[i]) == 1]
    assert [row["id"] for row in rows[:2]] == ["00000001.0", "00000001.1"]
    assert [row["replayed"] for row in rows] == [False, False, *[True] * len(hosted)]
    assert all(row["group"] == "00000001" for row in rows)
    first, second = rows[:2]
    assert (first["text"], first["token_ends"]) == ("é!", [0, 1, 2])
    assert first["log_ratio"] == pytest.approx(
        (logprobs[2, :3].float().numpy() - np.linspace(-2, -1, 3)).tolist(), abs=1e-4
    )
    assert second["entropy"] == pytest.approx(entropy[1].float().tolist(), abs=1e-4)
    assert second["weight"] == pytest.approx(weights[1].float().tolist(), abs=1e-4)
    # (R - mean) / (deviation + 1e-4) by hand, deviation with n - 1
    assert second["advantage"] == pytest.approx(0.5 / (0.5**0.5 + 1e-4), abs=1e-4)
    assert (first["tier"], first["baseline"], first["age"]) == ("hard", 0.31, 1)
    assert (first["imputed"], second["imputed"]) == (False, True)
    assert not first["dead_before"]
    assert first["components"] == {"accuracy": 0.0, "judge": None}
    assert first["type"] == "multiple_choice" and first["hint"] == "Count them twice."
    assert first["media"] == [{"kind": "video", "uri": "/clips/a.mp4", "clip": (1.0, 2.0)}]
    json.dumps(rows)


def test_the_most_telling_group_comes_first() -> None:
    work = work_of([group_of(0, [1.0, 1.0]), group_of(1, [0.0, 1.0])], [])
    recorder = SampleRecorder.of(work, 2)
    recorder.begin_update(plan_step(work, LearnerConfig(), ranks=1, max_tokens=8))
    rows = recorder.rows(work, {}, PROMPTS, Bytes())
    assert [row["group"] for row in rows] == ["00000001"] * 2 + ["00000000"] * 2


def test_what_was_left_out_of_the_loss_still_has_a_row() -> None:
    work = work_of([group_of(0, [0.0, 1.0])], [])
    recorder = SampleRecorder.of(work, 1)
    recorder.begin_update(plan_step(work, LearnerConfig(), ranks=1, max_tokens=8))
    rows = recorder.rows(work, {}, PROMPTS, Bytes())
    assert len(rows) == 2 and "log_ratio" not in rows[0]
    assert rows[0]["tier"] is None and rows[0]["baseline"] is None


def test_of_several_updates_each_replay_is_shown_and_fresh_ones_once() -> None:
    config = LearnerConfig(updates=2)
    replays = [trajectory(5 + i, 0, float(i % 2), "xyz") for i in range(4)]
    work = work_of([group_of(0, [0.0, 1.0])], replays)
    recorder = SampleRecorder.of(work, 1)
    for update in range(2):
        recorder.begin_update(plan_step(work.update(update, 2), config, ranks=1, max_tokens=8))
    ids = [row["id"] for row in recorder.rows(work, {}, PROMPTS, Bytes())]
    assert sorted(ids) == sorted(t.id for t in [*work.groups[0].trajectories, *replays])


@pytest.mark.parametrize("text", ["", "plain", "né 漢字 🎬!", "\x1b[2J<b>"])
def test_pieces_of_a_text_are_its_characters(text: str) -> None:
    ids = list(text.encode())
    said, ends = pieces(Bytes(), ids)
    assert said == text and len(ends) == len(ids)
    assert ends == [len(text.encode()[: i + 1].decode(errors="ignore")) for i in range(len(ids))]


def test_a_text_cut_inside_a_character_keeps_the_mark_of_it() -> None:
    said, ends = pieces(Bytes(), list("é".encode()[:1]))
    assert (said, ends) == ("\ufffd", [1])


def long_row(name: str) -> dict[str, object]:
    return {"id": name, "text": "x" * 50} | {key: [0.1234] * 200 for key in PER_TOKEN}


def test_a_file_that_is_too_large_says_less_of_its_last_rows() -> None:
    rows = [long_row("a"), long_row("b")]
    whole = len(sample_lines(rows, 1 << 20))
    short = [json.loads(line) for line in sample_lines(rows, 4 * (whole - 1)).splitlines()]
    assert "logprobs" in short[0] and "tokens_left_out" not in short[0]
    assert short[1] == {"id": "b", "text": "x" * 50, "tokens_left_out": True}


def test_samples_stay_below_their_bound_and_keep_both_ends(tmp_path: Path) -> None:
    bound = 120_000
    folder = RunFolder(tmp_path / "run", samples_bytes=bound)
    for step in range(0, 100):
        folder.samples(step, [long_row("a")] * 3, kind="eval" if step % 10 == 0 else "rollout")
    files = sorted(file.name for file in (tmp_path / "run" / "samples").glob("*.jsonl"))
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "samples").iterdir())
    assert size <= bound
    assert {"step_000001.jsonl", "step_000099.jsonl", "eval_000000.jsonl"} <= set(files)
    assert "step_000002.jsonl" not in files and "eval_000090.jsonl" in files
    assert rotate(tmp_path / "run" / "samples", bound) == []


def test_a_group_without_hint_or_media_is_a_row_too() -> None:
    prompts = {"p0": Prompt(id="p0", question="?", answer="1", problem_type=ProblemType.NUMERICAL)}
    work = work_of([hinted(group_of(0, [0.0, 1.0]))], [])
    recorder = SampleRecorder.of(work, 1)
    recorder.begin_update(plan_step(work, LearnerConfig(), ranks=1, max_tokens=8))
    row = recorder.rows(work, {}, prompts, Bytes())[0]
    assert "hint" not in row and row["media"] == [] and row["hinted"] is True


def hinted(group: Group) -> Group:
    members = tuple(
        Trajectory(**{**{f: getattr(t, f) for f in t.__struct_fields__}, "hinted": True})
        for t in group.trajectories
    )
    return Group(
        **{**{f: getattr(group, f) for f in group.__struct_fields__}, "trajectories": members}
    )
