"""`avatar runs`, `logs` and `compare`, over folders as runs leave them; what a failed run says."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.telemetry.run_files import environment, masked_command
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.run_logs import command_of, farewell
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.common.errors import ConfigError, ResourceError


def a_run(
    path: Path, *, steps: int = 3, accuracy: float = 0.8, lr: float = 1e-4, ended: bool = True
) -> Path:
    folder = RunFolder(path, total_steps=steps)
    folder.config({"name": "toy", "learner": {"optimizer": {"lr": lr}}, "loop": {"steps": steps}})
    folder.metrics(0, {"eval/accuracy": 0.5, "eval/accuracy/colour": 0.4})
    for step in range(1, steps + 1):
        folder.metrics(step, {"reward/mean": step / 10, "time/step": 2.0})
    folder.metrics(steps, {"eval/accuracy": accuracy, "eval/accuracy/colour": accuracy + 0.1})
    folder.event("actors started", "rollout-0")
    folder.phase("training")
    if ended:
        folder.status(state="finished")
    folder.close()
    return path


def log(run: Path, role: str, text: str) -> None:
    (run / "logs").mkdir(exist_ok=True)
    with (run / "logs" / f"{role}.log").open("a") as file:
        file.write(text)


def said_by(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


# -- runs ------------------------------------------------------------------------------------------


def test_runs_are_listed_in_columns_and_sorted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, accuracy in (("a", 0.6), ("b", 0.9), ("c", 0.7)):
        a_run(tmp_path / name, accuracy=accuracy)
    code, text = said_by(capsys, "runs", "--folder", tmp_path, "--sort", "gain")
    header, *lines = text.splitlines()
    assert code == 0
    assert header.split() == ["run", "state", "step", "before", "now", "gain", "took"]
    assert [line.split()[0] for line in lines] == ["b", "c", "a"]
    assert lines[0].split()[1:6] == ["finished", "3/3", "0.500", "0.900", "+0.400"]
    _, text = said_by(capsys, "runs", tmp_path, "--sort", "gain", "--reverse")
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["a", "c", "b"]
    _, text = said_by(capsys, "runs", tmp_path, "--columns", "run,reward")
    assert text.splitlines()[0].split() == ["run", "reward"]
    code, text = said_by(capsys, "runs", tmp_path, "--columns", "run,mood")
    assert code == 1 and "no column 'mood': choose of run, state" in text


def test_a_run_that_sets_up_shows_its_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_run(tmp_path / "a", ended=False)
    folder = RunFolder(path, resume_step=3, total_steps=3)
    screen = Screen(3)
    screen.on_phase = folder.phase
    screen.phase("starting actors", "1 vLLM")
    code, text = said_by(capsys, "runs", tmp_path)
    assert code == 0 and "setting up  starting actors" in text
    folder.close()


def test_runs_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "a")
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["run_id"] == "a" and row["state"] == "finished" and row["accuracy_now"] == 0.8
    assert row["seconds"] >= 0


# -- logs ------------------------------------------------------------------------------------------


def test_logs_show_every_role_or_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "a")
    log(run, "learner-0", "one\ntwo\nthree\n")
    log(run, "rollout-0", "\x1b[2Jfour\n")
    code, text = said_by(capsys, "logs", run, "--lines", "2")
    assert code == 0
    assert "==> events <==" in text and "actors started: rollout-0" in text
    assert "==> learner-0 <==\ntwo\nthree\n" in text and "one" not in text
    assert "\\x1b[2Jfour" in text  # what it printed cannot drive the terminal
    code, text = said_by(capsys, "logs", "a", "learner", "--folder", tmp_path, "-n", "0")
    assert code == 0 and text == "one\ntwo\nthree\n"
    code, text = said_by(capsys, "logs", run, "judge")
    assert code == 1 and "no log of role 'judge': there are events, learner-0, rollout-0" in text
    code, text = said_by(capsys, "logs", tmp_path / "gone")
    assert code == 1 and "status.json is not a run's status" in text


def test_logs_follow_until_the_run_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "a", ended=False)
    folder = RunFolder(run, resume_step=3)

    def go_on() -> None:
        time.sleep(0.2)
        log(run, "learner-0", "first\n")  # a role that was not there before
        log(run, "learner-0", "second\n")
        folder.status(state="finished")
        folder.close()

    writer = threading.Thread(target=go_on)
    writer.start()
    code, text = said_by(capsys, "logs", run, "learner", "--follow")
    writer.join()
    assert code == 0 and text == "learner-0  first\nlearner-0  second\n"


# -- compare ---------------------------------------------------------------------------------------


def test_runs_are_compared_by_settings_and_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "a", accuracy=0.6)
    a_run(tmp_path / "b", accuracy=0.9, lr=3e-4, steps=4)
    code, text = said_by(capsys, "compare", "a", "b", "--folder", tmp_path)
    cells = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    rows = {label: values for label, *values in cells}
    assert code == 0
    assert rows["settings"] == ["a", "b"]
    assert rows["learner.optimizer.lr"] == ["0.0001", "0.0003"]
    assert rows["loop.steps"] == ["3", "4"] and "name" not in rows
    assert rows["held-out now"] == ["0.6", "0.9"] and rows["gain"] == ["0.1", "0.4"]
    assert rows["colour"] == ["0.7", "1"]
    assert rows["reward"] == ["0.2", "0.25"]
    assert main(["compare", "a", "b", "--folder", str(tmp_path), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["runs"] == ["a", "b"]
    assert read["settings"]["learner.optimizer.lr"] == [1e-4, 3e-4]
    assert read["result"]["gain"] == pytest.approx([0.1, 0.4])


def test_compare_needs_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "a")
    assert said_by(capsys, "compare", run)[0] == 1
    code, text = said_by(capsys, "compare", run, tmp_path / "gone")
    assert code == 1 and "gone/status.json is not a run's status" in text
    (run / "config.yaml").write_text("{torn")
    (run / "metrics.jsonl").unlink()
    assert said_by(capsys, "compare", run, run)[0] == 0


# -- what a run knows of itself --------------------------------------------------------------------


def test_the_environment_says_what_ran_where() -> None:
    known = environment()
    commit = known["commit"]
    assert commit is None or (isinstance(commit, str) and len(commit) == 40)
    assert known["gpus"] and known["host"] and isinstance(known["command"], list)
    assert {"driver", "python", "packages"} <= known.keys()


def test_a_command_line_is_kept_without_its_secrets() -> None:
    words = ["avatar", "train", "r.yaml", "--buffer.password", "hush", "--x.api-key=hush"]
    words += ["--buffer.url", "redis://me:hush@host:1", "--buffer.password_env", "NAME"]
    kept = " ".join(map(str, masked_command(words)))
    assert "hush" not in kept
    assert kept.startswith("avatar train r.yaml --buffer.password *")
    assert "redis://me:*" in kept and kept.endswith("--buffer.password_env NAME")


def test_a_failed_run_names_cause_log_and_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "a", ended=False)
    environment_file = run / "environment.json"
    environment_file.write_text('{"command": ["/bin/avatar", "train", "r.yaml"]}')
    assert command_of(run) == "avatar train r.yaml"
    log(run, "rollout-0", "warming up\nRuntimeError: CUDA error: out of memory\nbye\n")
    log(run, "reward", "ValueError: an old one\n")
    error = ResourceError("rollout-0 died 9 times without a finished step")
    assert farewell(run, error).splitlines() == [
        f"run folder   {run}",
        f"log          avatar logs {run} rollout-0",
        "             RuntimeError: CUDA error: out of memory",
        "next         avatar train r.yaml",
    ]
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    assert farewell(run, error).endswith(f"avatar runs resume {run}")
    corrected = farewell(run, ConfigError("loop.steps 3"))
    assert corrected.endswith("next         correct that, then avatar train r.yaml")
    folder = RunFolder(run, resume_step=3)
    folder.status(state="failed", error=str(error))
    folder.close()
    code, text = said_by(capsys, "runs", "show", run)
    assert code == 0 and "avatar logs" in text and "avatar runs resume" in text


def test_a_failed_run_without_logs_says_what_it_can(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    (run / "environment.json").write_text("torn")
    assert farewell(run, "x").splitlines()[-1] == f"next         avatar runs show {run}"


def test_a_checkpoint_that_is_no_run_needs_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said_by(capsys, "evaluate", tmp_path)
    assert code == 1 and "give --recipe RECIPE" in text
    run = a_run(tmp_path / "a")
    code, text = said_by(capsys, "evaluate", run)
    assert (code == 1 and "a run without an export" in text) or "recipe" in text
