"""The run that docs/notebooks/read_a_run.ipynb reads: ``python -m tests.recorded_run runs/<id>``
writes docs/notebooks/recorded/ from a finished run of the demo. Paths, hosts and most metrics are
left out, so that it is small and says nothing of a machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.view_runs import write_lines

PLACE = Path(__file__).parents[1] / "docs" / "notebooks" / "recorded"
METRICS = (
    "step",
    "eval/",
    "reward/",
    "accuracy/",
    "groups/dead_",
    "kl/behaviour_capped/",
    "age/replay/",
    "entropy/",
    "ess/",
    "grad_norm",
    "completion/length_mean",
    "completions/generated",
    "tiers/",
    "staleness/mean",
    "time/step",
    "time/learner_wait",
    "rollout/tokens_per_s",
)
#: Saved steps that are kept, by their place among all: the first, one between, the last.
KEPT = (0.0, 0.5, 1.0)


def main(run: Path) -> None:
    (PLACE / "samples").mkdir(parents=True, exist_ok=True)
    status = json.loads((run / "status.json").read_text())
    status |= {"run_id": "recorded", "host": "elsewhere", "pid": 1}
    (PLACE / "status.json").write_text(json.dumps(status) + "\n")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(
        PLACE / "metrics.jsonl",
        [{name: value for name, value in row.items() if name.startswith(METRICS)} for row in rows],
    )
    steps = sorted((run / "samples").glob("step_*.jsonl"))
    evals = sorted((run / "samples").glob("eval_*.jsonl"))
    chosen = {steps[round(part * (len(steps) - 1))] for part in KEPT} | {evals[0], evals[-1]}
    for old in (PLACE / "samples").glob("*.jsonl"):
        old.unlink()
    for file in sorted(chosen):
        kept = [json.loads(line) | {"media": []} for line in file.read_text().splitlines()]
        write_lines(PLACE / "samples" / file.name, kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
