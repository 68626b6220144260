"""Commands about runs: `runs`, `logs`, `compare`. cli.py adds them; the work is done in
commands/."""

from __future__ import annotations

from pathlib import Path

import click

from avatar_rl.cluster.cli_types import OVERRIDABLE, PATH

FOLDER = click.option(
    "--folder", type=PATH, default=Path("runs"), help="Parent of the run folders."
)


@click.command(context_settings=OVERRIDABLE)
@click.argument("words", metavar="[list|show|resume] [RUN]", nargs=-1, type=click.UNPROCESSED)
@FOLDER
@click.option("--sort", metavar="COLUMN", default="started", show_default=True)
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("--columns", metavar="A,B,...", help="Columns to show; `all` for every one.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def runs(
    words: tuple[str, ...],
    folder: Path,
    sort: str,
    reverse: bool,
    columns: str | None,
    as_json: bool,
) -> int:
    """List runs, show one, resume one.

    runs [list] [FOLDER] | runs show RUN | runs resume RUN [--loop.steps 200 ...]

    Columns: run, state, phase, step, before and now (held-out accuracy), gain, reward, started,
    took, host, error.
    """
    from avatar_rl.cluster.commands.history.listing import COLUMNS, SHOWN, show
    from avatar_rl.cluster.commands.runs import run

    wanted = tuple(COLUMNS) if columns == "all" else tuple((columns or "").split(","))
    shown = wanted if columns else SHOWN

    def listed(parent: Path) -> int:
        return show(parent, sort=sort, reverse=reverse, columns=shown, as_json=as_json)

    return run(words, folder, listed)


@click.command()
@click.argument("run")
@click.argument("role", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on until the run is over.")
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Of the end of each log; 0 for all.",
)
@FOLDER
def logs(run: str, role: str | None, follow: bool, lines: int, folder: Path) -> int:
    """What the processes of a run have printed.

    ROLE is events, learner-0, rollout-1, reward, weights, replica, redis, judge ...; learner means
    all learner ranks, none means all logs.
    """
    from avatar_rl.cluster.checkpoints.resume import named_run
    from avatar_rl.cluster.commands.history.logs import logs

    return logs(named_run(folder, run) or Path(run), role, lines=lines, follow=follow)


@click.command()
@click.argument("runs", metavar="RUN RUN ...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@FOLDER
def compare(runs: tuple[str, ...], as_json: bool, folder: Path) -> int:
    """Settings that differ between runs, and what came of them, side by side."""
    from avatar_rl.cluster.checkpoints.resume import named_run
    from avatar_rl.cluster.commands.history.compare import compare

    return compare([named_run(folder, run) or Path(run) for run in runs], as_json=as_json)
