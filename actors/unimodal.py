"""What is left of a prompt for its eyes and for its ears alone: rollouts that only the fusion
reward looks at.

They have no gradient, and the i-th is compared with the i-th completion of the whole prompt
(docs/method.md 2.2)."""

from __future__ import annotations

from avatar_rl.prompts.record import MediaPlan, Modality, Prompt

#: By part, what it keeps. The whole prompt is the part "".
KEPT: dict[str, frozenset[Modality]] = {
    "video": frozenset({"video", "image"}),
    "audio": frozenset({"audio"}),
}
WHOLE = ""
MOST_PARTS = 1 + len(KEPT)  # of one prompt


def parts_of(prompt: Prompt, *, unimodal: bool) -> dict[str, Prompt]:
    """The prompt itself and, with ``unimodal``, what is seen of it and what is heard; itself alone
    without both."""
    parts = {WHOLE: prompt}
    if not unimodal:
        return parts
    for part, kinds in KEPT.items():
        items = tuple(item for item in prompt.media.items if item.kind in kinds)
        if not items:
            return {WHOLE: prompt}
        parts[part] = prompt.model_copy(update={"media": MediaPlan(items=items)})
    return parts
