"""Export and import of trajectories: what comes back, what is rebuilt, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from avatar_rl.buffer_service.config import BufferConfig, HintGateConfig
from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.common.errors import ConfigError
from tests.buffer_records import make_group, tier_of

CONFIG = BufferConfig(capacity=100, warm_up=0, hints=HintGateConfig(zero_patience=2))
REWARDS = {
    0: [0.0, 1.0, 0.5],
    1: [0.0, 0.0],
    2: [1.0],
    3: [0.0, 0.0],
}  # by seq; seq 3 is prompt p1 again


@pytest.fixture
def source(server: EmbeddedRedis) -> Iterator[ReplayBuffer]:
    """A run with eight replayable trajectories of three prompts."""
    redis.Redis.from_url(server.url).flushall()
    with ReplayBuffer.connect(CONFIG, "source", server.url) as buffer:
        token = buffer.replay.new_fencing_token()
        buffer.requests.push(
            [RolloutRequest(seq=s, prompt_id=f"p{s % 3 or s // 3}", step=0, n=4) for s in REWARDS]
        )
        for lease in buffer.requests.lease("a", 4):
            buffer.requests.add_group(
                make_group(lease, REWARDS[lease.request.seq]), lease, tokens_generated=1
            )
        buffer.replay.commit_step(0, 1, [f"{s:08d}" for s in REWARDS], token)
        yield buffer


@pytest.fixture
def target(source: ReplayBuffer) -> Iterator[ReplayBuffer]:
    with ReplayBuffer.connect(CONFIG, "target", source._connection.url) as buffer:
        yield buffer


def namespace(buffer: ReplayBuffer) -> dict[bytes, bytes]:
    client = redis.Redis.from_url(buffer._connection.url)
    return {key: client.dump(key) or b"" for key in client.keys(buffer._connection.prefix + "*")}


def records(buffer: ReplayBuffer, n: int) -> dict[str, Any]:
    drawn = buffer.replay.draw(n, step=5, seed=0, strategy="uniform")
    return {t.id: t for t in drawn}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_imported_trajectories_are_replayable_stock(
    source: ReplayBuffer, target: ReplayBuffer, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"stock{suffix}"
    assert source.export(path) == 8
    report = target.import_trajectories(path)
    assert (report.groups, report.trajectories, report.duplicates, report.evicted) == (4, 8, 0, 0)
    before, after = records(source, 8), records(target, 8)
    assert sorted(after) == sorted(before) and len(after) == 8
    for tid, t in after.items():
        assert np.array_equal(t.token_ids, before[tid].token_ids)
        assert np.array_equal(t.logprobs, before[tid].logprobs)
        assert (t.reward, t.versions, t.components) == (
            before[tid].reward,
            ((0, 6),),
            before[tid].components,
        )
    # p0: the mean of 0, 1, 0.5; p1: of four zeros in two visits; p2: 1.
    assert target.replay.baselines(["p0", "p1", "p2"]) == [0.5, 0.0, 1.0]
    assert [tier_of(target, p) for p in ("p1", "p0", "p2")] == ["hard", "medium", "easy"]
    books = target.stats.check_ledger()
    assert (books.generated, books.replay_only, books.completions, books.tokens) == (4, 4, 8, 0)
    assert target.stats.read().counters["imported"] == 4
    target.requests.push([RolloutRequest(seq=10, prompt_id="p1", step=0, n=4)])
    assert target.requests.lease("a", 1)[
        0
    ].hinted  # two visits at zero accuracy: the streak came along

    again = target.import_trajectories(path)
    assert (again.groups, again.duplicates) == (0, 4) and target.stats.read().stock == 8


def test_groups_can_be_numbered_anew_and_leave_the_prompt_stream_alone(
    source: ReplayBuffer, target: ReplayBuffer, tmp_path: Path
) -> None:
    source.export(tmp_path / "stock.jsonl")
    token = target.replay.new_fencing_token()
    target.requests.push([RolloutRequest(seq=s, prompt_id="new", step=0, n=4) for s in range(2)])
    with pytest.raises(RecordError, match=r"group 00000000 is what a request .* another first seq"):
        target.import_trajectories(tmp_path / "stock.jsonl")
    assert target.stats.read().stock == 0
    assert target.import_trajectories(tmp_path / "stock.jsonl", first_seq=5000).groups == 4
    assert {tid[:8] for tid in records(target, 8)} == {
        "00005000",
        "00005001",
        "00005002",
        "00005003",
    }
    for lease in target.requests.lease("a", 2):
        target.requests.add_group(make_group(lease, [1.0]), lease, tokens_generated=1)
    share = target.replay.lease_fresh("learner", 0, fencing_token=token)
    assert share.ready and [g.seq for g in share.groups] == [0, 1]
    target.replay.commit_step(0, 1, [g.id for g in share.groups], token)
    assert target.stats.check_ledger().trained_fresh == 2 and target.stats.read().stock == 10


def test_what_was_evicted_leaves_no_gap_and_capacity_holds(
    source: ReplayBuffer, tmp_path: Path
) -> None:
    source.export(tmp_path / "stock.jsonl")
    lines = (tmp_path / "stock.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["id"] != "00000000.1"]
    (tmp_path / "stock.jsonl").write_text("\n".join(kept))
    small = CONFIG.model_copy(update={"capacity": 4})  # 1 Easy, 1 Medium, 2 Hard
    with ReplayBuffer.connect(small, "small", source._connection.url) as target:
        report = target.import_trajectories(tmp_path / "stock.jsonl")
        stats = target.stats.read()
        assert report.trajectories == 7 and stats.stock == 7 - report.evicted <= 4
        assert target.replay.baselines(["p0"]) == [
            0.25
        ]  # of 0 and 0.5: the evicted success is not in the file
        t = records(target, 4).get("00000000.1")
        assert t is None or t.reward == 0.5


def test_an_import_is_checked_before_it_begins(
    source: ReplayBuffer, target: ReplayBuffer, tmp_path: Path
) -> None:
    path = tmp_path / "stock.jsonl"
    source.export(path)
    good = path.read_text().splitlines()
    before = namespace(target)

    def changed(**fields: object) -> str:
        return json.dumps({**json.loads(good[-1]), **fields})

    for last, message in (
        (good[-1].replace('"reward":0.0', '"reward":NaN'), "row 8"),
        (changed(reward=1e999), "row 8"),
        (changed(logprobs=[0.0] * 6 + [-1.0]), "group 00000003: .*equal length"),
        (changed(logprobs=[-1e300] * 6), "group 00000003: .*not finite"),
        (changed(token_ids=[2**40] * 6), "group 00000003"),
        (changed(versions=[[-1, 6]]), "policy versions"),
        (changed(step=-1), "step"),
        (
            changed(logprobs=[-1.0, 0.25] + [0.0] * 4),
            "row 8: log-probability 0.25 of token 1 is abo",
        ),
        (changed(versions=[[0, 4], [1, 2]]), r"row 8: policy version 1 is above the run's own, 0"),
        (changed(finish_reason="abort"), "row 8: finish_reason is 'abort', it must be stop or le"),
        (changed(colour="red"), "row 8.*colour"),
        (changed(prompt_id="other"), "differs from its group"),
        (changed(group_id="00000000"), "row 8: group 00000000 appeared before"),
        (changed(group_id="abc"), "row 8: group id 'abc' is no seq"),
        ('{"id": "x"}', "row 8: .*missing required field"),
        ('"\\ud800', "row 8"),
    ):
        path.write_text("\n".join([*good[:-1], last]))
        with np.errstate(over="ignore"), pytest.raises(RecordError, match=message):
            target.import_trajectories(path)
    with pytest.raises(RecordError, match="as_version 1: the run's own version is 0"):
        target.import_trajectories(path, as_version=1)
    with pytest.raises(RecordError, match="seq 100000000"):
        target.import_trajectories(_write(path, "\n".join(good)), first_seq=10**8)
    assert namespace(target) == before


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_damaged_parquet_file_is_refused(
    source: ReplayBuffer, target: ReplayBuffer, tmp_path: Path
) -> None:
    path = tmp_path / "stock.parquet"
    source.export(path)
    table, data = pq.read_table(path), path.read_bytes()
    before = namespace(target)
    damages: list[Callable[[], object]] = [
        lambda: path.write_bytes(data[:-9]),
        lambda: path.write_bytes(b"PAR1"),
        lambda: pq.write_table(table.drop_columns("reward"), path),
        lambda: pq.write_table(table.set_column(0, "id", pa.array([1] * 8)), path),
        lambda: pq.write_table(
            table.set_column(
                table.schema.get_field_index("components"), "components", pa.array([[1]] * 8)
            ),
            path,
        ),
    ]
    for damage in damages:
        damage()
        with pytest.raises(RecordError, match=r"stock\.parquet, row"):
            target.import_trajectories(path)
    assert namespace(target) == before


def test_a_file_of_another_kind_is_refused(target: ReplayBuffer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of these suffixes"):
        target.import_trajectories(tmp_path / "stock.csv")
    with pytest.raises(ConfigError, match="is missing"):
        target.import_trajectories(tmp_path / "stock.jsonl")
    with pytest.raises(ConfigError, match="choose one of these suffixes"):
        target.export(tmp_path / "stock.csv")


def test_rows_of_another_run_count_as_a_version_of_this_one(
    source: ReplayBuffer, target: ReplayBuffer, tmp_path: Path
) -> None:
    path = tmp_path / "stock.jsonl"
    source.export(path)
    rows = [{**json.loads(line), "versions": [[40, 6]]} for line in path.read_text().splitlines()]
    _write(path, "\n".join(json.dumps(row) for row in rows))
    target.replay.publish_version(3)
    with pytest.raises(
        RecordError, match=r"row 1: policy version 40 is above .* 3; of another run"
    ):
        target.import_trajectories(path)
    assert target.import_trajectories(path, as_version=2).groups == 4
    assert {t.versions for t in records(target, 8).values()} == {((2, 6),)}
