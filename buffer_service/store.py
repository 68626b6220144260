"""The replay buffer of one run: prompt stream, replayable trajectories, statistics, ledger.

Contract: README.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.control import RunControl
from avatar_rl.buffer_service.errors import BufferSetupError, RecordError
from avatar_rl.buffer_service.records.validate import RUN_ID
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.buffer_service.redis.scripting import LAYOUT
from avatar_rl.buffer_service.replay import ReplayStock
from avatar_rl.buffer_service.requests import RequestQueue
from avatar_rl.buffer_service.stats import BufferStats
from avatar_rl.buffer_service.transfer import export as exchange
from avatar_rl.buffer_service.transfer.snapshot import SnapshotReport, load, save, wipe


class ReplayBuffer:
    """One run's buffer. Thread-safe; not to be carried over a fork: connect again in the child.

    Its parts are named by who asks: ``requests`` (rollout actors), ``replay`` (the learner),
    ``stats`` (telemetry) and ``control`` (values and heartbeats of the run's processes)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.requests = RequestQueue(connection)
        self.replay = ReplayStock(connection)
        self.stats = BufferStats(connection)
        self.control = RunControl(connection)

    @classmethod
    def connect(
        cls,
        config: BufferConfig,
        run_id: str,
        url: str | None = None,
        *,
        reconfigure: bool = False,
        create: bool = True,
    ) -> ReplayBuffer:
        """Connects to ``run_id`` at ``url`` (else ``config.url``) and sets the run up when it is
        new. ``create=False`` is for the run's processes: a run that was removed is not begun anew.

        Raises BufferUnreachableError, BufferAccessError, or BufferSetupError: Redis older than 6.2,
        evicting, a namespace of another layout, no run without ``create``, or a run with other
        settings (``reconfigure=True`` gives it those of ``config``)."""
        if not RUN_ID.fullmatch(run_id):
            raise BufferSetupError(
                f"run id {run_id!r}: use up to 64 of A-Z a-z 0-9 . _ -, a letter or digit first"
            )
        where = url or config.url
        if where is None:
            raise BufferSetupError(
                "no buffer URL: set buffer.url, or start an EmbeddedRedis and pass its url"
            )
        connection = Connection(config, run_id, where)
        try:
            connection.check_server()
            rules = config.server_rules()
            text = ";".join(f"{name}={value}" for name, value in rules.items())
            words = [str(word) for pair in rules.items() for word in pair]
            connection.run("open", run_id, LAYOUT, int(reconfigure), int(create), text, *words)
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    @classmethod
    def attach(
        cls, config: BufferConfig, run_id: str, url: str, *, create: bool = False
    ) -> ReplayBuffer:
        """Connects to a run with the settings it has; ``config`` gives the login, and what only
        clients use.

        Raises as ``connect``, and BufferSetupError when there is no such run, unless ``create``
        sets it up."""
        connection = Connection(config, run_id, url)
        try:
            connection.check_server()
            key = connection.key("meta")
            layout = connection.attempt(lambda: connection.client.hget(key, "format"))
            if layout is None and create:
                connection.close()
                return cls.connect(config, run_id, url)
            if layout is None:
                raise BufferSetupError(
                    f"{connection.where} has no run {run_id}; check the run id and the URL"
                )
            if int(layout) != LAYOUT:
                raise BufferSetupError(
                    f"run {run_id} has layout {int(layout)}, this code has {LAYOUT}; use its "
                    "release"
                )
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    @property
    def run_id(self) -> str:
        return self._connection.run_id

    @property
    def refusals(self) -> int:
        """Times that Redis had no room; grows while a call waits for it."""
        return self._connection.refusals

    @property
    def config(self) -> BufferConfig:
        return self._connection.config

    def snapshot(self, path: Path, on_begin: Callable[[], None] | None = None) -> SnapshotReport:
        """Writes the state of this moment to ``path`` while others continue to write. O(contents).

        ``on_begin`` is called once the state is fixed. Raises RecordError when another snapshot
        began or Redis restarted meanwhile."""
        return save(self._connection, path, on_begin)

    def restore(self, path: Path, *, any_run: bool = False) -> SnapshotReport:
        """Replaces the run's contents by a snapshot. Leases end, fencing tokens are renewed.
        Raises RecordError, BufferSetupError (of another run, unless ``any_run``)."""
        return load(self._connection, path, any_run=any_run)

    def export(self, path: Path) -> int:
        """Writes the replayable trajectories as .jsonl or .parquet, by id; returns how many."""
        return exchange.export(self._connection, path)

    def import_trajectories(
        self, path: Path, *, first_seq: int | None = None, as_version: int | None = None
    ) -> exchange.ImportReport:
        """Makes the trajectories of an exported .jsonl or .parquet replayable, group by group.
        O(file).

        Each group counts as one visit of its prompt. Statistics, tiers and hint streaks are rebuilt
        from what the file holds, so not from what was evicted before the export. A repeat changes
        nothing. The lowest seq is the oldest, in the stock and in a prompt's average.

        Args:
            first_seq: numbers the groups from here; they keep their seq without it. Use it in a
                run whose own prompt stream will reach those seqs (one bit per seq is kept).

            as_version: they all count as generated by this policy version, not above the run's
                own. Rows of another run need it, since their versions mean nothing here.

        Raises RecordError for a row at fault: the file is checked before anything is stored. Also
        for a group whose seq a request of this run waits for; then the groups before it stay."""
        newest = self.replay.version()
        if as_version is not None and not 0 <= as_version <= newest:
            raise RecordError(f"as_version {as_version}: the run's own version is {newest}")
        rules = exchange.ImportRules(newest, first_seq, as_version)
        return exchange.import_groups(self.requests.add_imported, path, rules)

    def clear(self) -> int:
        """Removes the run from Redis, for good; returns how many keys went. This client must
        connect again."""
        return wipe(self._connection)

    def close(self) -> None:
        """Closes the connections. The data stays."""
        self._connection.close()

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
