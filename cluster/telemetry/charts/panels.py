"""The charts of a run's report, from its metrics and distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from avatar_rl.cluster.telemetry.charts.intervals import wilson
from avatar_rl.cluster.telemetry.charts.svg import Line, Panel
from avatar_rl.cluster.telemetry.distributions import advantage_shares, loss_by_position
from avatar_rl.cluster.telemetry.metrics import members
from avatar_rl.cluster.telemetry.plots import series, smooth, waiting_shares
from avatar_rl.common.types import Json

Row = Mapping[str, float | None]
#: Steps over which a noisy curve is averaged: its length over this.
SMOOTHING = 20
MOST_COMPONENTS = 5
ADVANTAGES = 4.0  # the histogram's ends (learner/objective/step_metrics.py)


def panels(rows: Sequence[Row], distributions: Sequence[Mapping[str, Json]]) -> list[Panel]:
    """All charts; those without data are left out but for the first."""
    found = [
        _accuracy(rows),
        _rewards(rows),
        _several("Dead groups", rows, _DEAD, share=True),
        _several("Replay buffer by tier", rows, _TIERS, calm=True),
        _several("KL to the behaviour policy, each token at most 1 nat", rows, _KL),
        _several("Entropy, nats", rows, _ENTROPY),
        _several("Share of the step spent waiting", waiting_shares(rows), _WAITING, share=True),
        _several("Tokens per second", rows, _SPEED),
        _advantages(distributions),
        _positions(distributions),
    ]
    return [panel for i, panel in enumerate(found) if i == 0 or not panel.empty]


_DEAD = (("before replay", "groups/dead_before", 0), ("after replay", "groups/dead_after", 1))
_TIERS = (("easy", "tiers/easy", 2), ("medium", "tiers/medium", 4), ("hard", "tiers/hard", 1))
_KL = (
    ("fresh", "kl/behaviour_capped/fresh", 0),
    ("replayed", "kl/behaviour_capped/replay", 1),
)
_ENTROPY = (("fresh", "entropy/fresh", 0), ("replayed", "entropy/replay", 1))
_WAITING = (("learner for rollouts", "learner", 1), ("rollouts for learner", "rollout", 0))
_SPEED = (("generated", "rollout/tokens_per_s", 0), ("trained", "learner/tokens_per_s", 1))


def _accuracy(rows: Sequence[Row]) -> Panel:
    """Held-out accuracy with its 95 % intervals where the number of prompts is known."""
    whiskers = [
        (step, *wilson(value, int(count)))
        for row in rows
        if (value := row.get("eval/accuracy")) is not None
        and (count := row.get("eval/prompts"))
        and (step := row.get("step")) is not None
    ]
    lines = [
        Line("training, 8 steps", _points(rows, "accuracy/moving"), 1),
        Line("held out", _points(rows, "eval/accuracy"), 0, whiskers=whiskers),
    ]
    return Panel("Accuracy", lines, share=True)


def _rewards(rows: Sequence[Row]) -> Panel:
    names = members("reward/<component>", (name for row in rows for name in row))
    chosen = [("total, weighted", "reward/mean", 0)]
    own = list(names.items())[:MOST_COMPONENTS]
    chosen += [(name, path, i + 1) for i, (name, path) in enumerate(own)]
    return _several("Rewards of fresh completions", rows, chosen)


def _several(
    title: str,
    rows: Sequence[Row],
    curves: Sequence[tuple[str, str, int]],
    *,
    share: bool = False,
    calm: bool = False,
) -> Panel:
    """Curves over the steps: the mean of a window, and of shares what was measured behind it."""
    lines = []
    for name, path, tone in curves:
        points = _points(rows, path)
        window = len(points) // SMOOTHING
        if calm or window < 2:
            lines.append(Line(name, points, tone))
            continue
        middle = smooth([y for _, y in points], window)
        lines.append(Line(name, [(x, y) for (x, _), y in zip(points, middle, strict=True)], tone))
        if share:
            lines.append(Line(name, points, tone, faint=True))
    return Panel(title, lines, share=share)


def _advantages(rows: Sequence[Mapping[str, Json]]) -> Panel:
    lines = []
    for tone, kind in enumerate(("fresh", "replay")):
        shares = advantage_shares(rows, kind)
        if shares is not None:
            width = 2 * ADVANTAGES / len(shares)
            centres = [-ADVANTAGES + width * (i + 0.5) for i in range(len(shares))]
            lines.append(Line(kind, list(zip(centres, shares.tolist(), strict=True)), tone))
    return Panel("Advantages of all completions trained", lines, x="advantage")


def _positions(rows: Sequence[Mapping[str, Json]]) -> Panel:
    lines = []
    for tone, kind in enumerate(("fresh", "replay")):
        loss = loss_by_position(rows, kind)
        if loss is not None:
            places = (np.arange(len(loss)) + 0.5) / len(loss)
            points = [
                (float(x), float(y)) for x, y in zip(places, loss, strict=True) if math.isfinite(y)
            ]
            lines.append(Line(kind, points, tone))
    return Panel("Loss of a token by its place in the completion", lines, x="place")


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return list(zip(*series(rows, name), strict=True))
