"""`avatar evaluate --benchmark` as a user starts it: real vLLM, Redis and Ray, real clips."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.evaluation import ROOT, SET, command
from tests.public_set import write_daily_omni


def test_a_set_is_answered_and_only_what_is_open_is_asked_again(tmp_path: Path) -> None:
    asked = write_daily_omni(tmp_path / "sets" / SET, 24)
    said = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "Daily-Omni" in said.stdout and f"{asked} answers" in said.stdout
    folder = tmp_path / "out" / SET
    rows = pq.read_table(folder / "answers.parquet").to_pylist()
    result = json.loads((folder / "result.json").read_text())
    assert len(rows) == result["answered"] == asked and result["not_asked"] == 0
    assert all("<answer>" in row["completion"] for row in rows)
    right = [row["given"] == row["answer"] for row in rows]
    assert result["figures"]["accuracy"] == sum(right) / asked
    low, high = result["intervals"]["accuracy"]
    assert low <= result["figures"]["accuracy"] <= high

    lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join(lines[:-3]) + lines[-3][:20])  # killed
    again = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "asking: 3 questions" in again.stdout, again.stderr
    assert pq.read_table(folder / "answers.parquet").num_rows == asked

    table = [sys.executable, "-m", "avatar_rl.cluster.cli", "evaluate", str(tmp_path / "out")]
    shown = subprocess.run([*table, "--table"], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.startswith("| set | out |") and "| Daily-Omni | " in shown.stdout
