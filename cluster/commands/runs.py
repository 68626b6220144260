"""`avatar runs list|show|resume`, and the end of `avatar train`: what a run says when it is
over."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_rl.common.errors import ConfigError

if TYPE_CHECKING:
    from avatar_rl.cluster.config import RunConfig

ACTIONS = ("list", "show", "resume")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command. `avatar runs` and `avatar runs FOLDER` list, as they always have."""
    runs = commands.add_parser(
        "runs",
        help="list runs, show one, go on with one",
        description="runs [list] [FOLDER] | runs show RUN | runs resume RUN [--loop.steps 200 ...]",
    )
    runs.add_argument(
        "words", nargs="*", metavar="list|show|resume", help="what to do, then a folder or a run"
    )
    runs.add_argument("--folder", type=Path, default=Path("runs"), help="parent of the run folders")
    runs.set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Exit code as the command's. Raises ConfigError for words that make no sense."""
    words = list(options.words)
    action = words.pop(0) if words and words[0] in ACTIONS else "list"
    if action == "list":
        if len(words) > 1 or rest:
            raise ConfigError(
                f"avatar runs list takes one folder, given: {' '.join([*words, *rest])}"
            )
        return list_all(Path(words[0]) if words else options.folder)
    if len(words) != 1 or (rest and action == "show"):
        raise ConfigError(
            f"avatar runs {action} takes one run: an id below {options.folder}, or a folder"
        )
    from avatar_rl.cluster.checkpoints.resume import find_run

    found = find_run(options.folder, words[0], "")
    if found is None:
        raise ConfigError(f"there is no unfinished run below {options.folder}")
    return show(found) if action == "show" else resume(found, rest)


def list_all(folder: Path) -> int:
    from avatar_rl.cluster.telemetry.run_folder import list_runs

    found = list_runs(folder)
    if not found:
        print(f"there are no runs below {folder} (--folder says where to look)")
    for status in found:
        now = "-" if status.accuracy_now is None else f"{status.accuracy_now:.3f}"
        before = "-" if status.accuracy_before is None else f"{status.accuracy_before:.3f}"
        state = "lost" if status.lost else status.state
        print(
            f"{status.run_id:<36} {state:<12} step {status.step}/{status.total_steps}  held-out "
            f"{before} -> {now}"
        )
    return 0


def show(run: Path) -> int:
    """State, checkpoints (each verified) and the last events of one run."""
    from avatar_rl.cluster.checkpoints.checkpoint import checkpoints, read_checkpoint
    from avatar_rl.cluster.telemetry.run_folder import read_status
    from avatar_rl.common.errors import DataError
    from avatar_rl.common.files import read_jsonl

    status = read_status(run)
    list_state = "lost (its process is gone)" if status.lost else status.state
    print(f"{status.run_id}: {list_state}, step {status.step}/{status.total_steps}, {run}")
    if status.error:
        print(f"  {status.error}")
    for folder in checkpoints(run):
        try:
            checkpoint = read_checkpoint(folder)
            size = sum(proof["bytes"] for proof in checkpoint.files.values())
            print(
                f"  checkpoint {folder.name}: version {checkpoint.version}, {size / 1e6:.1f} "
                "MB, whole"
            )
        except DataError as error:
            print(f"  {error}")
    for row in list(read_jsonl(run / "events.jsonl"))[-8:]:
        print(f"  step {row.get('step')}: {row.get('kind')}: {row.get('message')}")
    return 0


def resume(run: Path, overrides: Sequence[str]) -> int:
    """Go on with ``run`` by its own recipe."""
    from avatar_rl.cluster.checkpoints.resume import reusable_config
    from avatar_rl.cluster.recipe.load import check, overridden, parse_overrides
    from avatar_rl.cluster.recipe.presets import merge

    raw = merge(reusable_config(run), {"output": {"folder": str(run.parent)}})
    raw = overridden(raw, parse_overrides(overrides))
    return train_and_summarise(check(raw, source=str(run / "config.yaml")), str(run))


def train_and_summarise(config: RunConfig, resume: str | None) -> int:
    """Run the recipe, then say what it reached; exit code as of ``stoppable``."""
    from avatar_rl.cluster.commands.summary import print_summary
    from avatar_rl.cluster.training.restarts import train

    return stoppable(lambda: print_summary(config, train(config, resume)))


def stoppable(work: Callable[[], None]) -> int:
    """Exit codes of a training command: 0 finished, or stopped by SIGTERM with all saved; 130 after
    Ctrl-C."""
    from avatar_rl.cluster.services.signals import Stopped, stop_at_once

    before = signal.signal(signal.SIGTERM, stop_at_once)
    try:
        work()
    except Stopped as stopped:
        print(f"avatar: {stopped}; go on with --resume auto", file=sys.stderr)
        return 0 if stopped.number == signal.SIGTERM else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
