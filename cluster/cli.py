"""The command line: `avatar train`, `evaluate`, `scale`, `doctor`, `data ...`, `buffer ...`,
`hints ...`, `captions ...`, `presets`; those about keys of recipes are in cli_keys.py, those about
runs in cli_runs.py, those about datasets in cli_data.py.

Every command is declared here and does its work in commands/, which is imported when it runs:
`avatar --help` starts at once.
"""

from __future__ import annotations

import codecs
import locale
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

import click

from avatar_rl.cluster import cli_data, cli_keys, cli_runs
from avatar_rl.cluster.cli_endpoint import asks_endpoint
from avatar_rl.cluster.cli_types import (
    OVERRIDABLE,
    PATH,
    PRESET,
    RECIPE,
    Command,
    Overridable,
    helps_all,
    takes_overrides,
)
from avatar_rl.cluster.install.copies import ROOT, check_copies, version_of
from avatar_rl.common.errors import AvatarError
from avatar_rl.common.text import printable

if TYPE_CHECKING:
    from avatar_rl.cluster.annotation.asking import EndpointOptions
    from avatar_rl.cluster.commands.buffer import BufferOptions
    from avatar_rl.cluster.commands.public_sets import PublicSetWords
    from avatar_rl.prompts.record import Modality

# Quiet before anything heavy is imported; workers get theirs from cluster.services.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if sys.argv[1:3] != ["data", "fetch"]:  # the one command that asks a hub
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 success, 1 the user's input or the machine is at fault (one message), 130
    interrupted. Raises SystemExit with code 2 for a command that is not there or lacks a word."""
    if arguments is None and not sys.flags.utf8_mode:
        _in_utf8()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        os.getcwd()
    except FileNotFoundError:
        print("avatar: the current folder is gone: change to another (cd ~)", file=sys.stderr)
        return 1
    try:
        if note := check_copies():
            print(f"avatar: {note}", file=sys.stderr)
        code: int = avatar.main(arguments, prog_name="avatar", standalone_mode=False)
        return code
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except AvatarError as error:
        said = "\n".join([f"avatar: {error}", *getattr(error, "__notes__", ())])
        print(printable(said), file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(
            printable(
                f"avatar: {error.filename}: {error.strerror}; correct the path, or look at its "
                "permissions and its disk"
            ),
            file=sys.stderr,
        )
        return 1
    except (KeyboardInterrupt, click.Abort):
        print("avatar: interrupted; everything that was started has been stopped", file=sys.stderr)
        return 130


def _in_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where the locale has another encoding.

    Recipes, prompts and file names are UTF-8. Child processes inherit the mode."""
    encoding = codecs.lookup(locale.getpreferredencoding(False)).name
    if encoding != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@helps_all
@click.version_option(version_of(ROOT), message=f"avatar %(version)s ({ROOT})")
def avatar() -> None:
    """Reinforcement learning for audio-visual language models."""


@avatar.command(cls=Overridable, context_settings=OVERRIDABLE)
@click.argument("recipe", type=RECIPE)
@helps_all
@click.option(
    "--preset",
    type=PRESET,
    help="Method in place of the recipe's own; keys that the recipe gives stay (`avatar presets`).",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the resolved recipe and the resources; start nothing.",
)
@click.option(
    "--resume",
    metavar="RUN",
    help="Resume a run: its id or folder, or auto for the newest unfinished one.",
)
@click.option(
    "--stage",
    metavar="NAME",
    help="Recipes with stages: run this stage alone, from what the stage before it made.",
)
@click.option(
    "--from-stage",
    metavar="NAME",
    help="Recipes with stages: run this stage and those after it.",
)
@click.option(
    "--start",
    type=PATH,
    metavar="CHECKPOINT",
    help="Recipes with stages: start that stage from this checkpoint instead.",
)
@takes_overrides
def train(
    recipe: Path,
    preset: str | None,
    dry_run: bool,
    resume: str | None,
    stage: str | None,
    from_stage: str | None,
    start: Path | None,
    overrides: tuple[str, ...],
) -> int:
    """Run a recipe. Overrides: --loop.steps 50 --learner.ranks 2"""
    from avatar_rl.cluster.commands.train import Asked, train

    if stage and from_stage:
        raise click.UsageError("argument --from-stage: not allowed with argument --stage")
    return train(recipe, overrides, Asked(preset, dry_run, resume, stage, from_stage, start))


