"""What a completion is paid where a component has no mark for it (docs/method.md 1.5).

A judge that failed is no zero, and it must not pay. A masked mark stands at the mean of its group
for that component, else at the component's mean over the run's scored completions. It never stands
at the level of the other components: a completion that makes the judge fail would gain by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

Marks = Mapping[str, float | None]  # one completion's components; None where masked


class Payment(NamedTuple):
    """The reward of one completion."""

    reward: float | None  # None: no mark at all, or one is masked and no mean of it is known yet
    imputed: bool  # rests on a mean in place of a mark: it counts for no statistic of its prompt


class MaskedMarks:
    """Means of the components over the scored completions of this run, as this process saw them."""

    def __init__(self, weights: Mapping[str, float], judged: Collection[str]) -> None:
        """``weights`` of the components; ``judged`` are those whose mark a judge can owe."""
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self._judged = judged
        self._sums = dict.fromkeys(self.weights, 0.0)
        self._counts = dict.fromkeys(self.weights, 0)

    def pay(self, group: Sequence[Marks]) -> list[Payment]:
        """Rewards of a group's completions, in order.

        A component without a mark in the whole group that no judge owes does not apply to the
        prompt (fusion on a prompt with one modality). The others are scaled up to the full weight,
        which raises no completion above another one.
        """
        self._note(group)
        return self._payments(group)

    def _payments(self, group: Sequence[Marks]) -> list[Payment]:
        applies = [
            name
            for name in self.weights
            if name in self._judged or any(marks[name] is not None for marks in group)
        ]
        if not applies:
            return [Payment(None, False)] * len(group)
        scale = sum(self.weights.values()) / sum(self.weights[name] for name in applies)
        stand_ins = {name: self._mean(name, group) for name in applies}
        return [self._paid(marks, stand_ins, scale) for marks in group]

    def _note(self, group: Sequence[Marks]) -> None:
        """Take the marks of a group into the run's means."""
        for name in self.weights:
            known = [value for marks in group if (value := marks[name]) is not None]
            self._sums[name] += sum(known)
            self._counts[name] += len(known)

    def _mean(self, name: str, group: Sequence[Marks]) -> float | None:
        """Of the group's marks, else of the run's."""
        known = [value for marks in group if (value := marks[name]) is not None]
        if known:
            return sum(known) / len(known)
        return self._sums[name] / self._counts[name] if self._counts[name] else None

    def _paid(self, marks: Marks, stand_ins: Mapping[str, float | None], scale: float) -> Payment:
        if all(marks[name] is None for name in stand_ins):
            return Payment(None, False)  # nothing is known of it
        total, imputed = 0.0, False
        for name, mean in stand_ins.items():
            value = marks[name]
            if value is None:
                value, imputed = mean, True
            if value is None:
                return Payment(None, True)
            total += self.weights[name] * value
        return Payment(total * scale, imputed)


def pay_stored(
    groups: Sequence[Sequence[Marks]], weights: Mapping[str, float], judged: Collection[str]
) -> list[list[Payment]]:
    """Payments of stored ``groups`` under other ``weights``, as ``MaskedMarks.pay`` would pay them.

    The means are those of all ``groups`` together. A judge that marked none of them does not apply:
    these completions were never shown to it, and the other components are scaled up for all alike.
    """
    seen = {
        name
        for name in judged
        if name in weights and any(marks[name] is not None for group in groups for marks in group)
    }
    marks = MaskedMarks(weights, seen)
    for group in groups:
        marks._note(group)
    return [marks._payments(group) for group in groups]
