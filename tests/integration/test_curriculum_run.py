"""A small curriculum as a user starts it: cold start, a stage, and a stage whose judge fails for
one reply in three.

It loses a rank in the cold start; a chaos test kills it in a stage, too.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from avatar_rl.buffer_service.transfer.export import read_rows
from avatar_rl.cluster.curriculum.record import CurriculumState, read_state
from avatar_rl.cluster.telemetry.run_files import read_metrics, read_status
from tests.unit.test_rewards_judge_server import GOOD, Reply, judge_server

ROOT = Path(__file__).parents[2]
RECIPE = """
name: course
preset: avatar
data:
  synthetic: {n_train: 20, n_heldout: 10, n_sft: 16}
  template: {min_pixels: 784, max_pixels: 50176, max_prompt_tokens: 256}
cold_start: {steps: 40, batch_size: 8, ranks: 1, checkpoint_every: 2, optimizer: {lr: 1.0e-4}}
checkpoint: {every: 1}
loop: {prompts_per_step: 4, max_staleness: 1}
rollout:
  max_sequences: 16
  engine: {max_model_len: 320, max_num_seqs: 16, kv_cache_memory_bytes: 67108864}
  sampling: {max_tokens: 16}
learner:
  micro_batch_tokens: 1500
  objective: {beta: 0.05}
  optimizer: {lr: 1.0e-4, freeze: [visual, audio_tower]}
buffer: {warm_up: 8}
evaluation: {every: 2}
output: {samples_every: 1}
screen: plain
stages:
  - {name: sft, kind: sft}
  - name: see
    select: {categories: [colour, side, direction]}
    steps: 4
  - name: judged
    select: {needs: [[audio], [video, audio]]}
    steps: 3
    replay: keep
    rewards:
      weights: {format: 0.2, accuracy: 0.4, judge: 0.4}
      judge: {base_url: "%s", model: judge, attempts: 1, request_timeout_s: 5,
              breaker_failures: 1000,              attach: [video, audio], attach_frames: 2}
