"""Files of ``samples/``: completions to be read, as JSON lines and as Markdown, within a bound of
bytes (docs/output.md, "Saved samples")."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from avatar_rl.cluster.telemetry.run_files import Sample
from avatar_rl.common.files import json_line
from avatar_rl.common.types import ReadOnlyJson

log = logging.getLogger(__name__)

#: Lists with an entry per token: left out of a file that would take too large a part of the bound.
PER_TOKEN = ("token_ids", "token_ends", "logprobs", "log_ratio", "entropy", "weight")
#: No file may take more than this part of the bound.
LARGEST_PART = 4


def sample_lines(rows: Sequence[Mapping[str, object]], bound: int) -> bytes:
    """``rows`` as JSON lines. Where they are more than a part of ``bound`` bytes, the last rows
    lose what is said of their tokens; they have ``tokens_left_out`` then."""
    lines = [_line(row) for row in rows]
    most, size = bound // LARGEST_PART, sum(len(line) for line in lines)
    for number in reversed(range(len(rows))):
        if size <= most:
            break
        row = {name: value for name, value in rows[number].items() if name not in PER_TOKEN}
        short = _line({**row, "tokens_left_out": True})
        size += len(short) - len(lines[number])
        lines[number] = short
    return b"".join(lines)


def rotate(folder: Path, bound: int) -> list[Path]:
    """Remove files of ``folder`` until it holds no more than ``bound`` bytes; the steps that were
    removed, as their JSONL paths.

    Oldest training groups go first, then oldest evaluations. The first and the last of each stay:
    where the run came from, and where it is."""
    sizes = {file: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    total = sum(sizes.values())
    removed: list[Path] = []
    for stem in ("step", "eval"):
        of_stem = sorted(file for file in sizes if file.match(f"{stem}_*.jsonl"))
        for file in of_stem[1:-1]:
            if total <= bound:
                return removed
            for one in (file, file.with_suffix(".md")):
                one.unlink(missing_ok=True)
                total -= sizes.get(one, 0)
            removed.append(file)
    return removed


def _line(row: Mapping[str, object]) -> bytes:
    return json_line(cast("Mapping[str, ReadOnlyJson]", row))


def samples_markdown(step: int, rows: Sequence[Mapping[str, object]], kind: str) -> str:
    """Samples as Markdown: one section per prompt, each completion quoted above a line of its
    rewards."""
    out = [f"# {'Evaluation' if kind == 'eval' else 'Rollouts'} at step {step}"]
    previous = None
    for row in cast(Sequence[Sample], rows):
        if row.get("prompt_id") != previous:
            previous = row.get("prompt_id")
            needs = "+".join(row.get("needs", ()))
            facts = filter(None, [row.get("category"), f"needs {needs}" if needs else ""])
            out.append(
                f"## {previous}\n\n{row.get('question', '')}\n\nGround truth: "
                f"**{row.get('answer', '')}** " + " · ".join(facts)
            )
        quoted = "\n".join("    " + line for line in str(row.get("text", "")).splitlines() or [""])
        scores = {"reward": row.get("reward"), "accuracy": row.get("accuracy")}
        scores = {name: value for name, value in scores.items() if value is not None}
        scores |= {f"- {name}": value for name, value in (row.get("components") or {}).items()}
        line = "  ".join(
            f"{name} {'masked' if value is None else f'{value:.3g}'}"
            for name, value in scores.items()
        )
        known = dict(row.items())
        shown = ("version", "tokens", "finish_reason", "hinted")
        extra = [f"{name} {known[name]}" for name in shown if name in known]
        out.append(f"{quoted}\n\n{line}  \n*{', '.join(extra)}*")
    return "\n\n".join(out) + "\n"
