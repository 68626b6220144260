"""Which prompts of a dataset a run or a curriculum stage asks, by question type, problem type and
modality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from avatar_rl.common.config import Section
from avatar_rl.common.errors import DataError
from avatar_rl.prompts.record import Modality, ProblemType, Prompt


class SelectionConfig(Section):
    """A prompt is taken when it passes every list that is not empty."""

    categories: tuple[str, ...] = Field(
        (), description="Question types (`category` of the rows); empty takes all."
    )
    problem_types: tuple[ProblemType, ...] = Field(
        (), description="Problem types; empty takes all."
    )
    needs: tuple[tuple[Modality, ...], ...] = Field(
        (),
        description="Sets of modalities a prompt needs, e.g. [[audio], [video, audio]]; empty "
        "takes all.",
    )

    def takes(self, prompt: Prompt) -> bool:
        return (
            (not self.categories or prompt.category in self.categories)
            and (not self.problem_types or prompt.problem_type in self.problem_types)
            and (not self.needs or set(prompt.needs) in [set(need) for need in self.needs])
        )

    @property
    def restricts(self) -> bool:
        return bool(self.categories or self.problem_types or self.needs)

    def __str__(self) -> str:
        needs = ("+".join(need) or "none" for need in self.needs)
        return (
            ", ".join((*self.categories, *(kind.value for kind in self.problem_types), *needs))
            or "all types"
        )


def matching(prompts: Iterable[Prompt], selection: SelectionConfig) -> list[str]:
    """Ids of the prompts a selection takes, in order; none for a selection that takes
    everything."""
    return (
        [prompt.id for prompt in prompts if selection.takes(prompt)] if selection.restricts else []
    )


def select(prompts: Iterable[Prompt], selection: SelectionConfig) -> list[str]:
    """Ids of the prompts a selection takes, in order.

    Raises DataError naming a type that no prompt has, and what there is instead.
    """
    known = list(prompts)
    for what, wanted, there in (
        ("question type", selection.categories, Counter(prompt.category for prompt in known)),
        (
            "problem type",
            [t.value for t in selection.problem_types],
            Counter(p.problem_type.value for p in known),
        ),
        (
            "need",
            ["+".join(sorted(n)) for n in selection.needs],
            Counter("+".join(sorted(p.needs)) for p in known),
        ),
    ):
        missing = [repr(name) for name in wanted if name not in there]
        if missing:
            have = ", ".join(
                f"{name or 'unnamed'} ({count})" for name, count in sorted(there.items())
            )
            raise DataError(
                f"no training prompt has the {what} {', '.join(missing)}; there are {have}: "
                "correct the selection or "
                "add such prompts"
            )
    chosen = [prompt.id for prompt in known if selection.takes(prompt)]
    if not chosen:
        raise DataError(f"no training prompt passes all of the selection ({selection}): widen it")
    return chosen
