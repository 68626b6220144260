"""Whether a run can learn at all: said on the screen, in the events and, where it cannot, as its
end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from avatar_rl.buffer_service.stats import Stats
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.errors import NothingLearntError
from avatar_rl.common.text import shortened

EMPTY_STEPS = 3  # without any group, before the run ends
FEWEST_SET_ASIDE = 32  # prompts, before their share counts
MASKED_STEPS = 8  # from the run's start on, before it ends
WARN_STEPS = 8  # a condition holds for so many steps before it is said
ALIKE_STEPS = 16
TRUNCATED = 0.9
_NAMES = re.compile(r"'[^']{1,200}'|\"[^\"]{1,200}\"")
_PLACES = re.compile(r"(?<![\w.])/[^\s:;,]+")
_COUNTS = re.compile(r"\d+")

Report = Callable[[str, str], None]  # kind, message


class LearningWatch:
    """Looks at every step's metrics.

    Ends a run whose steps have no group, that had to set aside too many prompts, or whose reward is
    masked throughout. Warns, with a remedy, of what lets a run learn little.
    """

    def __init__(self, config: RunConfig, buffer: ReplayBuffer, report: Report) -> None:
        self.config, self.buffer, self.report = config, buffer, report
        self._empty = 0
        self._masked_from_start = {
            name for name, weight in config.rewards.weights.items() if weight > 0
        }
        self._masked: set[str] = set()  # of these, those that had completions to mark
        self._stats: Stats | None = None  # of the last step without a group
        self._steps = 0
        self._told_set_aside = 0
        self._held: dict[str, int] = Counter()  # condition -> steps it has held
        self._messages: dict[str, str] = {}
        self._told: set[str] = set()

    def look(self, metrics: Mapping[str, float], stats: Stats) -> None:
        """After a step. Raises NothingLearntError with what is wrong and what to do."""
        self._steps += 1
        self._look_at_quarantine(stats)
        self._look_for_groups(metrics, stats)
        self._look_at_marks(metrics)
        self._warn(metrics)

    def end(self) -> None:
        """After the last step of a run that began here: what held throughout is said even where the
        run was too short for the counts above. Raises NothingLearntError as ``look`` does."""
        if self._steps and self._empty == self._steps:
            raise NothingLearntError(self._nothing_to_train_on())
        if self._masked:
            raise NothingLearntError(self._no_marks())
        for name, message in self._messages.items():
            if self._held[name] == self._steps > 1:
                self._tell(name, message)

    # -- what ends a run ---------------------------------------------------------------------------

    def _look_at_quarantine(self, stats: Stats) -> None:
        aside = stats.quarantined_prompts
        if aside < max(1, 2 * self._told_set_aside) and aside < FEWEST_SET_ASIDE:
            return
        seen = stats.prompts + aside  # leased so far: a prompt has statistics or was set aside
        limit = self.config.supervision.quarantine_limit
        sentence = f"{aside} of {seen} prompts set aside: {self._reasons()}"
        if aside >= FEWEST_SET_ASIDE and aside > limit * seen:
            raise NothingLearntError(
                f"{sentence}. That is more than supervision.quarantine_limit {limit:g}: correct "
                "the data or the lengths (avatar data validate DATASET --recipe RECIPE), or raise "
                "the limit"
            )
        if aside >= max(1, 2 * self._told_set_aside):
            self._told_set_aside = aside
            self.report("prompts set aside", sentence)

    def _look_for_groups(self, metrics: Mapping[str, float], stats: Stats) -> None:
        if metrics.get("groups/fresh", 0.0) > 0 or metrics.get("replay/share", 0.0) > 0:
            self._empty = 0
            return
        self._empty += 1
        self._stats = stats
        if self._empty >= EMPTY_STEPS:
            raise NothingLearntError(self._nothing_to_train_on())

    def _nothing_to_train_on(self) -> str:
        assert self._stats is not None
        dropped = {name: count for name, count in self._stats.ledger.dropped.items() if count}
        why = self._reasons() if self._stats.quarantined_prompts else ""
        what = ", ".join(f"{count} groups dropped as {name}" for name, count in dropped.items())
        return f"the last {self._empty} steps had no group to train on: " + "; ".join(
            filter(None, [why, what, self._remedy(dropped)])
        )

    def _look_at_marks(self, metrics: Mapping[str, float]) -> None:
        self._masked_from_start -= {
            name for name in self._masked_from_start if metrics.get(f"masked/{name}", 1.0) < 1.0
        }
        self._masked |= {name for name in self._masked_from_start if f"masked/{name}" in metrics}
        self._masked &= self._masked_from_start
        if self._masked and self._steps >= MASKED_STEPS:
            raise NothingLearntError(self._no_marks())

    def _no_marks(self) -> str:
        masked = ", ".join(sorted(self._masked))
        return (
            f"reward {masked} had no mark in any completion of {self._steps} steps: look at the "
            "judge's endpoint and log (avatar doctor RECIPE), or take the "
            "reward out of rewards.weights"
        )

    def _remedy(self, dropped: Mapping[str, int]) -> str:
        if "unscored" in dropped:
            return "no completion could be scored: look at the judge (avatar doctor RECIPE)"
        return "look at the run's events and at the logs of its rollout actors"

    def _reasons(self) -> str:
        """The most frequent reasons of quarantines; alike but for names and numbers is one."""
        reasons = self.buffer.requests.quarantined().values()
        examples = {_COUNTS.sub("N", plain): plain for plain in map(_pattern, reasons)}
        alike = Counter(_COUNTS.sub("N", _pattern(why)) for why in reasons)
        said = []
        for pattern, count in alike.most_common(2):
            text = shortened(examples[pattern], 240)
            said.append(text if count == len(reasons) else f"{count} times {text}")
        return "; ".join(said)

    # -- what is worth a warning -------------------------------------------------------------------

    def _warn(self, metrics: Mapping[str, float]) -> None:
        config = self.config
        lowest = -1.0 if config.rewards.format == "signed" else 0.0
        max_tokens = config.rollout.sampling.max_tokens
        self._hold(
            "truncated",
            metrics.get("completions/truncated_share", 0.0) > TRUNCATED,
            WARN_STEPS,
            f"over {TRUNCATED:.0%} of the completions are cut off at {max_tokens} tokens: raise "
            "rollout.sampling.max_tokens, or name stop strings in rollout.sampling.stop (a base "
            "model ends no turn by itself)",
        )
        self._hold(
            "format",
            metrics.get("reward/format", 1.0) <= lowest + 1e-9,
            WARN_STEPS,
            "no completion has the format that the reward wants: tell the model of the tags in "
            "data.template.instruction, or give it a cold start",
        )
        self._hold(
            "alike",
            metrics.get("reward/std", 1.0) < 1e-9,
            ALIKE_STEPS,
            "all completions are paid alike, so fresh groups teach nothing: the task is too easy "
            "or too hard for the model, or a reward always says the same",
        )
        self._hold(
            "breaker",
            metrics.get("judge/breaker_open", 0.0) > 0,
            1,
            "the judge failed so often that it is not asked for now (its circuit breaker is open): "
            "look at its endpoint and log; rewards.judge.breaker_cooldown_s is the time until it "
            "is tried again",
        )
        for name in self.config.rewards.weights:
            self._hold(
                f"masked {name}",
                metrics.get(f"masked/{name}", 0.0) > 0.5,
                WARN_STEPS,
                f"reward {name} has no mark for over half of the completions; they stand at its "
                "mean: look at the judge's endpoint and log",
            )

    def _hold(self, name: str, holds: bool, steps: int, message: str) -> None:
        """Say ``message`` once a condition has held for ``steps`` steps."""
        if not holds:
            self._held[name] = 0
            self._told.discard(name)
            return
        self._held[name] += 1
        self._messages[name] = message
        if self._held[name] >= steps:
            self._tell(name, message)

    def _tell(self, name: str, message: str) -> None:
        """Once, until the condition has ended."""
        if name not in self._told:
            self._told.add(name)
            self.report("warning", f"for {self._held[name]} steps {message}")


def _pattern(why: str) -> str:
    """A reason without the prompt and the file it is about."""
    return _PLACES.sub("FILE", _NAMES.sub("...", why))
