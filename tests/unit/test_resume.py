"""Which run is gone on with, which changes of the recipe are harmless, and where its metrics are
cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar_rl.cluster.checkpoints.checkpoint import Checkpoint
from avatar_rl.cluster.checkpoints.resume import (
    HARMLESS,
    Resumption,
    check_assets,
    check_recipe,
    data_digest,
    find_run,
    flatten,
    open_folder,
    prepare,
    reusable_config,
    truncate_metrics,
    with_begun_warmup,
)
from avatar_rl.cluster.checkpoints.runlock import RunLock
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import Datasets, model_digest
from avatar_rl.cluster.telemetry.run_files import MASK, read_metrics, read_status
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.learner.engine import lr_at

RAW: dict[str, Any] = {"name": "local", "data": {"synthetic": {}}}


def a_config(parent: Path, **changes: Any) -> RunConfig:
    raw = {**RAW, "output": {"folder": str(parent)}}
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        place = raw
        for section in sections:
            place[section] = dict(place.get(section) or {})
            place = place[section]
        place[leaf] = value
    return RunConfig.model_validate(raw)


def a_run(parent: Path, run_id: str, state: str = "training", **changes: Any) -> Path:
    folder = RunFolder(parent / run_id, total_steps=100)
    folder.config(a_config(parent, **changes).model_dump(mode="json"))
    folder.status(state=state)
    folder.close()
    return folder.path


def test_auto_takes_the_newest_unfinished_run_of_the_recipe(tmp_path: Path) -> None:
    for run_id, state in (
        ("local-1", "failed"),
        ("local-2", "interrupted"),
        ("local-3", "finished"),
        ("local-grpo-5", "failed"),
        ("other-4", "failed"),
    ):
        a_run(tmp_path, run_id, state)
    assert find_run(tmp_path, "auto", "local") == tmp_path / "local-2"
    assert find_run(tmp_path, "auto", "nobody") is None


def test_auto_passes_over_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    """A mistyped restart, say; but where there is nothing else, it is that run's turn again."""
    assert find_run(tmp_path, "auto", "local") is None
    mistyped = a_run(tmp_path, "local-2", "failed")
    assert find_run(tmp_path, "auto", "local") == mistyped
    older = RunFolder(tmp_path / "local-1", total_steps=100)
    older.status(state="interrupted", step=7, started=read_status(mistyped).started - 60)
    older.close()
    assert find_run(tmp_path, "auto", "local") == older.path
    (mistyped / "checkpoints" / "step-000002").mkdir(parents=True)
    assert find_run(tmp_path, "auto", "local") == mistyped