"""


@dataclass
class Finished:
    folder: Path
    output: str
    requests: int
    again: str  # output of a second run of the same recipe

    @property
    def state(self) -> CurriculumState:
        return read_state(self.folder / "runs" / "course")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("course")

    def fails_in_one_of_three(n: int) -> Reply:
        return (Reply(status=500), Reply(), Reply(content=f"```json\n{GOOD}\n```"))[n % 3]

    with judge_server(fails_in_one_of_three) as server:
        (folder / "recipe.yaml").write_text(RECIPE % server.url)
        driver = Driver(folder, folder / "runs")
        wait_for(lambda: list((folder / "cache").glob("cold-start-*.partial/step-*")), driver)
        driver.kill_ranks()
        output = driver.finish()
        yield Finished(
            folder, output, len(server.requests), Driver(folder, folder / "runs").finish()
        )


class Driver:
    """`avatar train` of the curriculum, its output in a file."""

    def __init__(self, folder: Path, runs: Path) -> None:
        places = ["--output.folder", str(runs), "--output.cache", str(folder / "cache")]
        command = [
            sys.executable,
            "-m",
            "avatar_rl.cluster.cli",
            "train",
            str(folder / "recipe.yaml"),
            *places,
        ]
        runs.mkdir(exist_ok=True)
        self.log = runs / f"{len(list(runs.glob('*.log')))}.log"
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=self.log.open("wb"), stderr=subprocess.STDOUT
        )

    def finish(self) -> str:
        """What it said in all; it must have ended well."""
        try:
            assert self.process.wait(290) == 0, self.log.read_text()
        finally:
            self.process.kill()
        return self.log.read_text()

    def kill_ranks(self) -> None:
        ranks = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if rank_of(child)
        ]
        assert ranks
        for rank in ranks:
            rank.kill()


def wait_for(found: Callable[[], list[Path]], driver: Driver) -> None:
    deadline = time.monotonic() + 200
    while not found():
        if driver.process.poll() is not None or time.monotonic() > deadline:
            driver.process.kill()
            pytest.fail(driver.log.read_text())
        time.sleep(0.01)


def rank_of(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "LearnerRank" in " ".join(process.cmdline())
    return False


@pytest.mark.timeout(600)
def test_every_stage_starts_from_the_one_before(finished: Finished) -> None:
    sft, see, judged = finished.state.stages
    assert Path(sft.checkpoint).name.startswith("cold-start-")
    for stage, start in ((see, sft), (judged, see)):
        config = yaml.safe_load((Path(stage.run) / "config.yaml").read_text())
        assert config["model"]["path"] == start.checkpoint
        assert read_status(Path(stage.run)).state == "finished"
        assert stage.before is not None and start.after is not None
        assert stage.before.accuracy == pytest.approx(
            start.after.accuracy
        )  # the same policy on the same prompts
        assert (Path(stage.checkpoint) / "model.safetensors").is_file()


def test_a_stage_asks_only_prompts_of_its_types(finished: Finished) -> None:
    _, see, judged = finished.state.stages
    needs = {"see": {("video",)}, "judged": {("audio",), ("video", "audio")}}
    train = next((finished.folder / "cache").glob("world-*/train.jsonl"))
    prompts = {row["id"]: row for row in map(json.loads, train.read_text().splitlines())}
    for stage in (see, judged):
        files = (Path(stage.run) / "samples").glob("step_*.jsonl")
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        # Replays may be of the stage before.
        asked = {row["prompt_id"] for row in rows if not row.get("replayed")}
        assert (
            asked
            and {tuple(prompts[prompt_id]["needs"]) for prompt_id in asked} <= needs[stage.name]
        )


def test_training_goes_on_beside_a_judge_that_fails(finished: Finished) -> None:
    judged = finished.state.stages[2]
    rows = [row for row in read_metrics(Path(judged.run)) if row["step"]]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["loss/total"] is not None for row in rows)
    files = (Path(judged.run) / "samples").glob("step_*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    parts = [row["components"] for row in rows if not row.get("replayed")]
    values = {part["judge"] for part in parts}
    assert None in values and 0.5 in values and values <= {None, 0.5, 0.0}
    said_nothing = [part for part in parts if part["judge"] == 0.0]
    assert len(said_nothing) < len(parts)  # 0 is only for a completion without reasoning and answer
    assert finished.requests > 20


def test_kept_replay_is_the_stage_befores_under_the_new_rewards(finished: Finished) -> None:
    _, see, judged = finished.state.stages
    rows = [row for _, row in read_rows(Path(judged.run) / "replay-into-judged.jsonl")]
    assert rows and all(version == 0 for row in rows for version, _ in row.versions)
    for row in rows:
        paid = {"format": 0.2, "accuracy": 0.4}  # what is known of it: the judge never saw it
        expected = sum(w * (row.components[name] or 0.0) for name, w in paid.items()) / 0.6
        assert row.reward == pytest.approx(expected)
    first = next(row for row in read_metrics(Path(judged.run)) if row["step"] == 1)
    assert (first["buffer/stored"] or 0) > len(rows)
    assert not (Path(see.run).parent / "replay-into-judged.jsonl").exists()


def test_a_cold_start_goes_on_after_the_death_of_a_rank(finished: Finished) -> None:
    assert "a cold-start rank died" in finished.output
    [step] = re.findall(r"cold start resumes from step (\d+)", finished.output)
    assert int(step) % 2 == 0 and 2 <= int(step) < 40
    assert not list((finished.folder / "cache").glob("cold-start-*.partial"))


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_killed_stage_goes_on_from_its_checkpoint(finished: Finished, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    driver = Driver(finished.folder, runs)
    wait_for(lambda: list((runs / "course").glob("see-*/checkpoints/step-*")), driver)
    driver.process.kill()
    driver.process.wait()
    assert "see: run" in driver.log.read_text()
    output = Driver(finished.folder, runs).finish()
    state = read_state(runs / "course")
    see = state.stages[1]
    assert "see: resume" in output and state.underway is None
    assert [row["step"] for row in read_metrics(Path(see.run)) if row["step"]] == [1, 2, 3, 4]
    [folder] = (runs / "course").glob("see-*")
    assert folder == Path(see.run)  # no second run of the stage
    [resumed] = re.findall(r"resuming see-\S+ from step (\d)", output)
    assert int(resumed) >= 1
    assert see.completions >= 4 * 4 * 4  # of both lives: steps, prompts, completions of a group


def test_another_run_finds_everything_done(finished: Finished) -> None:
    assert "held-out accuracy after each stage" in finished.output
    for name in ("sft", "see", "judged"):
        assert f"{name}: run" in finished.output and f"{name}: done before" in finished.again
    report = finished.folder / "runs" / "course" / "report.html"
    assert '<th class="n">judged</th>' in report.read_text()


def test_a_checkpoint_is_evaluated_without_sound(finished: Finished) -> None:
    see = finished.state.stages[1]
    command = [
        sys.executable,
        "-m",
        "avatar_rl.cluster.cli",
        "evaluate",
        see.checkpoint,
        "--without",
        "audio",
        # vLLM ends an engine whose threads count OpenMP's differently
        "--rollout.engine.threads",
        "2",
    ]
    places = [
        "--output.folder",
        str(finished.folder / "evaluated"),
        "--output.cache",
        str(finished.folder / "cache"),
    ]
    recipe = ["--recipe", str(finished.folder / "recipe.yaml")]
    done = subprocess.run(
        [*command, *recipe, *places], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out accuracy without audio" in done.stdout and "on 10 prompts" in done.stdout
    assert "died" not in done.stdout
