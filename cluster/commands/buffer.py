"""`avatar buffer inspect|export|import|snapshot|clear`: a run's replay buffer from the outside."""

from __future__ import annotations

from pathlib import Path
from typing import Required, TypedDict, Unpack

from rich.console import Console
from rich.table import Table

from avatar_rl.buffer_service.stats import Stats
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.services.run_buffer import open_buffer
from avatar_rl.common.errors import ConfigError

READS = ("inspect", "export", "snapshot")  # may be done to a run under way


class BufferOptions(TypedDict, total=False):
    """``run`` is a run folder, or with ``url`` a run id on that server."""

    run: Required[str]
    url: str | None
    password_env: str | None
    file: Path
    first_seq: int | None
    as_version: int | None


def run(command: str, **options: Unpack[BufferOptions]) -> int:
    """Exit code 0. Raises as ``open_buffer`` and the buffer's own methods do."""
    with open_buffer(
        options["run"],
        url=options.get("url"),
        password_env=options.get("password_env"),
        create=command == "import",
        under_way=command in READS,
    ) as buffer:
        if command == "inspect":
            buffer.stats.check_ledger()
            Console().print(stats_table(buffer.run_id, buffer.stats.read()))
        elif command == "export":
            file = options["file"]
            print(f"{buffer.export(file)} trajectories written to {file}")
        elif command == "snapshot":
            report = buffer.snapshot(options["file"])
            print(
                f"{report.trajectories} trajectories of {report.prompts} prompts, {report.size} "
                f"bytes: {options['file']}"
            )
        elif command == "import":
            numbers = options.get("first_seq"), options.get("as_version")
            print(import_file(buffer, options["file"], *numbers))
        else:
            print(f"{buffer.clear()} keys removed")
    return 0


def import_file(
    buffer: ReplayBuffer, file: Path, first_seq: int | None, as_version: int | None
) -> str:
    """What was done, in words. Raises as ``ReplayBuffer.restore`` and ``import_trajectories``
    do."""
    if file.suffix in (".jsonl", ".parquet"):
        done = buffer.import_trajectories(file, first_seq=first_seq, as_version=as_version)
        return (
            f"{done.trajectories} trajectories in {done.groups} groups added, {done.duplicates} "
            "groups known before, "
            f"{done.evicted} trajectories evicted"
        )
    for option, value in (("--first-seq", first_seq), ("--as-version", as_version)):
        if value is not None:
            raise ConfigError(
                f"{option} numbers a .jsonl or .parquet export; {file} is taken for a snapshot"
            )
    report = buffer.restore(file, any_run=True)
    return (
        f"{report.trajectories} trajectories of {report.prompts} prompts restored, version "
        f"{report.version}"
    )


def stats_table(run_id: str, stats: Stats) -> Table:
    """One run's buffer at a glance."""
    table = Table(title=f"replay buffer of {run_id}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    low, high = stats.threshold_low, stats.threshold_high
    bounds = (
        "-" if low is None or high is None else f"hard <= {low:.3f} < medium <= {high:.3f} < easy"
    )
    ledger = stats.ledger
    dropped = ", ".join(f"{name} {count}" for name, count in ledger.dropped.items()) or "0"
    for name, value in (
        ("policy version", f"{stats.version} (step {stats.trained_step} committed)"),
        ("prompts", f"{stats.prompts} with statistics, {stats.quarantined_prompts} quarantined"),
        ("tiers", ", ".join(f"{tier} {count}" for tier, count in stats.tiers.items())),
        ("thresholds", bounds),
        ("stock", f"{stats.stock} trajectories, {stats.successes} successes"),
        (
            "tickets",
            f"{stats.pending_train} waiting, {stats.pending_eval} evaluation, {stats.leased} "
            "leased",
        ),
        ("fresh", f"{stats.fresh} groups wait to be trained"),
        ("hints", f"{stats.hints_on} on"),
        (
            "ledger",
            f"{ledger.generated} generated = {ledger.trained_fresh} trained + "
            f"{ledger.replay_only} replay only",
        ),
        ("", f"+ dropped ({dropped}) + {ledger.in_flight} in flight"),
        ("completions", f"{ledger.completions}, {ledger.tokens} tokens"),
        ("memory", f"{stats.used_memory / 1e6:.1f} MB"),
    ):
        table.add_row(name, value)
    return table
