"""Typical mistakes of a new user, each as a command typed: message, remedy, seconds ->
build/bench/mistakes.json and mistakes.md; run with ``make bench NAME=mistakes``, two minutes.

Every command runs in a process of its own, from its start to its message, in a folder with a model,
a dataset and a run. None of them has to start a run's processes, so none may take long."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Figures, parser

ROOT = Path(__file__).parents[1]
LOCAL = str(ROOT / "recipes" / "local.yaml")
COURSE = str(ROOT / "recipes" / "curriculum_local.yaml")
TINY = str(ROOT / "recipes" / "assets" / "tiny_omni")
LONGEST_S = 3.0
DOCUMENT = Path("docs/mistakes.md")
SMOKE_EVERY = 10


@dataclass(frozen=True)
class Mistake:
    """``words`` of the message name what was wrong and what to do."""

    command: tuple[str, ...]
    words: tuple[str, ...]


def train(*overrides: str) -> tuple[str, ...]:
    return ("train", LOCAL, *overrides)


MISTAKES = tuple(
    Mistake(command, words)
    for command, words in (
        # the command itself
        (("tarin", LOCAL), ("No such command 'tarin'", "train")),
        (("train",), ("Missing argument 'RECIPE'",)),
        (("train", "local.yml"), ("local.yml does not exist",)),
        (("train", "."), ("is a folder", "name the .yaml file")),
        (("train", "--loop.steps", "3", LOCAL), ("stands where the recipe should",)),
        (train("loop.steps=3"), ("unexpected argument", "--learner.optimizer.lr")),
        (train("--loop.steps"), ("has no value",)),
        (train("--dryrun"), ("--dryrun", "has no value")),
        (train("--resume", "my-run"), ("my-run", "no such run")),
        (train("--stage", "sft"), ("has no stages",)),
        (("train", COURSE, "--stage", "stf"), ("no such stage", "sft")),
        (("train", COURSE, "--stage", "sft", "--from-stage", "visual"), ("not allowed with",)),
        (train("--preset", "gropo"), ("unknown preset 'gropo'", "grpo")),
        # keys
        (train("--learning_rate", "1e-5"), ("TRL's learning_rate", "learner.optimizer.lr")),
        (train("--learner.lr", "1e-5"), ("did you mean 'learner.optimizer.lr'",)),
        (train("--lr", "1e-5"), ("learner.optimizer.lr",)),
        (train("--steps", "10"), ("loop.steps",)),
        (train("--batch_size", "8"), ("loop.prompts_per_step",)),
        (train("--num_generations", "8"), ("loop.fresh",)),
        (train("--actor_rollout_ref.rollout.n", "8"), ("verl's", "loop.fresh")),
        (train("--trainer.total_epochs", "2"), ("loop.steps", "epochs")),
        (train("--temperature", "0.7"), ("rollout.sampling.temperature",)),
        (train("--max_new_tokens", "64"), ("rollout.sampling.max_tokens",)),
        (train("--freeze_vit", "true"), ("ms-swift's", "learner.optimizer.freeze")),
        (train("--use_vllm", "true"), ("no counterpart", "vLLM")),
        (train("--gpus", "2"), ("learner.ranks",)),
        (train("--learner.objective.kl_coef", "0.1"), ("learner.objective.beta",)),
        (train("--loop.stepz", "10"), ("did you mean 'steps'",)),
        (train("--output.dir", "x"), ("output.dir", "known here")),
        # values
        (train("--loop.steps", "0"), ("loop.steps", "greater than or equal to 1")),
        (train("--loop.steps", "ten"), ("loop.steps", "integer", "'ten'")),
        (train("--loop.steps", "1.5"), ("loop.steps", "integer")),
        (train("--learner.optimizer.lr", "-1e-5"), ("learner.optimizer.lr", "greater than 0")),
        (train("--learner.optimizer.lr", "1e5x"), ("learner.optimizer.lr", "number")),
        (train("--learner.objective.loss_type", "ppo"), ("loss_type", "'grpo'")),
        (train("--learner.objective.epsilon", "1.2"), ("epsilon", "less than 1")),
        (train("--rewards.weights", "{acuracy: 1}"), ("acuracy", "accuracy")),
        (train("--rewards.weights", "{my_reward.py: 1}"), ("my_reward.py",)),
        (train("--rewards.weights", "{nowhere.mod:fn: 1}"), ("nowhere",)),
        (train("--rollout.sampling.temperature", "0"), ("temperature 0", "above 0")),
        (train("--rollout.sampling.max_tokens", "4096"), ("max_model_len", "raise")),
        (train("--rollout.max_sequences", "4"), ("max_sequences 4", "group of 8")),
        (train("--rollout.workers", "99"), ("CPUs", "rollout.workers")),
        (train("--evaluation.every", "-1"), ("evaluation.every", "greater than or equal to 0")),
        (train("--output.trackers", "[wandbb]"), ("output.trackers", "'wandb'")),
        (train("--output.folder", "$HOME/runs"), ("output.folder", "write the path itself")),
        (train("--model.path", "Qwen/Qwen2.5-Omni-3B"), ("is not a folder",)),
        (train("--model.path", "empty"), ("empty", "config.json")),
        (train("--buffer.url", "redis://127.0.0.1:9"), ("127.0.0.1:9", "buffer.url")),
        (train("--resources.address", "127.0.0.1:9"), ("127.0.0.1:9", "resources.address")),
        (train("--cold_start.ready", "gone"), ("gone", "cold_start.ready: null")),
        # recipes of one's own
        (("train", "tabs.yaml"), ("tabs.yaml is not valid YAML", "line 2")),
        (("train", "twice.yaml"), ("'loop' is there twice",)),
        (("train", "nodata.yaml"), ("data", "required")),
        (("train", "away.yaml"), ("gone.jsonl", "data.train")),
        (("train", "rows.yaml"), ("rows.jsonl:1", "answer")),
        # data, runs, checkpoints
        (("data", "validate", "gone.jsonl"), ("gone.jsonl",)),
        (("data", "validate", "rows.jsonl", "--no-decode"), ("rows.jsonl:1", "answer")),
        (("data", "synthesize", "full"), ("already holds something",)),
        (("evaluate", "gone"), ("--recipe RECIPE",)),
        (("evaluate", "empty", "--recipe", LOCAL), ("empty", "config.json")),
        (("runs", "show", "gone"), ("gone", "no such run")),
        (("runs", "--sort", "acc"), ("no column 'acc'", "gain")),
        (("logs", "gone"), ("gone", "runs/<id>")),
        (("compare", "gone"), ("two runs",)),
        (("scale", "gone", "--rollout-workers", "2"), ("gone",)),
        (("explain", "kl"), ("kl",)),
        (("explain", "tas_lamda"), ("did you mean learner.objective.tas_lambda",)),
        (("init", "x.yaml", "--model", "gone", "--data", "rows.jsonl"), ("hf download",)),
        (("init", "x.txt", "--model", "tiny"), ("ends in .yaml",)),
    )
)


def prepare(folder: Path) -> None:
    """What a new user has around."""
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("")
    (folder / "rows.jsonl").write_text('{"question": "What?"}\n')
    (folder / "tabs.yaml").write_text("loop:\n\tsteps: 3\n")
    (folder / "twice.yaml").write_text("data: {train: x}\nloop: {steps: 3}\nloop: {fresh: 2}\n")
    (folder / "nodata.yaml").write_text("loop: {steps: 3}\n")
    (folder / "away.yaml").write_text(f"model: {{path: {TINY}}}\ndata: {{train: gone.jsonl}}\n")
    (folder / "rows.yaml").write_text(f"model: {{path: {TINY}}}\ndata: {{train: rows.jsonl}}\n")


def tried(mistake: Mistake, folder: Path) -> tuple[float, int, str]:
    """Seconds, exit code and what was said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "avatar_rl.cluster.cli", *mistake.command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return time.perf_counter() - started, done.returncode, done.stdout + done.stderr


