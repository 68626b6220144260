"""`avatar buffer inspect|export|import|snapshot|clear`: a run's replay buffer from the outside."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from buffer_service.config import BufferConfig
from buffer_service.server import EmbeddedRedis
from buffer_service.store import ReplayBuffer
from buffer_service.telemetry import Stats
from cluster.runlock import RunLock
from cluster.telemetry import ENDED, MASK, read_status
from prompts.errors import ConfigError, ReplayBufferError

log = logging.getLogger(__name__)

READS = ("inspect", "export", "snapshot")  # may be done to a run under way


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command group. ``run`` is a run folder with an embedded buffer; ``--url`` a server and a run id."""
    group = commands.add_parser("buffer", help="look at, export, move or clear a run's replay buffer")
    actions = group.add_subparsers(dest="action", required=True)
    for name, meaning, takes_file in (
        ("inspect", "tiers, thresholds, stock, leases, ledger, memory", False),
        ("export", "replayable trajectories as .jsonl or .parquet", True),
        ("snapshot", "everything, as a file that `import` restores", True),
        ("import", "replace the contents by a snapshot, or add the trajectories of a .jsonl or .parquet export", True),
        ("clear", "remove the run's contents", False),
    ):
        action = actions.add_parser(name, help=meaning)
        action.add_argument("run", help="run folder, or with --url the run id")
        if takes_file:
            action.add_argument("file", type=Path)
        action.add_argument("--url", help="redis://, rediss:// or unix:// URL of the server")
        action.add_argument("--password-env", help="environment variable that holds the password")
        if name == "import":
            action.add_argument(
                "--first-seq", type=int, help="number an export's groups from here on; none keeps theirs"
            )
        action.set_defaults(run_command=name)


def run(options: argparse.Namespace) -> int:
    """Exit code 0; errors are AvatarError children."""
    command = options.run_command
    with open_buffer(
        options.run, url=options.url, password_env=options.password_env, create=command == "import",
        under_way=command in READS,
    ) as buffer:  # fmt: skip
        if command == "inspect":
            buffer.check_ledger()
            Console().print(stats_table(buffer.run_id, buffer.stats()))
        elif command == "export":
            print(f"{buffer.export(options.file)} trajectories written to {options.file}")
        elif command == "snapshot":
            report = buffer.snapshot(options.file)
            print(
                f"{report.trajectories} trajectories of {report.prompts} prompts, {report.size} bytes: {options.file}"
            )
        elif command == "import":
            print(import_file(buffer, options.file, options.first_seq))
        else:
            print(f"{buffer.clear()} keys removed")
    return 0


def import_file(buffer: ReplayBuffer, file: Path, first_seq: int | None) -> str:
    """What was done, in words. Raises as ``ReplayBuffer.restore`` and ``import_trajectories`` do."""
    if file.suffix in (".jsonl", ".parquet"):
        done = buffer.import_trajectories(file, first_seq=first_seq)
        return (
            f"{done.trajectories} trajectories in {done.groups} groups added, {done.duplicates} groups known before, "
            f"{done.evicted} trajectories evicted"
        )
    if first_seq is not None:
        raise ConfigError(f"--first-seq numbers a .jsonl or .parquet export; {file} is taken for a snapshot")
    report = buffer.restore(file, any_run=True)
    return f"{report.trajectories} trajectories of {report.prompts} prompts restored, version {report.version}"


