"""Completions as readable rows for the run folder."""

from __future__ import annotations

from typing import Any

from avatar_rl.buffer_service.records.trajectory import Trajectory
from avatar_rl.prompts.record import Prompt


def sample_row(trajectory: Trajectory, prompt: Prompt, tokenizer: Any) -> dict[str, Any]:
    """One completion with its prompt, its text and every reward component; JSON-ready."""
    return {
        **prompt.label(),
        "text": tokenizer.decode(trajectory.token_ids.tolist()),
        "reward": trajectory.reward,
        "accuracy": trajectory.components.get("accuracy"),
        "components": trajectory.components,
        "hinted": trajectory.hinted,
        "version": trajectory.version,
        "finish_reason": trajectory.finish_reason,
        "tokens": len(trajectory.token_ids),
    }
