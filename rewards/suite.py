"""The weighted set of reward components of one run (docs/method.md 1.5)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from avatar_rl.common.errors import ConfigError
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.accuracy import accuracy_score
from avatar_rl.rewards.answers.format import format_score
from avatar_rl.rewards.answers.grounding import parse_grounded
from avatar_rl.rewards.answers.overlong import overlong_score
from avatar_rl.rewards.config import BUILTIN, JUDGED, JudgeConfig, RewardConfig
from avatar_rl.rewards.custom import CustomReward
from avatar_rl.rewards.group_rewards import self_consistency_scores
from avatar_rl.rewards.judges.answers import AnswerJudge, Fusion
from avatar_rl.rewards.judges.base import Attach
from avatar_rl.rewards.judges.component import JudgeComponent
from avatar_rl.rewards.judges.segments import (
    SegmentCompleteness,
    SegmentConsistency,
    SegmentJudge,
    SegmentReward,
)
from avatar_rl.rewards.masking import MaskedMarks
from avatar_rl.rewards.record import Completion, Mark, Scored, ScoreRequest


class Component(Protocol):
    """One reward: a mark per completion, in order."""

    name: str

    async def score(self, request: ScoreRequest) -> list[Mark]: ...


class RuleReward:
    """A built-in reward that is a plain function of the group."""

    def __init__(
        self, name: str, function: Callable[[ScoreRequest], Sequence[float | None]]
    ) -> None:
        self.name = name
        self._function = function

    async def score(self, request: ScoreRequest) -> list[Mark]:
        return [Mark(value) for value in self._function(request)]


class RewardSuite:
    """Scores groups with every component of the config.

    Raises ConfigError at construction for a user-defined reward that cannot be imported or a judge
    without endpoint. A suite belongs to one event loop; ``score`` brings its own and must not be
    mixed with ``ascore``."""

    def __init__(self, config: RewardConfig, attach: Attach | None = None) -> None:
        """``attach`` gives the judge a prompt's frames and sound as OpenAI content parts (README,
        "Judge")."""
        self.config = config
        self._attach = attach
        self._judge: SegmentJudge | None = None
        self._components: list[Component] = [self._component(name) for name in config.weights]
        self._scored: Counter[str] = Counter()
        self._masked: Counter[str] = Counter()
        self._masked_marks = MaskedMarks(config.weights, JUDGED)
        self._runner = asyncio.Runner()

    def score(self, request: ScoreRequest) -> list[Scored]:
        """``ascore`` for code without an event loop."""
        return self._runner.run(self.ascore(request))

    async def ascore(self, request: ScoreRequest) -> list[Scored]:
        """Every component of every completion, the components concurrently; in the order of the
        completions."""
        columns = await asyncio.gather(
            *(component.score(request) for component in self._components)
        )
        names = [component.name for component in self._components]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        values = [{name: mark.value for name, mark in marks.items()} for marks in rows]
        scored = []
        for marks, components, paid in zip(
            rows, values, self._masked_marks.pay(values), strict=True
        ):
            details = {
                f"{name}/{key}": value
                for name, mark in marks.items()
                for key, value in mark.details.items()
            }
            for name, value in components.items():
                (self._masked if value is None else self._scored)[name] += 1
            scored.append(
                Scored(
                    reward=paid.reward,
                    imputed=paid.imputed,
                    components=components,
                    details=details,
                )
            )
        return scored

    def stats(self) -> dict[str, float]:
        """Running totals: ``<component>/scored`` and ``/masked``, failures by kind, and the judge's
        counters."""
        totals: dict[str, float] = {}
        for component in self._components:
            totals[f"{component.name}/scored"] = self._scored[component.name]
            totals[f"{component.name}/masked"] = self._masked[component.name]
            if isinstance(component, CustomReward):
                totals |= {
                    f"{component.name}/{kind}": count for kind, count in component.failures.items()
                }
            if isinstance(component, JudgeComponent | SegmentReward):
                totals |= {
                    f"{component.name}/{kind}": count for kind, count in component.counts.items()
                }
        if self._judge is not None:
            totals |= {f"judge/{key}": value for key, value in self._judge.stats().items()}
        return totals

    async def check(self) -> None:
        """Fail fast: raises ResourceError or ConfigError if the judge's endpoint cannot serve this
        run."""
        if self._judge is not None:
            await self._judge.check()

    async def aclose(self) -> None:
        """Close the judge's connections."""
        if self._judge is not None:
            await self._judge.close()

    def close(self) -> None:
        """``aclose`` for a suite used through ``score``."""
        self._runner.run(self.aclose())
        self._runner.close()

    def _component(self, name: str) -> Component:
        if name not in BUILTIN:
            return CustomReward(name, self.config.custom_timeout_s)
        if name in JUDGED:
            return self._judged(name)
        if name == "fusion":
            paid = self.config.weights.get("answer_judge", 0) > 0
            return Fusion(
                self.config.fusion, self._accuracy, self._answer_judge() if paid else None
            )
        rules: dict[str, Callable[[ScoreRequest], Sequence[float | None]]] = {
            "format": self._format,
            "accuracy": lambda request: self._accuracy(request.prompt, request.completions),
            "self_consistency": self._self_consistency,
            "grounding_format": self._grounding_format,
            "overlong": self._overlong,
        }
        return RuleReward(name, rules[name])

    def _judged(self, name: str) -> Component:
        """A component that asks the judge; all of them share one."""
        config = self.config.judge
        if name == "answer_judge":
            return self._answer_judge()
        judge = self._the_judge()
        if name == "judge":
            return JudgeComponent(judge, self._attach)
        if config.kind != "rule" and self._attach is None:
            raise ConfigError(
                f"reward {name} shows the judge clips: set rewards.judge.attach: [video] (or more)"
            )
        kind = SegmentConsistency if name == "segment_consistency" else SegmentCompleteness
        along = self.config.grounding == "lenient"
        return kind(judge, self._attach, along=along)

    def _the_judge(self) -> SegmentJudge:
        if self._judge is None:
            self._judge = build_judge(self.config.judge)
        return self._judge

    def _answer_judge(self) -> AnswerJudge:
        config = self.config
        return AnswerJudge(self._the_judge(), config.answer_judge, config.max_answer_chars)

    def _format(self, request: ScoreRequest) -> list[float]:
        scale, prefilled = self.config.format, self._prefilled(request, "<think>")
        return [
            format_score(one.text, finished=one.finished, scale=scale, prefilled=prefilled)
            for one in request.completions
        ]

    def _prefilled(self, request: ScoreRequest, tag: str) -> bool | None:
        """Whether the prompts end with the opening ``tag``; None where nobody knows."""
        if self.config.think_prefilled != "auto":
            return self.config.think_prefilled
        return None if request.opened_tag is None else request.opened_tag == tag

    def _accuracy(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        config = self.config
        return [
            accuracy_score(
                prompt,
                one.text,
                numeric=config.numeric,
                max_answer_chars=config.max_answer_chars,
            )
            for one in completions
        ]

    def _self_consistency(self, request: ScoreRequest) -> list[float]:
        limit = self.config.max_answer_chars
        return self_consistency_scores(request.prompt, request.completions, max_answer_chars=limit)

    def _overlong(self, request: ScoreRequest) -> list[float]:
        limit, share = self.config.overlong_tokens, self.config.overlong_share
        if limit is None:
            raise ConfigError(
                "reward overlong needs the longest completion: set rewards.overlong_tokens (a run "
                "takes rollout.sampling.max_tokens)"
            )
        return [overlong_score(one.tokens, limit=limit, share=share) for one in request.completions]

    def _grounding_format(self, request: ScoreRequest) -> list[float]:
        strict = self.config.grounding == "strict"
        prefilled = self._prefilled(request, "<thinking>")
        parsed = [
            parse_grounded(one.text, prefilled, along=not strict) for one in request.completions
        ]
        return [
            float(one.finished and (output.strict if strict else output.lenient))
            for one, output in zip(request.completions, parsed, strict=True)
        ]


def build_judge(config: JudgeConfig) -> SegmentJudge:
    """The judge a config asks for. Raises ConfigError for an endpoint that is not fully
    specified."""
    if config.kind == "rule":
        from avatar_rl.rewards.judges.rule_judge import RuleJudge

        return RuleJudge()
    if config.kind == "managed":
        raise ConfigError(
            "rewards.judge.kind managed needs a run that starts the judge; outside one use kind: "
            "openai"
        )
    # the openai package takes 0.7 s to import: only where it is used
    from avatar_rl.rewards.judges.openai_judge import OpenAIJudge

    return OpenAIJudge(config)
