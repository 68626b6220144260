"""The catalogue of metrics: every flat name a run reports, its unit and one sentence of meaning.

Names are flat paths ("replay/share"). A name that ends in "<...>" is a family: "reward/<component>"
stands for "reward/format", "reward/accuracy" and so on. Names outside the catalogue (user-defined
rewards, experiments) are allowed everywhere; reports list them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Metric:
    """One catalogue entry; ``unit`` is "" for plain numbers such as losses and ratios."""

    name: str
    unit: str
    meaning: str

    @property
    def is_family(self) -> bool:
        return self.name.endswith(">")

    @property
    def prefix(self) -> str:
        """The family's fixed part, its last slash included."""
        return self.name[: self.name.rindex("<")] if self.is_family else self.name

    def covers(self, name: str) -> bool:
        return (
            (name.startswith(self.prefix) and len(name) > len(self.prefix))
            if self.is_family
            else name == self.name
        )


CATALOGUE: tuple[Metric, ...] = tuple(
    Metric(*entry)
    for entry in (
        # progress
        (
            "step",
            "steps",
            "Optimiser steps finished, counted from 1; 0 is the state before training.",
        ),
        ("version", "versions", "Policy version published after the step; versions only grow."),
        (
            "staleness/mean",
            "versions",
            "Versions between the policy that generated the fresh half and the one it trains.",
        ),
        ("staleness/max", "versions", "Largest such lag in the step."),
        (
            "weights/members",
            "workers",
            "Engine workers that took the version from the learner at once; 0 by the board. Where "
            "weights.transport is not board.",
        ),
        ("weights/groups_formed", "", "Groups of learner and engine workers formed so far."),
        (
            "weights/fallbacks",
            "versions",
            "Versions that took the board though there were members, so far.",
        ),
        # what is learnt
        ("reward/mean", "", "Weighted reward of the step's fresh completions, mean."),
        ("reward/std", "", "Standard deviation of that reward over the step's fresh completions."),
        (
            "reward/<component>",
            "",
            "Mean of one reward component over the fresh completions in which it is not masked.",
        ),
        (
            "reward_std/<component>",
            "",
            "Standard deviation of one reward component over the same completions.",
        ),
        ("accuracy/train", "share", "Mean accuracy reward of the step's fresh completions."),
        ("accuracy/moving", "share", "Moving average of accuracy/train over the last 8 steps."),
        ("eval/accuracy", "share", "Held-out accuracy, mean over prompts."),
        (
            "eval/selected",
            "share",
            "Held-out accuracy on the types that data.select trains; where it selects some.",
        ),
        ("eval/accuracy/<category>", "share", "Held-out accuracy on one question type."),
        (
            "pool/accuracy",
            "share",
            "Accuracy over the training prompts, each sampled equally often.",
        ),
        ("pool/accuracy/<category>", "share", "The same on one question type."),
        ("benchmark/accuracy/<set>", "share", "Official accuracy on one public set."),
        ("benchmark/low/<set>", "share", "Lower end of its 95 % interval, of the mean score."),
        ("benchmark/high/<set>", "share", "Upper end of the same."),
        (
            "eval/needs/<modality>",
            "share",
            "Held-out accuracy on prompts that need exactly these modalities.",
        ),
        ("eval/prompts", "prompts", "Held-out prompts with a mark, all types."),
        ("eval/prompts/<category>", "prompts", "The same of one question type."),
        ("eval/prompts_needing/<modality>", "prompts", "The same by the modalities they need."),
        # the objective
        ("loss/total", "", "Loss that was minimised: policy term plus KL term."),
        (
            "loss/policy",
            "",
            "Clipped surrogate, fresh plus alpha times replayed, negated (docs/method.md 1.1).",
        ),
        ("loss/kl", "", "Beta times the k3 KL to the reference policy."),
        (
            "kl/reference",
            "nats",
            "k3 KL of the current policy to the reference policy, mean over tokens.",
        ),
        (
            "kl/behaviour",
            "nats",
            "k3 KL of the current policy to the policy that generated the tokens.",
        ),
        (
            "kl/behaviour_capped",
            "nats",
            "The same with each token held at 1 nat: a rare spike does not hide it.",
        ),
        (
            "kl/reference/<half>",
            "nats",
            "kl/reference over the tokens of one half, fresh or replay.",
        ),
        ("kl/behaviour/<half>", "nats", "kl/behaviour over the tokens of one half."),
        ("kl/behaviour_capped/<half>", "nats", "kl/behaviour_capped over the tokens of one half."),
        (
            "ratio/fresh/mean",
            "",
            "Current over old probability (docs/method.md 1.1), mean over fresh tokens.",
        ),
        ("ratio/fresh/max", "", "Largest such ratio."),
        ("ratio/replay/mean", "", "Current over old probability, mean over replayed tokens."),
        ("ratio/replay/max", "", "Largest such ratio."),
        ("clip_fraction/fresh", "share", "Fresh tokens whose ratio was clipped."),
        ("clip_fraction/replay", "share", "Replayed tokens whose ratio was clipped."),
        (
            "mismatch/weight/<half>",
            "",
            "Weight old / behaviour, where the trainer's own old log-probabilities are used "
            "(docs/method.md 1.1); mean over tokens.",
        ),
        (
            "mismatch/kl/<half>",
            "nats",
            "k3 KL of the old policy, as the trainer computes it, to the sampler; there too.",
        ),
        (
            "mismatch/rejected/<half>",
            "share",
            "Tokens of completions that learner.objective.rejection left out; there too.",
        ),
        ("ess/fresh", "share", "Effective sample size of the fresh half; 1 means on-policy."),
        ("ess/replay", "share", "Effective sample size of the replayed half; 1 means on-policy."),
        (
            "entropy",
            "nats",
            "Entropy of the policy's next-token distribution, mean over trained tokens.",
        ),
        ("entropy/<half>", "nats", "entropy over the tokens of one half."),
        ("grad_norm", "", "Gradient norm before clipping."),
        ("lr", "", "Learning rate of the step."),
        ("learner/updates", "updates", "Optimiser updates of the step."),
        (
            "learner/skipped",
            "",
            "Micro-batches and updates left out so far because loss or gradient was not finite.",
        ),
        # groups, replay, tiers
        ("groups/fresh", "groups", "Groups of the step with fresh completions."),
        (
            "groups/dead_before",
            "share",
            "Groups whose fresh rewards are all alike: no signal of their own.",
        ),
        (
            "groups/dead_after",
            "share",
            "Groups that stay without signal after the replayed half is mixed in.",
        ),
        (
            "groups/replaced",
            "groups",
            "Groups of the step that taught nothing and gave way to another prompt's "
            "(loop.dynamic_sampling). Rewards and lengths count them, losses do not.",
        ),
        (
            "mismatch/on_policy",
            "nats",
            "Engine against learner on tokens generated with the very weights that are trained: "
            "mean difference of a log-probability. Rounding, unless an update went wrong.",
        ),
        ("mismatch/on_policy_tokens", "tokens", "How many such tokens the step had."),
        ("replay/share", "share", "Replayed trajectories among all that were trained."),
        ("age/replay/mean", "versions", "Age of the replayed trajectories, mean."),
        ("age/replay/max", "versions", "Age of the oldest replayed trajectory."),
        ("tiers/easy", "trajectories", "Trajectories stored in the Easy tier."),
        ("tiers/medium", "trajectories", "Trajectories stored in the Medium tier."),
        ("tiers/hard", "trajectories", "Trajectories stored in the Hard tier."),
        ("buffer/stored", "trajectories", "Trajectories stored in the replay buffer."),
        # the ledger closes: generated = trained_fresh + replay_only + dropped + in_flight
        (
            "ledger/generated",
            "groups",
            "Groups ever leased for generation; equals the sum of the four below.",
        ),
        ("ledger/trained_fresh", "groups", "Groups trained once as fresh."),
        ("ledger/replay_only", "groups", "Groups that came too late and went to replay only."),
        ("ledger/dropped", "groups", "Groups given up, each with a reason in the events."),
        ("dropped/<reason>", "groups", "Groups given up for one reason, so far."),
        ("ledger/in_flight", "groups", "Groups being generated, scored or waiting for their step."),
        # what it cost
        (
            "completions/generated",
            "completions",
            "Completions generated for training so far: the paper's cost axis.",
        ),
        ("completions/truncated_share", "share", "Fresh completions cut off by the token limit."),
        ("completion/length_mean", "tokens", "Length of the fresh completions, mean."),
        ("completion/length_min", "tokens", "Length of the shortest fresh completion."),
        ("completion/length_max", "tokens", "Length of the longest fresh completion."),
        ("tokens/generated", "tokens", "Completion tokens generated so far."),
        (
            "tokens/trained",
            "tokens",
            "Completion tokens trained on in the step, fresh and replayed.",
        ),
        (
            "tokens/computed",
            "tokens",
            "Positions that the learner computed in the step, prompts and media included.",
        ),
        ("tokens/scored", "tokens", "Of these, the ones whose logits were computed."),
        ("tokens/pairs", "pairs", "Pairs of these of which one may look at the other."),
        (
            "rollout/tokens_per_s",
            "tokens/s",
            "Completion tokens generated per second of wall time, all actors together.",
        ),
        (
            "rollout/workers",
            "actors",
            "Rollout actors at work, those that leave in order included.",
        ),
        (
            "learner/tokens_per_s",
            "tokens/s",
            "Completion tokens trained per second of the learner's own work, waiting left out.",
        ),
        (
            "learner/mfu",
            "share",
            "Model FLOPs utilisation of the learner's passes and updates: the decoder's operations "
            "over the GPUs' dense bfloat16 peak; where GPU and model are known.",
        ),
        ("time/step", "s", "Wall time of the step, waiting included."),
        ("time/learner_wait", "s", "Time the learner waited for fresh groups in this step."),
        (
            "time/rollout_wait",
            "s",
            "Time the rollout actors waited for admission in this step, mean over actors.",
        ),
        ("time/encode", "s", "Time spent on templates and media before the forward pass."),
        ("time/media", "s", "Time that worker processes spent decoding and encoding media."),
        ("media/hidden_share", "", "Share of that time that no step waited for."),
        (
            "media/store_hit_share",
            "",
            "Share of the prompts with media whose embeddings were there when asked for.",
        ),
        ("time/reference", "s", "Time to score the step with the adapter off (LoRA), 0 otherwise."),
        ("time/forward_backward", "s", "Time of the forward and backward passes."),
        ("time/optimizer", "s", "Time of the optimiser's updates, clipping included."),
        (
            "time/replicate",
            "s",
            "Time to leave a copy of the learner's state outside the learner.",
        ),
        (
            "time/turns",
            "s",
            "Colocated: time that engines and learner took to leave the device to each other.",
        ),
        ("time/publish", "s", "Time to write and announce the new weights."),
        ("prompts/seen", "prompts", "Prompts asked for training so far, repeats counted."),
        ("memory/host", "GiB", "Memory in use on the driver's host, by all processes."),
        ("memory/learner", "GiB", "Resident memory of the first learner rank."),
        (
            "memory/learner_gpu",
            "GiB",
            "Most memory that the first learner rank's GPU has held for tensors; on a GPU only.",
        ),
        # judges, hints, bad prompts
        (
            "masked/<component>",
            "share",
            "Fresh completions without a mark of one reward (a judge that failed); the mark stands "
            "at a mean, not at zero.",
        ),
        (
            "judge/breaker_open",
            "actors",
            "Reward actors whose circuit breaker is open: their judge failed so often that it is "
            "not asked for now.",
        ),
        (
            "judge/unscored",
            "completions",
            "Completions that the judge gave no usable mark, so far, of reward actors alive now.",
        ),
        ("hints/active", "prompts", "Prompts whose hint is on (docs/method.md 1.4)."),
        (
            "hints/fired_kl",
            "hints",
            "Hints that came on since the run began because a prompt stayed Hard at a low KL.",
        ),
        (
            "hints/fired_patience",
            "hints",
            "Hints that came on since the run began because a prompt's accuracy stayed 0.",
        ),
        (
            "hints/visits",
            "completions",
            "Fresh completions of the step that were generated with a hint in context.",
        ),
        (
            "quarantined/prompts",
            "prompts",
            "Prompts that failed at run time and are not asked again; the events say why.",
        ),
    )
)

