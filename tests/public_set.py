"""A public set made of the synthetic world: its clips and questions in Daily-Omni's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.prompts.synthetic.world import synthesize


def write_daily_omni(out: Path, questions: int, *, seed: int = 0) -> int:
    """Writes qa.json and Videos/ into ``out``; returns how many questions there are: those of the
    world's that have options."""
    config = WorldConfig(n_train=0, n_heldout=questions, n_sft=0, seed=seed)
    world = synthesize(out.parent / f"{out.name}-world", config).out
    rows = []
    for row in read_jsonl(world / "heldout.jsonl"):
        if not row.get("options"):
            continue
        name = row["id"].replace("/", "-")
        folder = out / "Videos" / name
        folder.mkdir(parents=True)
        [clip] = [item["uri"] for item in row["media"]["items"] if item["kind"] == "video"]
        shutil.copy(world / clip, folder / f"{name}_video.mp4")
        rows.append(
            {
                "Question": row["question"],
                "Choice": row["options"],
                "Answer": row["answer"],
                "video_id": name,
                "Type": row["category"],
                "video_category": "synthetic",
                "video_duration": "30s",
            }
        )
    (out / "qa.json").write_text(json.dumps(rows))
    return len(rows)
