"""What TRL and verl call our metrics: for dashboards that were made for them.

``output.metric_names: trl`` (or verl) sends these names to the trackers beside ours. docs/output.md
holds the same table; a test keeps it equal. Names were looked up in TRL 1.16 and in verl's
``metric_utils``.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Ours -> (TRL's, verl's); empty where there is none. Families have <...>. What only looks alike is
#: left out: TRL's eval_reward is no accuracy, verl's perf/throughput is of one GPU, and its
#: timing_s/gen is all of generation where our learner only waits for the rest of it.
NAMES: dict[str, tuple[str, str]] = {
    "step": ("", "training/global_step"),
    "reward/mean": ("reward", "critic/rewards/mean"),
    "reward/std": ("reward_std", ""),
    "reward/<component>": ("rewards/<component>/mean", ""),
    "reward_std/<component>": ("rewards/<component>/std", ""),
    "groups/dead_before": ("frac_reward_zero_std", ""),
    "loss/total": ("loss", ""),
    "loss/policy": ("policy_loss", "actor/pg_loss"),
    "loss/kl": ("", "actor/kl_loss"),
    "kl/reference": ("kl", ""),
    "kl/behaviour": ("", "actor/ppo_kl"),
    "clip_fraction/fresh": ("clip_ratio/region_mean", "actor/pg_clipfrac"),
    "entropy": ("entropy", "actor/entropy"),
    "grad_norm": ("grad_norm", "actor/grad_norm"),
    "lr": ("learning_rate", "actor/lr"),
    "completion/length_mean": ("completions/mean_length", "response_length/mean"),
    "completion/length_min": ("completions/min_length", "response_length/min"),
    "completion/length_max": ("completions/max_length", "response_length/max"),
    "completions/truncated_share": ("completions/clipped_ratio", "response_length/clip_ratio"),
    "time/step": ("step_time", "timing_s/step"),
    "time/forward_backward": ("", "timing_s/update_actor"),
    "learner/mfu": ("", "perf/mfu/actor"),
    "memory/learner_gpu": ("", "perf/max_memory_allocated_gb"),
    "memory/host": ("", "perf/cpu_memory_used_gb"),
}
OTHERS = {"trl": 0, "verl": 1}


def aliases(metrics: Mapping[str, float], names: str) -> dict[str, float]:
    """The values of ``metrics`` under another framework's names; empty for "ours"."""
    if names not in OTHERS:
        return {}
    found = {}
    for name, value in metrics.items():
        if theirs := _theirs(name, OTHERS[names]):
            found[theirs] = value
    return found


def _theirs(name: str, column: int) -> str:
    if name in NAMES:
        return NAMES[name][column]
    family, _, member = name.partition("/")
    if member in ("mean", "std"):
        return ""
    pattern = NAMES.get(f"{family}/<component>")
    return pattern[column].replace("<component>", member) if pattern and member else ""


def table() -> str:
    """As Markdown, for docs/output.md."""
    rows = [
        f"| `{ours}` | {f'`{trl}`' if trl else '-'} | {f'`{verl}`' if verl else '-'} |"
        for ours, (trl, verl) in NAMES.items()
    ]
    return "\n".join(["| ours | TRL | verl |", "|---|---|---|", *rows])