@contextmanager
def open_buffer(
    run: str, *, url: str | None, password_env: str | None = None, create: bool = False, under_way: bool = False,
    login: BufferConfig | None = None,
) -> Iterator[ReplayBuffer]:  # fmt: skip
    """The run at ``url`` with the settings it has (``create``: a new one where there is none), or that of a run folder:
    at the server its recipe names (``login``: with these secrets), or the embedded one, started from its append-only
    file; ``under_way``: of a run that goes on, the server it has.

    Raises ConfigError when the folder is not a run's or hides a password, ConfigError or BufferSetupError while its run
    goes on (unless ``under_way``), and as ``ReplayBuffer.attach`` does.
    """
    if url is not None:
        with ReplayBuffer.attach(BufferConfig(password_env=password_env), run, url, create=create) as buffer:
            yield buffer
        return
    folder = Path(run)
    recipe, data = folder / "config.yaml", folder / "redis"
    if not recipe.is_file():
        raise ConfigError(f"{folder} is not a run folder: give one of `avatar runs`, or --url")
    config = BufferConfig.model_validate(yaml.safe_load(recipe.read_text())["buffer"])
    if config.url is not None:
        with nullcontext() if under_way else _held(folder), _served(folder, config.url, login or config) as buffer:
            yield buffer
        return
    if not data.is_dir():
        raise ConfigError(f"{folder} has no embedded buffer: its run ended before it had one, or name its --url")
    if under_way and (server_url := running_server(folder)) is not None:
        with ReplayBuffer.attach(config, folder.resolve().name, server_url) as buffer:
            yield buffer
        return
    with (
        EmbeddedRedis(data, appendfsync=config.appendfsync) as server,
        ReplayBuffer.connect(config, folder.resolve().name, url=server.url) as buffer,
    ):
        yield buffer


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The run's lock, so that no job goes on with it meanwhile."""
    lock = RunLock(folder, on_warning=print)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _served(folder: Path, url: str, login: BufferConfig) -> ReplayBuffer:
    """Where ``login`` leads, to a server that may have moved, or else at the URL that the run had."""
    if MASK in url and login.url in (None, url):
        raise ConfigError(f"{folder / 'config.yaml'} has the password in buffer.url masked: give --url")
    run_id = folder.resolve().name
    if login.url in (None, url):
        return ReplayBuffer.attach(login, run_id, url)
    try:
        return ReplayBuffer.attach(login, run_id, login.url)
    except ReplayBufferError as error:
        if MASK in url:
            raise
        log.info("the buffer of run %s is not at buffer.url (%s): its own URL is tried", run_id, error)
        return ReplayBuffer.attach(login, run_id, url)


def running_server(folder: Path) -> str | None:
    """URL of the embedded server of a run that is under way on this machine, as it wrote it into the lock of its data
    folder; None when there is none."""
    lock = folder / "redis" / "lock"
    if not (folder / "status.json").is_file() or not lock.is_file():
        return None
    status = read_status(folder)
    return None if status.lost or status.state in ENDED else lock.read_text().strip() or None


def stats_table(run_id: str, stats: Stats) -> Table:
    """One run's buffer at a glance."""
    table = Table(title=f"replay buffer of {run_id}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    low, high = stats.threshold_low, stats.threshold_high
    bounds = "-" if low is None or high is None else f"hard <= {low:.3f} < medium <= {high:.3f} < easy"
    ledger = stats.ledger
    dropped = ", ".join(f"{name} {count}" for name, count in ledger.dropped.items()) or "0"
    for name, value in (
        ("policy version", f"{stats.version} (step {stats.trained_step} committed)"),
        ("prompts", f"{stats.prompts} with statistics, {stats.quarantined_prompts} quarantined"),
        ("tiers", ", ".join(f"{tier} {count}" for tier, count in stats.tiers.items())),
        ("thresholds", bounds),
        ("stock", f"{stats.stock} trajectories, {stats.successes} successes"),
        ("tickets", f"{stats.pending_train} waiting, {stats.pending_eval} evaluation, {stats.leased} leased"),
        ("fresh", f"{stats.fresh} groups wait to be trained"),
        ("hints", f"{stats.hints_on} on"),
        ("ledger", f"{ledger.generated} generated = {ledger.trained_fresh} trained + {ledger.replay_only} replay only"),
        ("", f"+ dropped ({dropped}) + {ledger.in_flight} in flight"),
        ("completions", f"{ledger.completions}, {ledger.tokens} tokens"),
        ("memory", f"{stats.used_memory / 1e6:.1f} MB"),
    ):
        table.add_row(name, value)
    return table