@avatar.command(cls=Overridable, context_settings=OVERRIDABLE)
@click.argument("checkpoint", type=PATH)
@click.option(
    "--recipe", type=RECIPE, help="Data, template, engine and rewards; of a run, its own else."
)
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(["audio", "video", "image"]),
    help="Silence or black in its place; may be repeated.",
)
@click.option(
    "--benchmark",
    metavar="NAMES",
    help="Public sets instead of the recipe's held-out prompts: worldsense,omnibench,... or list.",
)
@click.option("--sets", type=PATH, default=Path("sets"), help="Holds a folder for each public set.")
@click.option("--out", type=PATH, help="Where answers are kept; start again there to go on.")
@click.option(
    "--wording",
    type=click.Choice(["recipe", "official"]),
    default="recipe",
    help="Ask with the recipe's template, or in the words of the set's authors.",
)
@click.option("--limit", type=click.IntRange(min=1), help="The first N questions of each set.")
@click.option("--skip-missing", is_flag=True, help="Leave out questions whose media are missing.")
@click.option(
    "--table",
    is_flag=True,
    help="Compare: CHECKPOINT and further words are --out folders of finished evaluations.",
)
@takes_overrides
def evaluate(
    checkpoint: Path,
    recipe: Path | None,
    without: tuple[Modality, ...],
    overrides: tuple[str, ...],
    **options: Unpack[PublicSetWords],
) -> int:
    """Accuracy of a checkpoint: held out, without a modality, or on public benchmarks.

    Of a run (its folder, or its id below runs/) the exported policy is taken.

    avatar evaluate MODEL --recipe R | avatar evaluate MODEL --recipe R --benchmark omnibench |
    avatar evaluate OUT1 OUT2 --table
    """
    from avatar_rl.cluster.commands.public_sets import evaluate_sets, list_sets, print_table
    from avatar_rl.cluster.commands.train import evaluate_checkpoint

    if options["table"]:
        return print_table([checkpoint, *map(Path, overrides)])
    if options["benchmark"] == "list":
        return list_sets()
    if options["benchmark"] is not None:
        if recipe is None:
            raise click.UsageError("Missing option '--recipe'.")
        return evaluate_sets(checkpoint, recipe, overrides, options)
    return evaluate_checkpoint(checkpoint, recipe, overrides, without=sorted(set(without)))


@avatar.command()
@click.argument("name", required=False)
def presets(name: str | None) -> int:
    """List the named methods, or show every key of one with its source."""
    from avatar_rl.cluster.commands.presets import show_presets

    return show_presets(name)


@avatar.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("--folder", type=PATH, default=Path("runs"), help="Parent of the run folders.")
@click.option("--host", default="127.0.0.1", help="Address to listen on (default: loopback).")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8420,
    help="Port to listen on (default 8420); 0 takes any that is free.",
)
@click.option(
    "--media",
    type=PATH,
    multiple=True,
    help="A folder to look in for media that moved; may be repeated.",
)
@click.option("--export", type=PATH, help="Write static files there that open from disk.")
@click.option("--terminal", is_flag=True, help="Print one run here in place of a page.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the browser.")
def view(
    runs: tuple[str, ...],
    folder: Path,
    host: str,
    port: int,
    media: tuple[Path, ...],
    export: Path | None,
    terminal: bool,
    open_browser: bool,
) -> int:
    """Look at runs in the browser: curves, groups, rollouts with their clips.

    RUN is a run folder, or the id of a run below --folder; without one all are listed.
    """
    from avatar_rl.cluster.view.command import Asked
    from avatar_rl.cluster.view.command import view as shown

    return shown(runs, Asked(folder, host, port, media, export, terminal, open_browser))


@avatar.command()
@click.argument("run")
@click.option("--rollout-workers", type=int, required=True, metavar="N")
@click.option("--folder", type=PATH, default=Path("runs"), help="Parent of the run folders.")
@click.option("--url", help="The run's Redis, where config.yaml does not say it.")
def scale(run: str, rollout_workers: int, folder: Path, url: str | None) -> int:
    """Change how many rollout actors a run under way has.

    RUN is a run folder, or the id of a run below --folder.
    """
    from avatar_rl.cluster.checkpoints.resume import named_run
    from avatar_rl.cluster.commands.scale import scale

    print(scale(named_run(folder, run) or Path(run), rollout_workers, url=url))
    return 0