#: Old name -> today's. Dashboards find the old one beside it for one release.
OLD_NAMES = {"time/hold": "time/replicate"}

_EXACT = {metric.name: metric for metric in CATALOGUE if not metric.is_family}
_EXACT |= {
    old: Metric(old, _EXACT[new].unit, f"Old name of {new}; it goes with the next release.")
    for old, new in OLD_NAMES.items()
}
#: Longest prefix first, so that "eval/accuracy/x" is not taken for a shorter family.
_FAMILIES = tuple(
    sorted((m for m in CATALOGUE if m.is_family), key=lambda metric: -len(metric.prefix))
)


@lru_cache(maxsize=4096)
def describe(name: str) -> Metric | None:
    """The catalogue entry of a metric, a family's for its members; None outside the catalogue."""
    if name in _EXACT:
        return _EXACT[name]
    return next((family for family in _FAMILIES if family.covers(name)), None)


def under_old_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The values of ``metrics`` that also had another name, by that name."""
    return {old: metrics[new] for old, new in OLD_NAMES.items() if new in metrics}


def uncatalogued(names: Iterable[str]) -> list[str]:
    """The names outside the catalogue, sorted."""
    return sorted({name for name in names if describe(name) is None})


def members(family: str, names: Iterable[str]) -> dict[str, str]:
    """``{member: full name}`` of a family among ``names``, e.g. {"accuracy": "reward/accuracy"};
    sorted by member."""
    entry = next((metric for metric in _FAMILIES if metric.name == family), None)
    if entry is None:
        raise ValueError(
            f"'{family}' is not a metric family; families: {[metric.name for metric in _FAMILIES]}"
        )
    return {
        name.removeprefix(entry.prefix): name
        for name in sorted(set(names))
        if describe(name) is entry
    }


def catalogue_table() -> str:
    """The catalogue as a Markdown table; docs/output.md holds a copy that a test keeps equal."""
    rows = [
        f"| `{metric.name}` | {metric.unit or '-'} | {metric.meaning} |" for metric in CATALOGUE
    ]
    return "\n".join(["| name | unit | meaning |", "|---|---|---|", *rows])
