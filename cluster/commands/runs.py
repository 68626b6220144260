"""`avatar runs list|show|resume`, and the end of `avatar train`: what a run says when it is
over."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_rl.common.errors import ConfigError
from avatar_rl.common.text import printable

if TYPE_CHECKING:
    from avatar_rl.cluster.config import RunConfig
    from avatar_rl.cluster.training.run import RunResult

ACTIONS = ("list", "show", "resume")


def run(words: Sequence[str], folder: Path, list_all: Callable[[Path], int]) -> int:
    """`avatar runs` and `avatar runs FOLDER` list; what follows `resume RUN` are overrides.

    Exit code as the command's; ``list_all`` lists the runs of a folder. Raises ConfigError
    for words that make no sense."""
    words = list(words)
    action = words.pop(0) if words and words[0] in ACTIONS else "list"
    if action == "list":
        if len(words) > 1 or any(word.startswith("--") for word in words):
            raise ConfigError(f"avatar runs list takes one folder, given: {' '.join(words)}")
        return list_all(Path(words[0]) if words else folder)
    if not words or words[0].startswith("--") or (len(words) > 1 and action == "show"):
        raise ConfigError(f"avatar runs {action} takes one run: an id below {folder}, or a folder")
    from avatar_rl.cluster.checkpoints.resume import find_run

    found = find_run(folder, words[0], "", asked=f"avatar runs {action}")
    if found is None:
        raise ConfigError(f"there is no unfinished run below {folder}")
    return show(found) if action == "show" else resume(found, words[1:])


def show(run: Path) -> int:
    """State, checkpoints (each verified) and the last events of one run."""
    from avatar_rl.cluster.checkpoints.checkpoint import checkpoints, read_checkpoint
    from avatar_rl.cluster.telemetry.run_files import read_status
    from avatar_rl.cluster.telemetry.run_logs import farewell
    from avatar_rl.common.errors import DataError
    from avatar_rl.common.files import read_jsonl

    status = read_status(run)
    list_state = "lost (its process is gone)" if status.lost else status.state
    lines = [f"{status.run_id}: {list_state}, step {status.step}/{status.total_steps}, {run}"]
    if status.error:
        lines.append(f"  {status.error}")
    if status.state == "failed" or status.lost:
        lines += ["  " + line for line in farewell(run, status.error or "").splitlines()[1:]]
    for folder in checkpoints(run):
        try:
            checkpoint = read_checkpoint(folder)
            size = checkpoint.size
            lines.append(
                f"  checkpoint {folder.name}: version {checkpoint.version}, {size / 1e6:.1f} "
                "MB, whole"
            )
        except DataError as error:
            lines.append(f"  {error}")
    for row in list(read_jsonl(run / "events.jsonl"))[-8:]:
        lines.append(f"  step {row.get('step')}: {row.get('kind')}: {row.get('message')}")
    print(printable("\n".join(lines)))
    return 0


def resume(run: Path, overrides: Sequence[str]) -> int:
    """Resume ``run`` by its own recipe."""
    from avatar_rl.cluster.checkpoints.resume import reusable_config
    from avatar_rl.cluster.recipe.load import check, overridden, parse_overrides
    from avatar_rl.cluster.recipe.overlays import merge

    raw = merge(reusable_config(run), {"output": {"folder": str(run.parent)}})
    raw = overridden(raw, parse_overrides(overrides))
    return train_and_summarise(check(raw, source=str(run / "config.yaml")), str(run))


def train_and_summarise(config: RunConfig, resume: str | None) -> int:
    """Run the recipe, then say what it reached; exit code as of ``stoppable``.

    Raises ConfigError or ResourceError, before anything is made, for what cannot run."""
    from avatar_rl.cluster.commands.doctor import preflight

    preflight({"": config})
    from avatar_rl.cluster.training.restarts import start_or_resume  # takes seconds

    return stoppable(lambda: print_summary(config, start_or_resume(config, resume)))


def print_summary(config: RunConfig, result: RunResult) -> None:
    """Headline first; then where to look."""
    print()
    if result.before is not None and result.after is not None:
        gain = result.after.accuracy - result.before.accuracy
        print(
            f"held-out accuracy {result.before.accuracy:.3f} -> {result.after.accuracy:.3f} "
            f"({gain:+.3f}) "
            f"on {result.after.prompts} prompts, {result.completions} completions generated, "
            f"{result.seconds:.0f} s"
        )
        for name, after in result.after.by_category.items():
            before = result.before.by_category.get(name, float("nan"))
            print(f"  {name:<20} {before:.2f} -> {after:.2f}")
    print(f"run folder   {result.run}")
    if config.output.report:
        print(f"report       {result.run / 'report.html'}")
    if config.output.export:
        print(f"checkpoint   {result.run / 'checkpoint'}")
    print(f"look at it   avatar view {result.run}")


def stoppable(work: Callable[[], None]) -> int:
    """Exit codes of a training command: 0 finished, or stopped by SIGTERM with all saved; 130 after
    Ctrl-C."""
    from avatar_rl.cluster.services.signals import as_stopped, orders, stop_at_once

    orders.clear()
    before = signal.signal(signal.SIGTERM, stop_at_once)
    try:
        work()
    except KeyboardInterrupt as interrupt:
        stopped = as_stopped(interrupt)
        if stopped is None:
            raise
        print(f"avatar: {stopped}; resume with --resume auto", file=sys.stderr)
        return 0 if stopped.number == signal.SIGTERM else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