def test_a_run_is_found_by_id_or_folder(tmp_path: Path) -> None:
    run = a_run(tmp_path, "local-1")
    assert find_run(tmp_path, "local-1", "local") == run
    assert find_run(Path("elsewhere"), str(run), "local") == run
    with pytest.raises(ConfigError, match=r"--resume local-7: .*newest: local-1"):
        find_run(tmp_path, "local-7", "local")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_that_is_extended_does_not_warm_up_again(tmp_path: Path, schedule: str) -> None:
    def rate(config: RunConfig, step: int) -> float:
        learner, steps = config.learner, config.loop.steps
        shape = {"warmup": learner.rising(steps), "total": steps, "schedule": learner.schedule}
        return lr_at(step, lr=1.0, **shape)  # type: ignore[arg-type]

    # Twice: a run that was extended may be extended or interrupted again.
    run = a_run(tmp_path, "local-1", loop__steps=100, learner__schedule=schedule)
    done = Checkpoint.__new__(Checkpoint)
    for steps in (4000, 4000, 9000):
        asked = a_config(tmp_path, loop__steps=steps, learner__schedule=schedule)
        check_recipe(run, asked)
        extended = with_begun_warmup(asked, Resumption(run, done))
        assert [rate(extended, step) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
        if schedule == "constant":
            assert rate(extended, 100) == rate(asked.model_copy(), steps - 1) == 1.0
        else:
            assert 0.97 < rate(extended, 100) < 1.0  # its place in the new total
        assert rate(asked, 20) < 1.0  # a new run of that length
        (run / "config.yaml").write_text(yaml.safe_dump(extended.model_dump(mode="json")))
    # One that ended before its first checkpoint begins again, with the warm-up of its length.
    assert with_begun_warmup(asked, Resumption(run, None)) == asked
    assert with_begun_warmup(asked, None) == asked


def test_what_changes_the_results_is_refused_and_listed(tmp_path: Path) -> None:
    run = a_run(tmp_path, "local-1")
    changed = a_config(tmp_path, learner__optimizer__lr=0.5, loop__fresh=2, seed=9)
    with pytest.raises(ConfigError) as caught:
        check_recipe(run, changed)
    message = str(caught.value)
    assert "learner.optimizer.lr: 5e-07 -> 0.5" in message and "loop.fresh: 4 -> 2" in message
    assert "seed: 0 -> 9" in message and len(message.splitlines()) == 5


def test_what_only_changes_how_it_runs_is_harmless(tmp_path: Path) -> None:
    run = a_run(tmp_path, "local-1")
    harmless = a_config(
        tmp_path,
        loop__steps=500,
        evaluation__every=3,
        rollout__workers=3,
        checkpoint__keep=9,
        screen="plain",
        output__report=False,
        buffer__url="redis://there",
        supervision__stall_s=5,
    )
    check_recipe(run, harmless)


def test_data_and_model_may_lie_elsewhere_but_not_be_others(tmp_path: Path) -> None:
    model, before, after = (tmp_path / name for name in ("model", "a.jsonl", "moved/b.jsonl"))
    for folder in (model, after.parent):
        folder.mkdir()
    for file in (model / "config.json", before, after):
        file.write_text("content")
    here = {"model__path": "tiny", "data": {"train": str(before)}}
    run = a_run(tmp_path, "local-1", **here)
    check_recipe(run, a_config(tmp_path, model__path="copied", data={"train": str(after)}))

    first, moved = Datasets(before, None, None), Datasets(after, None, None)
    for digest in (data_digest(first), data_digest(first, named=True)):  # the latter of older ones
        began = Checkpoint("local-1", 1, 1, model_digest(model), digest, 0, {}, [])
        check_assets(began, model, first)
    began = Checkpoint("local-1", 1, 1, model_digest(model), data_digest(first), 0, {}, [])
    check_assets(began, model, moved)
    after.write_text("other rows")
    with pytest.raises(ConfigError, match=r"another dataset: .*b\.jsonl has digest"):
        check_assets(began, None, moved)


def test_every_harmless_key_is_a_key() -> None:
    known = [
        key
        for key, _ in flatten(a_config(Path("runs"), cold_start__steps=2).model_dump(mode="json"))
    ]
    for name in HARMLESS:
        assert any(key == name or key.startswith(name + ".") for key in known), name


def test_a_masked_secret_is_the_same_secret_but_cannot_be_reused(tmp_path: Path) -> None:
    url = {"buffer__url": "redis://user:secret@there"}
    run = a_run(tmp_path, "local-1", **url)
    assert "user:secret" not in (run / "config.yaml").read_text()
    check_recipe(run, a_config(tmp_path, **url))
    with pytest.raises(
        ConfigError, match=r"buffer.url masked: use `avatar train RECIPE --resume local-1`"
    ):
        reusable_config(run)
    assert MASK not in str(reusable_config(a_run(tmp_path, "local-2")))


def test_without_its_recipe_a_run_cannot_go_on(tmp_path: Path) -> None:
    run = a_run(tmp_path, "local-1")
    for text in ("", "[1, 2]", "{"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml"):
            check_recipe(run, a_config(tmp_path))


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    a_run(tmp_path, "local-1", "failed")
    said: list[str] = []
    found = prepare(a_config(tmp_path), "auto", said.append)
    assert found == Resumption(tmp_path / "local-1", None)
    assert "from the beginning" in said[-1]
    assert prepare(a_config(tmp_path, name="fresh"), "auto", said.append) is None


def rows(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


def test_metrics_are_cut_where_the_checkpoint_was_taken(tmp_path: Path) -> None:
    """Not by step: an evaluation begun at the step of the checkpoint is logged under it long after,
    and will be again."""
    run = a_run(tmp_path, "local-1")
    file = run / "metrics.jsonl"
    for step in (1, 2):
        file.write_bytes(file.read_bytes() + json.dumps({"step": step}).encode() + b"\n")
    length = file.stat().st_size
    file.write_bytes(file.read_bytes() + b'{"step": 2, "eval/accuracy": 1}\n{"step": 3}\n{"st')
    checkpoint = Checkpoint("local-1", 2, 2, "m", "d", length, {}, [])
    lock = RunLock(run, on_warning=pytest.fail)
    folder = open_folder(run, lock, Resumption(run, checkpoint), 100, pytest.fail)
    folder.metrics(3, {"reward/mean": 1.0})
    folder.close()
    lock.release()
    assert rows(file) == [1, 2, 3] and len(read_metrics(run)) == 3
    assert (run / "metrics.abandoned.jsonl").read_bytes().count(b"\n") == 3
    truncate_metrics(run, 10**6)  # shorter than the checkpoint says: left alone
    assert rows(file) == [1, 2, 3]


def test_a_run_under_way_is_not_touched(tmp_path: Path) -> None:
    run = a_run(tmp_path, "local-1")
    holder = RunLock(run, on_warning=pytest.fail)
    holder.acquire()
    before = (run / "status.json").read_bytes()
    with pytest.raises(ConfigError, match="under way"):
        open_folder(
            run, RunLock(run, on_warning=pytest.fail), Resumption(run, None), 100, pytest.fail
        )
    assert (run / "status.json").read_bytes() == before
    holder.release()


def test_config_yaml_round_trips(tmp_path: Path) -> None:
    run = a_run(tmp_path, "local-1")
    assert RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text())) == a_config(
        tmp_path
    )