@avatar.command(cls=Overridable, context_settings=OVERRIDABLE)
@click.argument("recipe", type=RECIPE, required=False)
@takes_overrides
def doctor(recipe: Path | None, overrides: tuple[str, ...]) -> int:
    """Check this machine, and what a recipe needs of it."""
    from avatar_rl.cluster.commands.doctor import examine
    from avatar_rl.cluster.commands.findings import print_findings
    from avatar_rl.cluster.recipe.load import parse_overrides

    return print_findings(examine(recipe, parse_overrides(overrides)))


@avatar.group()
def hints() -> None:
    """Hints for prompts that stay hard."""


@hints.command()
@asks_endpoint
@click.option(
    "--attach",
    multiple=True,
    type=click.Choice(["video", "image", "audio", "none"]),
    help="Media that the teacher is shown; may be repeated (default: video and image, and sound "
    "where the teacher takes it).",
)
@click.option(
    "--frames", type=click.IntRange(min=1), default=8, help="Most frames of a prompt (default 8)."
)
def generate(attach: tuple[str, ...], frames: int, **asked: Unpack[EndpointOptions]) -> int:
    """Have a teacher write one hint per prompt.

    Resumable: a rerun with the same --out asks only for what is missing.
    """
    from avatar_rl.cluster.annotation.hints import generate

    kinds = cast("tuple[Modality, ...]", tuple(kind for kind in attach if kind != "none"))
    return generate(asked, kinds if attach else None, frames)


@avatar.group()
def captions() -> None:
    """Audio captions, the text cue of Stage 2."""


@captions.command("generate")
@asks_endpoint
@click.option("--again", is_flag=True, help="Ask also where a prompt has a caption.")
def generate_captions(again: bool, **asked: Unpack[EndpointOptions]) -> int:
    """Have a model that hears describe each prompt's sound.

    Resumable: a rerun with the same --out asks only for what is missing.
    """
    from avatar_rl.cluster.annotation.captions import generate

    return generate(asked, again=again)


@avatar.group()
def buffer() -> None:
    """Look at, export, move or clear a run's replay buffer.

    RUN is a run folder, or with --url the run id.
    """


Word = Callable[[Command], Command]
RUN: Word = click.argument("run")
FILE: Word = click.argument("file", type=PATH)
URL: Word = click.option("--url", help="redis://, rediss:// or unix:// URL of the server.")
PASSWORD_ENV: Word = click.option(
    "--password-env", help="Environment variable that holds the password."
)
FIRST_SEQ: Word = click.option(
    "--first-seq", type=int, help="Number an export's groups from here on; none keeps theirs."
)
AS_VERSION: Word = click.option(
    "--as-version",
    type=int,
    help="Policy version that generated an export of another run, as this run counts.",
)
BUFFER_COMMANDS: tuple[tuple[str, str, list[Word]], ...] = (
    ("inspect", "Tiers, thresholds, stock, leases, ledger, memory.", []),
    ("export", "Replayable trajectories as .jsonl or .parquet.", [FILE]),
    ("snapshot", "Everything, as a file that `import` restores.", [FILE]),
    (
        "import",
        "Replace the contents by a snapshot, or add the trajectories of a .jsonl or .parquet "
        "export.",
        [FILE, FIRST_SEQ, AS_VERSION],
    ),
    ("clear", "Remove the run's contents.", []),
)


def _buffer_command(name: str) -> Command:
    def run(**options: Unpack[BufferOptions]) -> int:
        from avatar_rl.cluster.commands.buffer import run

        return run(name, **options)

    return run


for _name, _meaning, _words in BUFFER_COMMANDS:
    _command = _buffer_command(_name)
    for _word in (PASSWORD_ENV, URL, *reversed(_words), RUN):
        _command = _word(_command)
    buffer.command(_name, help=_meaning)(_command)


for _command in (
    cli_data.data,
    *(cli_keys.explain, cli_keys.schema, cli_keys.init, cli_keys.completion),
    *(cli_runs.runs, cli_runs.logs, cli_runs.compare),
):
    avatar.add_command(_command)


if __name__ == "__main__":  # `python -m cluster.cli` in a checkout hands over to the import root
    from avatar_rl.cluster.cli import main as entry

    sys.exit(entry())
