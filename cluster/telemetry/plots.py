"""plot.png: six panels that show whether a run learnt, from what, and at what cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from avatar_rl.cluster.telemetry.metrics import members
from avatar_rl.common.files import replaced_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, float | None]
#: Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#8a8a8a",
)
COMPONENT_COLOURS = (ORANGE, GREEN, VERMILION, PURPLE, SKY, "#b5a300", GREY)
STYLE: Any = {  # matplotlib wants one Literal of all its keys
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#bbbbbb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
}


def series(rows: Iterable[Row], name: str, x: str = "step") -> tuple[list[float], list[float]]:
    """(x values, y values) of the rows that have both, in row order."""
    pairs = [(row.get(x), row.get(name)) for row in rows]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in known], [b for _, b in known]


def smooth(
    values: Sequence[float], window: int, middle: Callable[[Sequence[float]], float] = mean
) -> list[float]:
    """Centred moving average, or another ``middle``; the window shrinks at both ends."""
    half = window // 2
    return [middle(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def calm_limit(values: Sequence[float]) -> float | None:
    """Twice the 90th percentile where the largest value exceeds ten times that percentile, else
    None.

    A plot that is linear up to this limit and logarithmic above it shows both the course and its
    spikes."""
    if not values:
        return None
    high = sorted(values)[int(0.9 * (len(values) - 1))]
    return 2 * high if 0 < 10 * high < max(values) else None


def with_completions(rows: Sequence[Row]) -> list[dict[str, float | None]]:
    """Rows in which completions/generated is carried forward (0 at the start), so that evaluations
    have an x value."""
    filled, last = [], 0.0
    for row in rows:
        last = row.get("completions/generated") or last
        filled.append({**row, "completions/generated": last})
    return filled


def waiting_shares(rows: Sequence[Row]) -> list[dict[str, float | None]]:
    """Per step, the shares of its wall time that the learner and the rollouts waited; None where
    unknown."""
    shares: list[dict[str, float | None]] = []
    for row in rows:
        step = row.get("time/step")
        out: dict[str, float | None] = {"step": row.get("step")}
        for side in ("learner", "rollout"):
            wait = row.get(f"time/{side}_wait")
            out[side] = None if wait is None or not step else min(1.0, wait / step)
        shares.append(out)
    return shares


def draw_plot(rows: Sequence[Row], path: Path, title: str = "") -> Path:
    """Write the figure (PNG, 15 x 8 inches) of ``read_metrics``' rows; a panel without data says
    so."""
    import matplotlib

    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, 3, figsize=(15, 8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        )
        panels = (_accuracy, _rewards, _tiers, _divergence, _flow, _throughput)
        for draw, axis in zip(panels, axes.flat, strict=True):
            draw(axis, rows)
            if not axis.lines and not axis.collections:
                axis.text(
                    0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color="#999999"
                )
                axis.set(xticks=[], yticks=[])
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        with replaced_file(path) as beside:
            figure.savefig(beside, dpi=110, facecolor="white", format="png")
        plt.close(figure)
    return path


def _line(
    axis: Axes,
    rows: Sequence[Row],
    name: str,
    label: str,
    colour: str,
    *,
    x: str = "step",
    dash: str = "-",
    middle: Callable[[Sequence[float]], float] = mean,
) -> bool:
    """A smoothed line over its raw values; False when there are none."""
    xs, ys = series(rows, name, x)
    if not ys:
        return False
    window = max(1, math.ceil(len(ys) / 20))
    if window > 1:
        axis.plot(xs, ys, color=colour, alpha=0.2, linewidth=1)
    marker = "o" if len(ys) == 1 else None
    axis.plot(
        xs, smooth(ys, window, middle), color=colour, linestyle=dash, label=label, marker=marker
    )
    return True


def _legend(axis: Axes, second: Axes | None = None, columns: int = 1) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if second is not None:
        more = second.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    if handles:
        axis.legend(handles, labels, ncols=columns, loc="best")


def _accuracy(axis: Axes, rows: Sequence[Row]) -> None:
    filled = with_completions(rows)
    name = (
        "accuracy/moving"
        if any(row.get("accuracy/moving") is not None for row in rows)
        else "accuracy/train"
    )
    xs, ys = series(filled, "accuracy/train", "completions/generated")
    if name == "accuracy/moving" and ys:
        axis.plot(xs, ys, color=SKY, alpha=0.3, linewidth=1)
    xs, ys = series(filled, name, "completions/generated")
    if ys:
        axis.plot(
            xs,
            ys,
            color=SKY,
            label="training (moving average)" if name == "accuracy/moving" else "training",
        )
    xs, ys = series(filled, "eval/accuracy", "completions/generated")
    if ys:
        axis.plot(xs, ys, color=BLUE, marker="o", markersize=5, linewidth=2.2, label="held-out")
        ends = [0] if len(ys) == 1 else [0, len(ys) - 1]
        for end in ends:
            axis.annotate(
                f"{ys[end]:.2f}",
                (xs[end], ys[end]),
                (0, 7),
                textcoords="offset points",
                ha="center",
                color=BLUE,
                fontweight="bold",
            )
    axis.set(title="Accuracy", xlabel="completions generated", ylim=(0, 1.04))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _legend(axis)


def _rewards(axis: Axes, rows: Sequence[Row]) -> None:
    _line(axis, rows, "reward/mean", "total (weighted)", BLUE)
    names = members("reward/<component>", (name for row in rows for name in row))
    for index, (component, name) in enumerate(names.items()):
        _line(
            axis,
            rows,
            name,
            component.replace("_", " "),
            COMPONENT_COLOURS[index % len(COMPONENT_COLOURS)],
        )
    axis.set(title="Rewards of fresh completions", xlabel="step")
    _legend(axis)


def _tiers(axis: Axes, rows: Sequence[Row]) -> None:
    names = ("tiers/easy", "tiers/medium", "tiers/hard")
    whole = [row for row in rows if all(row.get(name) is not None for name in names)]
    if whole:
        xs = series(whole, names[0])[0]
        stacks = [series(whole, name)[1] for name in names]
        axis.stackplot(
            xs,
            *stacks,
            labels=("Easy", "Medium", "Hard"),
            colors=(GREEN, ORANGE, PURPLE),
            alpha=0.8,
        )
        axis.margins(x=0, y=0.08)
    axis.set(title="Replay buffer by tier", xlabel="step", ylabel="trajectories")
    _legend(axis)


def _divergence(axis: Axes, rows: Sequence[Row]) -> None:
    _line(axis, rows, "kl/reference", "KL to reference", BLUE, middle=median)
    _line(axis, rows, "kl/behaviour", "KL to behaviour", SKY, middle=median)
    axis.set(title="Distance from the other policies", xlabel="step", ylabel="nats per token")
    limit = calm_limit(series(rows, "kl/reference")[1] + series(rows, "kl/behaviour")[1])
    if limit is not None:  # a token of an old replay may have a k3 of thousands
        axis.set_yscale("symlog", linthresh=limit, linscale=3)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(f"nats per token (logarithmic above {limit:.2g})")
    second = axis.twinx()
    second.grid(False)
    drawn = [
        _line(second, rows, "ratio/replay/mean", "mean ratio, replayed", PURPLE, dash=":"),
        _line(second, rows, "clip_fraction/fresh", "clipped, fresh", ORANGE, dash="--"),
        _line(second, rows, "clip_fraction/replay", "clipped, replayed", VERMILION, dash="--"),
    ]
    second.set_ylim(bottom=0)
    second.set_ylabel("share clipped, mean ratio (dashed)")
    second.set_visible(any(drawn))
    _legend(axis, second)


def _flow(axis: Axes, rows: Sequence[Row]) -> None:
    waits = waiting_shares(rows)
    _line(axis, waits, "learner", "learner waits for rollouts", VERMILION)
    _line(axis, waits, "rollout", "rollouts wait for learner", BLUE)
    axis.set(
        title="Waiting and staleness", xlabel="step", ylabel="share of the step's time", ylim=(0, 1)
    )
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    second = axis.twinx()
    second.grid(False)
    drawn = _line(second, rows, "staleness/mean", "staleness, mean", GREY, dash="--")
    top = max(series(rows, "staleness/max")[1] + series(rows, "staleness/mean")[1], default=1)
    second.set_ylim(0, max(1.0, top) * 1.25)
    second.set_ylabel("policy versions (dashed)")
    second.set_visible(drawn)
    _legend(axis, second)


def _throughput(axis: Axes, rows: Sequence[Row]) -> None:
    _line(axis, rows, "rollout/tokens_per_s", "rollouts (generated)", BLUE)
    _line(axis, rows, "learner/tokens_per_s", "learner (trained)", ORANGE)
    axis.set(title="Throughput", xlabel="step", ylabel="tokens/s")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _legend(axis)
