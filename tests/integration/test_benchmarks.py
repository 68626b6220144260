"""Every benchmark runs to its end on its smallest sizes, and stands on public names only."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.studies.arms import ARMS
from benchmarks.studies.runs import Records
from tests.browser import needs_chromium

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
#: Options beside `--smoke`, with the cache of the small runs for CACHE, and figures that must come.
CACHE = "CACHE"
OPTIONS: dict[str, tuple[str, ...]] = {
    "chaos": ("--output.cache", CACHE),
    "footprint": ("--output.cache", CACHE),
    "embeddings": ("--cache", CACHE),
    "hints": ("--cache", CACHE),
    "length": ("--cache", CACHE),
    "orchestration": ("--cache", CACHE),
    "soak": ("--output.cache", CACHE),
    "step_files": ("--output.cache", CACHE),
    "study": ("--cache", CACHE),
    "study_sparse": ("--cache", CACHE),
    "ablations": ("--cache", CACHE),
    "sweeps": ("--cache", CACHE),
}
FIGURES: dict[str, tuple[str, ...]] = {
    "bad_input": ("tried", "named_errors", "median_s", "faults", "recovered", "stopped_by_name"),
    "buffer": ("insert_ratio", "draw_ratio", "growth_insert", "bytes_per_trajectory"),
    "chaos": ("kills", "acknowledged_lost", "recovery_s_p50", "accuracy_chaos"),
    "embeddings": (
        "embeddings_vs_pixels",
        "embeddings_vs_pixels_decoding",
        "decode_hidden_share",
        "pixels_hidden_share",
    ),
    "footprint": ("memory_mib_driver", "memory_mib_learner", "memory_mib_rollout"),
    "evaluation": (
        "sets_ready",
        "sets_with_deviation",
        "coverage",
        "coverage_macro",
        "throughput_ratio",
        "resumed_kept",
    ),
    "gpu": (
        "tower_ms_sdpa",
        "head_ms_tiled",
        "packed_vs_copied_grpo",
        "attention_ms_flex",
        "learner_positions_per_s",
        "publish_adapter_s",
        "handed_gb_per_s",
    ),
    "hints": ("solved_grpo", "solved_hint", "start_success"),
    "judge": ("silent_zeros", "crashes", "requests_per_s", "cache_hit_share"),
    "learner": (
        "packed_vs_copied_grpo",
        "packed_vs_copied_avatar_ceiling",
        "head_peak_ratio",
        "vs_trl",
        "vs_trl_image",
        "padding_share",
    ),
    "loading": ("host_share_ratio", "whole_load_ratio"),
    "loop": ("image_fresh", "image_ceiling", "image_trl_core_s", "image_target_seeds_trl"),
    "mistakes": ("tried", "named", "slow", "longest_s", "median_s"),
    "orchestration": (
        "rollout_efficiency",
        "rollout_efficiency_cold",
        "media_workers_ratio",
        "overlap_efficiency",
    ),
    "parity": ("logprob_worst", "logprob_fresh_qwen3_vl_moe", "families"),
    "real_text": ("parity_gap_ppm", "step_speedup", "packed_vs_copied", "packed_loss_gap_ppm"),
    "soak": ("steps", "kills", "replaced_actors", "trained_twice", "memory_mib_driver"),
    "step_files": ("files", "lines", "files_learner"),
    "ablations": ("seeds_plus_VCRS", "solved_plus_VCRS"),
    "study": ("seeds_avatar_plus", "heldout_after_avatar_plus"),
    "length": ("seeds_short_uniform", "judge_long_none", "judge_long_plan"),
    "study_sparse": ("seeds_avatar_plus", "censored_share_avatar_plus"),
    "view": ("rollouts", "paint_s", "list_s", "clip_s"),
    "sweeps": ("seeds_avatar", "accuracy_avatar", "zero_spike_avatar"),
    "walk": ("pages", "blocks", "commands", "lines_found", "not_run"),
    "validate": ("rows_per_s", "peak_mib", "longest_line"),
    "weights": (
        "ratio_400kb_2reader",
        "learner_pause_ms_400kb_2reader",
        "finite_check_ratio",
        "adapter_bytes_share",
        "adapter_pause_ratio",
        "twin_vs_board_400kb_2reader",
    ),
}
MARKS = {"view": needs_chromium}
#: What must be so on any machine, however loaded.
EXACT = {
    "bad_input": {"unnamed": 0, "tracebacks": 0, "silent": 0, "lost": 0},
    "chaos": {
        "acknowledged_lost": 0,
        "trained_twice": 0,
        "ledger_gap": 0,
        "kills": 1,
        "unplanned_exits": 0,
    },
    "evaluation": {"resumed_lost": 0, "resumed_twice": 0, "sets_ready": 22},
    "judge": {"silent_zeros": 0, "crashes": 0, "crashes_at_60": 0, "dead_masked_share": 1},
    "parity": {"greedy_other_tied": 0, "greedy_other_qwen3_vl_moe": 0},
    "walk": {"faults": 0, "pages": 7},
    "soak": {"acknowledged_lost": 0, "trained_twice": 0, "ledger_gap": 0, "unplanned_exits": 0},
    "weights": {"twin_kills": 2, "twin_lost": 0, "twin_mixed": 0},
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in FIGURES]
)
def test_a_benchmark_runs_to_its_end_and_leaves_flat_figures(
    name: str, tmp_path: Path, small_cache: Path
) -> None:
    options = [str(small_cache) if word == CACHE else word for word in OPTIONS.get(name, ())]
    done = run(name, "--smoke", "--out", str(tmp_path), *options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    figures = json.loads((tmp_path / f"{name}.json").read_text())
    assert all(type(value) in (int, float) and math.isfinite(value) for value in figures.values())
    assert {"load_before", "load_after", "cores", *FIGURES[name]} <= figures.keys()
    assert EXACT.get(name, {}).items() <= figures.items()
    for figure in FIGURES[name]:
        assert figure in done.stdout


def test_a_block_says_in_a_sentence_that_it_needs_a_gpu() -> None:
    done = run("gpu", "b2", "b5")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name in ("b2: the engine's speed", "b5: engine and learner by turns"):
        assert f"{name}" in done.stderr
    assert done.stderr.count("can only be measured on an NVIDIA GPU") == 2


def test_every_benchmark_is_run_here() -> None:
    programs = {
        path.stem
        for path in FOLDER.glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text() and not path.stem.endswith("_side")
    }
    assert programs == FIGURES.keys()


@pytest.mark.parametrize("name", ["study", "sweeps", "ablations", "study_sparse", "length"])
def test_nothing_is_trained_unless_asked(name: str) -> None:
    records = FOLDER / "records" / f"{name}.jsonl"
    if records.exists():
        pytest.skip(f"{records} is there to be reported")
    for flag in ([], ["--report"]):
        done = run(name, *flag)
        assert done.returncode == 1 and "no records of these runs" in done.stderr
        assert "--run measures" in done.stderr


def test_a_record_is_reported_whatever_its_settings_were(tmp_path: Path) -> None:
    records = Records(tmp_path / "runs.jsonl")
    for digest, value in (("old", 1), ("new", 2), ("old", 3)):
        records.add({"arm": "grpo@2e-4", "seed": 0, "digest": digest, "value": value})
    [found] = Records(tmp_path / "runs.jsonl").newest(list(ARMS), [0, 1])
    assert found == records.newest(list(ARMS), [0])[0]
    assert found["value"] == 3


def private(tree: ast.AST) -> Iterator[str]:
    """Uses of another object's private names: attributes, imports from the product, and private
    methods of its classes that are written over."""
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("avatar_rl")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("avatar_rl"):
            yield from (alias.name for alias in node.names if _is_private(alias.name))
        elif isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if bases & ours:
                methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
                yield from (f"{node.name}.{m.name}" for m in methods if _is_private(m.name))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


@pytest.mark.parametrize(
    "path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER))
)
def test_a_benchmark_uses_no_private_name(path: Path) -> None:
    assert list(private(ast.parse(path.read_text()))) == []


def test_private_names_are_found() -> None:
    text = """
from avatar_rl.learner.rank import LearnerRank, _hidden
class Bench(LearnerRank):
    def _load(self): return self._own + self.buffer._connection.client
"""
    assert sorted(private(ast.parse(text))) == ["Bench._load", "_hidden", "self.buffer._connection"]
