"""Held-out accuracy from the answers of an evaluation round, by question type and by the modality
it needs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """One finished round. Accuracies are means over prompts, in [0, 1]."""

    round: int
    version: int  # oldest policy version among the answers
    accuracy: float
    prompts: int
    tokens: int
    by_category: dict[str, float] = field(default_factory=dict)
    by_need: dict[str, float] = field(default_factory=dict)
    selected: float | None = (
        None  # accuracy on the prompts of the types that are trained; None without any
    )
    samples: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Flat names for the telemetry; prefix "pool" is the training prompts'."""
        return {
            f"{prefix}/accuracy": self.accuracy,
            **({} if self.selected is None else {f"{prefix}/selected": self.selected}),
            **{f"{prefix}/accuracy/{name}": value for name, value in self.by_category.items()},
            **{
                f"{prefix}/needs/{name}": value
                for name, value in self.by_need.items()
                if prefix == "eval"
            },
        }


def summarise(
    round: int, payloads: Sequence[bytes], *, selected: Collection[str] = (), samples: int = 24
) -> Evaluation:
    """Average the payloads written by the rollout actors; prompts whose accuracy is masked are left
    out.

    ``selected`` are the ids of the held-out prompts of the types that are trained.
    """
    answers = sorted(
        (json.loads(payload) for payload in payloads), key=lambda answer: answer["prompt_id"]
    )
    by_category: dict[str, list[float]] = defaultdict(list)
    by_need: dict[str, list[float]] = defaultdict(list)
    accuracies = []
    trained = []
    for answer in answers:
        if answer["accuracy"] is None:
            continue
        accuracies.append(answer["accuracy"])
        if answer["prompt_id"] in selected:
            trained.append(answer["accuracy"])
        by_category[answer["category"] or "all"].append(answer["accuracy"])
        by_need["+".join(sorted(answer["needs"])) or "none"].append(answer["accuracy"])
    return Evaluation(
        round=round,
        version=min((answer["version"] for answer in answers), default=0),
        accuracy=fmean(accuracies) if accuracies else 0.0,
        prompts=len(accuracies),
        tokens=sum(answer["tokens"] for answer in answers),
        by_category={name: fmean(values) for name, values in sorted(by_category.items())},
        by_need={name: fmean(values) for name, values in sorted(by_need.items())},
        selected=fmean(trained) if trained else None,
        samples=answers[:: max(1, len(answers) // samples)][:samples],
    )