def main() -> int:
    options_of = parser(__doc__)
    options_of.add_argument("--docs", action="store_true", help="write the table into docs/ too")
    options = options_of.parse_args()
    mistakes = MISTAKES[:: SMOKE_EVERY if options.smoke else 1]
    figures = Figures("mistakes", options.out)
    rows, seconds, failed = [], [], 0
    with tempfile.TemporaryDirectory(prefix="mistakes_") as name:
        prepare(Path(name))
        for mistake in mistakes:
            took, code, said = tried(mistake, Path(name))
            typed = "avatar " + " ".join(mistake.command).replace(f"{ROOT}/", "")
            lacks = [word for word in mistake.words if word not in said]
            if lacks or code == 0 or "Traceback" in said:
                failed += 1
                print(f"{typed}: exit {code}, lacks {lacks} in: {said[-600:]}", file=sys.stderr)
            seconds.append(took)
            line = " ".join(said.replace(f"{ROOT}/", "").split()).replace("|", "\\|")
            rows.append(f"| `{typed}` | {line[:300]} | {took:.1f} |")
    text = "\n".join(["| typed | said | seconds |", "|---|---|---|", *rows]) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mistakes.md").write_text(text)
    if options.docs:
        page = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(page[: page.index("| typed |")] + text, encoding="utf-8")
    slow = sum(took > LONGEST_S for took in seconds)
    figures.add({"tried": len(mistakes), "named": len(mistakes) - failed, "slow": slow})
    figures.add({"longest_s": max(seconds), "median_s": sorted(seconds)[len(seconds) // 2]})
    figures.write()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
