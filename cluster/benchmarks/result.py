"""What came of a public set: its figures, their interval, and what could not be asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from avatar_rl.cluster.benchmarks.answers import AnswerStore
from avatar_rl.cluster.benchmarks.intervals import Interval
from avatar_rl.cluster.benchmarks.marks import mark
from avatar_rl.cluster.benchmarks.metrics import interval_of
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Marked, Question
from avatar_rl.common.errors import DataError
from avatar_rl.common.text import shortened
from avatar_rl.common.types import JsonObject


@dataclass(frozen=True)
class SetToAsk:
    """A set, its questions, and where its answers are kept."""

    benchmark: BenchmarkSet
    questions: Sequence[Question]
    left_out: int  # questions whose media are missing
    store: AnswerStore

    def open(self) -> list[Question]:
        """The questions without an answer yet."""
        return [q for q in self.questions if q.id not in self.store.texts]


@dataclass(frozen=True)
class Asking:
    """How the asking of all sets went."""

    refused: Mapping[str, str]  # prompt id -> why it could not be asked
    seconds: float  # from the first question to the last answer; engines were up


@dataclass(frozen=True)
class SetResult:
    """A set's figures; accuracies in [0, 1]."""

    name: str
    figures: dict[str, float]  # "accuracy" first
    intervals: dict[str, Interval]  # 95 %, of "accuracy" and its parts
    answered: int
    not_asked: int  # refused (``reasons``), or without media
    reasons: dict[str, int]  # why questions were refused, and how many for each reason
    mean_tokens: float
    seconds: float  # that asking took, of all sets of this call together; 0 where nothing was open
    by_length: dict[str, float]  # accuracy by thirds of the completions' length

    def row(self) -> JsonObject:
        return {
            "name": self.name,
            "figures": dict(self.figures),
            "intervals": {name: [one.low, one.high] for name, one in self.intervals.items()},
            "answered": self.answered,
            "not_asked": self.not_asked,
            "reasons": dict(self.reasons),
            "mean_tokens": self.mean_tokens,
            "seconds": self.seconds,
            "by_length": dict(self.by_length),
        }


def finish(one: SetToAsk, asking: Asking) -> SetResult:
    """Mark every answer of a set and write its result. Raises DataError where there is none."""
    marked = one.store.marked(one.questions, one.benchmark.marked_by or mark)
    prefix = f"{one.benchmark.name}/"
    reasons = alike([why for name, why in asking.refused.items() if name.startswith(prefix)])
    if not marked:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        raise DataError(
            f"{one.benchmark.name}: no question could be asked ({why or 'none arrived'}): set "
            "data.reader.frames and data.template.max_pixels so that its media fit, or correct the "
            "files"
        )
    means = one.benchmark.means(marked)
    result = SetResult(
        name=one.benchmark.name,
        figures=one.benchmark.metric(marked),
        intervals={name: interval_of(mean) for name, mean in means.items()},
        answered=len(marked),
        not_asked=len(one.questions) - len(marked) + one.left_out,
        reasons=reasons,
        seconds=asking.seconds,
        mean_tokens=sum(m.tokens for m in marked) / len(marked),
        by_length=by_length(marked),
    )
    one.store.finish(marked, result.row())
    one.store.close()
    return result


def alike(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason was given; alike but for names and numbers is one, shown by its first
    example."""
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for reason in reasons:
        pattern = re.sub(r"'[^']*'|\d+", "N", reason)
        example = examples.setdefault(pattern, shortened(reason, 240))
        counts[example] = counts.get(example, 0) + 1
    return counts


def by_length(marked: Sequence[Marked]) -> dict[str, float]:
    """Accuracy by thirds of the completions' length: "12-80 tokens" -> accuracy. For the gain by
    length (AVATAR, arXiv 2508.03100, Figure 6)."""
    ordered = sorted(marked, key=lambda one: one.tokens)
    thirds = [ordered[len(ordered) * i // 3 : len(ordered) * (i + 1) // 3] for i in range(3)]
    return {
        f"{third[0].tokens}-{third[-1].tokens} tokens": sum(one.score for one in third) / len(third)
        for third in thirds
        if third
    }
