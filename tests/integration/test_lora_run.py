"""A whole run with LoRA as a user starts it: cold start, two ranks, rollouts that take the adapter,
and the run continued from its checkpoint by two ranks that share their packs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from avatar_rl.cluster.checkpoints.checkpoint import newest_checkpoint
from avatar_rl.cluster.telemetry.run_files import read_metrics, read_status
from avatar_rl.learner.adapter.files import AdapterFolder, merge_adapter
from tests.small_run import MODEL, start

LORA = (
    *("--cold_start.steps", "2", "--cold_start.batch_size", "8", "--data.synthetic.n_sft", "16"),
    *("--cold_start.lora.rank", "4"),
    *("--learner.lora.rank", "4", "--learner.lora.targets", "[llm]"),
    *("--learner.optimizer.lr", "1e-3"),
)


def test_a_run_with_lora_trains_resumes_and_exports(tmp_path: Path) -> None:
    process = start(tmp_path, *LORA)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    [run] = (tmp_path / "runs").iterdir()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    said = [event["message"] for event in events if event["kind"] == "lora"]
    assert said == [
        "rollouts take the adapter",
        "rank 4 on 21 llm layers: 24,576 parameters train",
    ]
    assert "tokens agree" in output

    [base] = (tmp_path / "cache").glob("cold-start-*")
    # The cold start was trained by an adapter of its own.
    assert AdapterFolder.open(base / "adapter").base(None) == MODEL.resolve()

    checkpoint = newest_checkpoint(run, print)
    assert checkpoint is not None
    saved = sum(p.bytes for name, p in checkpoint.files.items() if name.startswith("learner/"))
    assert saved < 0.5 * (base / "model.safetensors").stat().st_size  # whole it would be 4 times

    shared = ("--learner.sequence_parallel", "2")  # how packs are computed may change
    process = start(tmp_path, *LORA, *shared, "--loop.steps", "4", "--resume", str(run))
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert read_status(run).state == "finished"
    rows = [row for row in read_metrics(run) if row["step"]]
    assert [row["version"] for row in rows] == [1, 2, 3, 4]
    assert all(row["kl/reference"] is not None for row in rows)

    out = run / "checkpoint"
    adapter = AdapterFolder.open(out / "adapter")
    assert adapter.base(None) == base.resolve()
    again = merge_adapter(adapter, base, tmp_path / "merged")
    found, expected = (load_file(path / "model.safetensors") for path in (again, out))
    start_weights, untrained = (load_file(p / "model.safetensors") for p in (base, MODEL))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for before, after in ((untrained, start_weights), (start_weights, expected)):
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        assert all(n.startswith("thinker.model.layers.") for n in moved)
        assert len(moved) == 21
