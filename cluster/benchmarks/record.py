"""A benchmark, its questions, and what became of one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Literal, Protocol

from avatar_rl.prompts.record import MediaItem, Modality

if TYPE_CHECKING:
    from avatar_rl.cluster.benchmarks.folder import SetFolder

#: How an answer is marked (marks.py).
Kind = Literal["choice", "choices", "yes_no", "count", "relative", "number", "text"]


@dataclass(frozen=True)
class Question:
    """One question of a set."""

    id: str  # unique in its set, and the same each time that it is read
    text: str
    answer: str  # a letter, letters ("A,C"), a number or words, as ``kind`` says
    kind: Kind
    options: tuple[str, ...] = ()  # "A. red", "B. green"
    media: tuple[MediaItem, ...] = ()
    in_text: bool = False  # <video>, <audio> and <image> in ``text`` are the places of the media
    official: str = ""  # the whole question as the set's authors ask it
    #: What the accuracy is broken down by: {"task": "Hallucination"}. A list counts in each.
    parts: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    decimals: int | None = None  # kind "number": compared after rounding to these, if any
    about: str = ""  # what it is about; empty: its first medium

    @property
    def cluster(self) -> str:
        """Questions of one name are about the same file: they are not independent of each other."""
        return self.about or (self.media[0].uri if self.media else self.id)


@dataclass(frozen=True)
class Marked:
    """A question and the answer that was given to it."""

    question: Question
    given: str | None  # what was taken for the answer; None: there was none
    score: float  # in [0, 1]
    tokens: int = 0  # of the completion


#: What a figure is the mean of: groups of answers and the weight of each. The weights add up to 1;
#: the mean of each group counts by its weight.
Weighed = Sequence[tuple[float, Sequence[Marked]]]
#: "accuracy" first, then its parts, each in [0, 1].
Means = Callable[[Sequence[Marked]], dict[str, Weighed]]
#: Figures that are no means of scores: errors, or a scale of the authors'.
Others = Callable[[Sequence[Marked]], dict[str, float]]


class MarkedBy(Protocol):
    def __call__(self, question: Question, completion: str, *, tokens: int = 0) -> Marked: ...


@dataclass(frozen=True)
class BenchmarkSet:
    """How one public benchmark is read, asked and scored."""

    name: str
    title: str
    paper: str  # its address
    layout: str  # address of what the layout was read from
    senses: tuple[Modality, ...]  # without which it is not this benchmark
    read: Callable[[SetFolder], Iterator[Question]]
    means: Means  # the headline and its parts; figure, interval and test are made of them
    others: Others | None = None
    #: What differs from the authors' scoring; empty where nothing does.
    deviation: str = ""
    #: Marks a completion where the set brings a rule of its own; marks.py has the others.
    marked_by: MarkedBy | None = None
    listens: bool = False  # the sound of its videos belongs to it, where they have any

    def metric(self, marked: Sequence[Marked]) -> dict[str, float]:
        """All figures: "accuracy" first, then its parts and what else the authors report."""
        found = {name: value_of(weighed) for name, weighed in self.means(marked).items()}
        others = self.others(marked) if self.others is not None else {}
        return found | others


def value_of(weighed: Weighed) -> float:
    """The figure; 0 where there is nothing to count."""
    return sum((weight * fmean(one.score for one in group) for weight, group in weighed), 0.0)
